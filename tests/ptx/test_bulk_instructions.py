"""That the machine executes bulk copies and mbarriers, and sees each kind of fault in them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ptx_machine import machine
from ptx_machine.errors import KernelError, UnknownInstructionError
from ptx_snippets import run_snippet

FIRST = "setp.eq.s32 %p1, %r2, 0; mov.b32 %r10, memory; add.s32 %r11, %r10, 16;"
"""``%p1`` is the first thread; ``%r10`` is its mbarrier, ``%r11`` the bytes that it uses."""

INIT = "@%p1 mbarrier.init.shared::cta.b64 [%r10], 1;"
FENCE = "fence.proxy.async.shared::cta;"
MEET = "bar.warp.sync -1;"
ARRIVE = "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], 256;"
INBOUND = """
    @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes
        [%r11], [%rd1], 256, [%r10];
"""
WAIT = """
again:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r10], 0;
    @!%p2 bra again;
"""
OUTBOUND = "@%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r11], 256;"
COMMIT = "cp.async.bulk.commit_group;"
READ = "cp.async.bulk.wait_group.read 0;"
WRITTEN = "cp.async.bulk.wait_group 0;"
ALL = [FIRST, INIT, FENCE, MEET, ARRIVE, INBOUND, WAIT, OUTBOUND, COMMIT, WRITTEN]


def run(
    *steps: str, inputs: torch.Tensor | None = None, writable: slice = slice(None)
) -> np.ndarray:
    return run_snippet("\n".join(steps), inputs, shared_bytes=512, writable=writable)


def without(step: str) -> list[str]:
    return [each for each in ALL if each is not step]


def before(step: str, *others: str) -> list[str]:
    at = ALL.index(step)
    return [*ALL[:at], *others, *ALL[at:]]


def test_bytes_go_there_and_back() -> None:
    given = torch.arange(32) * 0x0102030405
    assert (run(*ALL, inputs=given) == given.numpy().view(np.uint64)).all()


def test_what_was_read_is_written_although_it_is_overwritten() -> None:
    """Once a group has been read, its bytes may change before they are written."""
    given = torch.arange(32) + 1
    found = run(*before(WRITTEN, READ, "@%p1 st.shared.b32 [%r11], 99;"), inputs=given)
    assert (found == given.numpy().view(np.uint64)).all()


def test_ordinary_stores_are_copied_behind_a_fence() -> None:
    store = "mul.lo.s32 %r12, %r2, 8; add.s32 %r12, %r12, %r11; st.shared.b32 [%r12], %r2;"
    high = "st.shared.b32 [%r12 + 4], 0;"
    found = run(FIRST, store, high, FENCE, MEET, OUTBOUND, COMMIT, WRITTEN)
    assert (found == np.arange(32)).all()
    for steps, message in (
        ([FIRST, store, high, MEET, OUTBOUND], "no fence orders an ordinary store"),
        ([FIRST, store, high, FENCE, OUTBOUND], "without a barrier between them"),
        ([FIRST, FENCE, MEET, OUTBOUND], "read before it is written"),
    ):
        with pytest.raises(KernelError, match=message):
            run(*steps, COMMIT, WRITTEN)


FAULTS: dict[str, tuple[list[str], str]] = {
    "no mbarrier": (without(INIT), "there is no mbarrier at 0x0"),
    "no fence behind it": (without(FENCE), "no fence orders an ordinary store"),
    "threads that have not met its maker": (without(MEET), "without a barrier between them"),
    "bytes that nobody announced": (
        [each.replace("_, [%r10], 256", "_, [%r10], 128") for each in ALL],
        "128 bytes arrive that were not announced",
    ),
    "bytes that never come": (without(INBOUND), "does not end"),
    "an arrival too many": (
        before(INBOUND, ARRIVE),
        "a phase of 1 arrivals gets another",
    ),
    "a phase that ends before its bytes come": (
        [each.replace("_, [%r10], 256", "_, [%r10], 0") for each in ALL],
        "used while a bulk copy to them is in flight",
    ),
    "a phase that its copy cannot hold up": (
        [each.replace("_, [%r10], 256", "_, [%r10], 0") for each in [*ALL[:4], INBOUND, ARRIVE]],
        "a phase ends while bulk copies are in flight",
    ),
    "reading what has not come": (without(WAIT), "used while a bulk copy to them is in flight"),
    "reading what another thread has waited for": (
        [*ALL[:6], "setp.eq.s32 %p3, %r2, 1; @!%p3 bra later;", WAIT, "later:", *ALL[7:]],
        "thread 0 reads what a bulk copy brought without having waited for it",
    ),
    "storing to what has not come": (
        before(WAIT, "@%p1 st.shared.b32 [%r11], 1;"),
        "used while a bulk copy to them is in flight",
    ),
    "overwriting what has not been read": (
        before(WRITTEN, "@%p1 st.shared.b32 [%r11], 1;"),
        "overwritten while a bulk copy reads them",
    ),
    "no group": (without(COMMIT), "returns before its bulk copies have ended"),
    "no waiting for the end": (without(WRITTEN), "returns before its bulk copies have ended"),
    "waiting until it was read": (
        [READ if each is WRITTEN else each for each in ALL],
        "returns before its bulk copies have ended",
    ),
    "a return before bytes have come": (ALL[:6], "returns before its bulk copies have ended"),
    "ordinary bytes of an mbarrier": (
        before(ARRIVE, "@%p1 st.shared.b32 [%r10], 1;"),
        "an mbarrier is accessed as ordinary bytes",
    ),
    "a second mbarrier in its place": (
        before(ARRIVE, INIT),
        "an mbarrier is accessed as ordinary bytes",
    ),
    "an mbarrier between two words": (
        [FIRST, "add.s32 %r10, %r10, 4;", INIT],
        "8 bytes at 0x4 are misaligned",
    ),
    "a source between two words": (
        [each.replace("[%rd1]", "[%rd1 + 8]") for each in ALL],
        "need positive multiples of 16",
    ),
    "a target between two words": (
        [each.replace("[%rd2]", "[%rd2 + 8]") for each in ALL],
        "need positive multiples of 16",
    ),
    "shared memory between two words": (
        [each.replace("[%r11]", "[%r11 + 8]") for each in ALL],
        "need positive multiples of 16",
    ),
    "a size of half a word": (
        [each.replace("256", "248") for each in ALL],
        "need positive multiples of 16, .* 248 bytes",
    ),
    "a size of nothing": (
        [each.replace("256", "0") for each in ALL],
        "need positive multiples of 16, .* 0 bytes",
    ),
    "reading behind the source": (
        [each.replace("[%rd1]", "[%rd1 + 16]") for each in ALL],
        "256 bytes at .* may not be read",
    ),
    "writing behind the target": (
        [each.replace("[%rd2]", "[%rd2 + 16]") for each in ALL],
        "256 bytes at .* may not be written",
    ),
    "leaving shared memory": (
        [each.replace("[%r11]", "[%r11 + 256]") for each in ALL],
        "leaves the 512 bytes of shared memory",
    ),
}
"""What a kernel does, and how the machine names it."""


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, message = FAULTS[fault]
    monkeypatch.setattr(machine, "MAX_STEPS", 300)
    with pytest.raises(KernelError, match=message):
        run(*steps)


def test_a_thread_learns_from_one_that_has_waited() -> None:
    """The second thread waits, the first one copies: they must meet in between."""
    given = torch.arange(32) * 3
    split = [*ALL[:6], "setp.eq.s32 %p3, %r2, 1; @!%p3 bra later;", WAIT, "later:"]
    assert (run(*split, MEET, *ALL[7:], inputs=given) == given.numpy().view(np.uint64)).all()


@pytest.mark.parametrize(
    "body",
    [
        "cp.async.bulk.prefetch.L2.global [%rd1], 16;",
        "cp.async.cg.shared.global [%r10], [%rd1], 16;",
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%r11], [%rd1], 16, [%r10], %rd5;",
        "mbarrier.arrive.shared::cta.b64 _, [%r10];",
        "mbarrier.arrive.expect_tx.shared::cta.b64 %rd10, [%r10], 16;",
        "mbarrier.test_wait.parity.shared::cta.b64 %p1, [%r10], 0;",
        "fence.proxy.async.global;",
        "fence.acq_rel.gpu;",
    ],
)
def test_what_the_machine_does_not_know_is_refused(body: str) -> None:
    with pytest.raises(UnknownInstructionError, match="does not know"):
        run(FIRST, INIT, body)


def test_ordinary_loads_of_what_came_are_refused() -> None:
    with pytest.raises(UnknownInstructionError, match="ordinary loads of what a bulk copy brought"):
        run(*before(OUTBOUND, "@%p1 ld.shared.b32 %r12, [%r11];"))

"""That the machine runs threads as a GPU does, and sees each kind of fault."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ptx_machine import machine
from ptx_machine.errors import KernelError, UnknownInstructionError
from ptx_machine.machine import Grid, execute
from ptx_machine.memory import GlobalMemory
from ptx_machine.program import read_program
from ptx_snippets import KERNEL, run_snippet

OWN_SHARED = "mul.lo.s32 %r10, %r2, 4; mov.b32 %r11, memory; add.s32 %r12, %r11, %r10;"
"""``%r12`` is the address of 4 bytes of shared memory that belong to the thread."""

NEXT_SHARED = """
    add.s32 %r13, %r2, 1;
    rem.u32 %r13, %r13, %r4;
    mul.lo.s32 %r13, %r13, 4;
    add.s32 %r13, %r11, %r13;
"""
"""``%r13`` is the address of those of the next thread."""


class TestThreads:
    def test_they_know_their_place(self) -> None:
        body = """
            mov.u32 %r10, %nctaid.x;
            mad.lo.s32 %r11, %r10, 1000, %r1;
            mad.lo.s32 %r11, %r3, 100, %r11;
            add.s32 %r11, %r11, %r2;
            st.global.b32 [%rd5], %r11;
        """
        found = run_snippet(body, num_threads=64, num_blocks=300)
        expected = 300 * 1000 + 100 * np.arange(300)[:, None] + np.arange(64) + 7
        assert (found == expected.reshape(-1)).all()

    def test_a_loop_that_threads_leave_at_different_times(self) -> None:
        body = """
            mov.b32 %r10, 0;
            mov.b32 %r11, 0;
        again:
            add.s32 %r10, %r10, %r11;
            add.s32 %r11, %r11, 1;
            setp.le.s32 %p1, %r11, %r2;
            @%p1 bra again;
            st.global.b32 [%rd5], %r10;
        """
        numbers = np.arange(64)
        assert (run_snippet(body, num_threads=64) == numbers * (numbers + 1) // 2).all()

    def test_both_sides_of_a_branch_meet_again(self) -> None:
        body = """
            and.b32 %r10, %r2, 1;
            setp.eq.s32 %p1, %r10, 0;
            @%p1 bra even;
            mov.b32 %r11, 5;
            bra.uni both;
        even:
            mov.b32 %r11, 6;
        both:
            bar.sync 0;
            st.global.b32 [%rd5], %r11;
        """
        assert (run_snippet(body) == np.tile([6, 5], 16)).all()

    def test_some_return_early(self) -> None:
        body = """
            setp.ge.s32 %p1, %r2, 40;
            @%p1 ret;
            bar.sync 0;
            st.global.b32 [%rd5], 1;
        """
        assert (run_snippet(body, num_threads=64) == (np.arange(64) < 40)).all()

    def test_values_cross_a_warp(self) -> None:
        body = """
            shfl.sync.bfly.b32 %r10, %r2, 5, 31, -1;
            shfl.sync.idx.b32 %r11, %r2, 3, 31, -1;
            mad.lo.s32 %r10, %r11, 1000, %r10;
            redux.sync.max.s32 %r12, %r2, -1;
            mad.lo.s32 %r10, %r12, 100000, %r10;
            st.global.b32 [%rd5], %r10;
        """
        lanes, warps = np.arange(64) % 32, np.arange(64) // 32
        expected = (32 * warps + (lanes ^ 5)) + 1000 * (32 * warps + 3)
        expected += 100000 * (32 * warps + 31)
        assert (run_snippet(body, num_threads=64) == expected).all()

    @pytest.mark.parametrize(
        ("name", "expected"), [("min.s64", -31), ("max.s64", 0), ("add.u64", -(31 * 32 // 2))]
    )
    def test_atomics_meet_in_one_word(self, name: str, expected: int) -> None:
        body = f"""
            cvt.s64.s32 %rd10, %r2;
            neg.s64 %rd10, %rd10;
            atom.global.gpu.acq_rel.{name} %rd11, [%rd2], %rd10;
        """
        program = read_program(KERNEL.format(threads=32, body=body))
        word = torch.zeros(1, dtype=torch.int64)
        execute(program, Grid(1), [0, word.data_ptr(), 0], GlobalMemory([word], [word]))
        assert int(word) == expected

    def test_a_matrix_is_spread_over_a_warp(self) -> None:
        body = f"""
            {OWN_SHARED}
            mul.lo.s32 %r13, %r2, 16;
            add.s32 %r13, %r11, %r13;
            mul.lo.s32 %r14, %r2, 4;
            add.s32 %r15, %r14, 1;
            add.s32 %r16, %r14, 2;
            add.s32 %r17, %r14, 3;
            st.shared.v4.b32 [%r13], {{%r14, %r15, %r16, %r17}};
            bar.warp.sync -1;
            ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r20, %r21, %r22, %r23}}, [%r13];
            mad.lo.s32 %r20, %r21, 1000, %r20;
            mad.lo.s32 %r22, %r23, 1000, %r22;
            st.global.v2.b32 [%rd5], {{%r20, %r22}};
        """
        found = run_snippet(body, shared_bytes=512).view(np.uint32).reshape(32, 2)
        # Word j of row i of matrix m has the number 32 * m + 4 * i + j, and so has its thread.
        lanes = np.arange(32)
        assert (found[:, 0] == lanes + 1000 * (lanes + 32)).all()
        assert (found[:, 1] == lanes + 64 + 1000 * (lanes + 96)).all()

    def test_only_some_blocks_can_be_run(self) -> None:
        program = read_program(KERNEL.format(threads=32, body="st.global.b32 [%rd5], 1;"))
        out = torch.zeros(320, dtype=torch.int64)
        arguments = [out.data_ptr(), out.data_ptr(), 0]
        execute(program, Grid(10, blocks=[1, 8]), arguments, GlobalMemory([], [out]))
        assert (out.view(10, 32).sum(dim=1) == torch.tensor([0, 32, *[0] * 6, 32, 0])).all()


FAULTS: dict[str, tuple[str, str]] = {
    "an address between two words": (
        "add.s64 %rd6, %rd5, 4; st.global.b64 [%rd6], 1;",
        "8 bytes at .* are misaligned",
    ),
    "an access that is wider than its address": (
        "st.global.v2.b64 [%rd5], {%rd1, %rd2};",
        "16 bytes at .* are misaligned",
    ),
    "an address behind what may be written": (
        "st.global.b64 [%rd5 + 8], 1;",
        "8 bytes at .* may not be written",
    ),
    "a null pointer": (
        "mov.b64 %rd6, 0; ld.global.b64 %rd6, [%rd6];",
        "8 bytes at 0x0 may not be read",
    ),
    "a load from what may only be written": (
        "ld.global.b64 %rd6, [%rd5];",
        "8 bytes at .* may not be read",
    ),
    "a store to what may only be read": (
        "st.global.b64 [%rd4], 1;",
        "8 bytes at .* may not be written",
    ),
    "an atomic on what may not be read": (
        "atom.global.gpu.acq_rel.min.s64 %rd6, [%rd5], 1;",
        "8 bytes at .* may not be read",
    ),
    "threads that store different values to one address": (
        "st.global.b32 [%rd2], %r2;",
        "store different values to one address",
    ),
    "the same in shared memory": (
        f"{OWN_SHARED} st.shared.b32 [%r11], %r2;",
        "store different values to one shared address",
    ),
    "a barrier that only some reach": (
        "setp.lt.s32 %p1, %r2, 48; @%p1 bar.sync 0;",
        "only 48 of 64 threads reach a barrier",
    ),
    "a barrier behind a branch": (
        "setp.lt.s32 %p1, %r2, 48; @%p1 bra there; bra.uni end; there: bar.sync 0; end:",
        "only 48 of 64 threads reach a barrier",
    ),
    "a shuffle that only some reach": (
        "setp.lt.s32 %p1, %r2, 40; @%p1 shfl.sync.bfly.b32 %r10, %r2, 1, 31, -1;",
        "only some threads of a warp",
    ),
    "shared memory that nobody has written": (
        f"{OWN_SHARED} ld.shared.b32 %r14, [%r12];",
        "shared memory is read before it is written",
    ),
    "shared memory that is not there": (
        f"{OWN_SHARED} st.shared.b32 [%r12 + 4], %r2;",
        "leaves the 256 bytes of shared memory",
    ),
    "a narrow address of shared memory": (
        f"{OWN_SHARED} st.shared.v2.b32 [%r12], {{%r2, %r2}};",
        "8 bytes at 0x4 are misaligned",
    ),
    "a read before the write of another thread has ended": (
        f"{OWN_SHARED} {NEXT_SHARED} st.shared.b32 [%r12], %r2; ld.shared.b32 %r14, [%r13];",
        "without a barrier between them",
    ),
    "a write before the read of another thread has ended": (
        f"{OWN_SHARED} {NEXT_SHARED} st.shared.b32 [%r12], %r2; bar.sync 0;"
        "ld.shared.b32 %r14, [%r13]; st.shared.b32 [%r12], %r2;",
        "without a barrier between them",
    ),
    "two writes to one place": (
        f"{OWN_SHARED} {NEXT_SHARED} st.shared.b32 [%r12], %r2; st.shared.b32 [%r13], %r2;",
        "without a barrier between them",
    ),
    "a barrier of warps where warps meet": (
        f"{OWN_SHARED} {NEXT_SHARED} st.shared.b32 [%r12], %r2; bar.warp.sync -1;"
        "ld.shared.b32 %r14, [%r13];",
        "threads 32 and 31 access a byte of shared memory without a barrier",
    ),
    "a division by zero": ("mov.b32 %r10, 0; div.s32 %r11, %r2, %r10;", "divided by zero"),
    "a loop without end": ("again: bra again;", "does not end"),
}
"""What a kernel does, and how the machine names it."""


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body, message = FAULTS[fault]
    monkeypatch.setattr(machine, "MAX_STEPS", 1000)
    with pytest.raises((KernelError, UnknownInstructionError), match=message):
        run_snippet(body, num_threads=64)


def test_an_access_may_not_end_outside() -> None:
    body = "add.s64 %rd6, %rd2, 496; st.global.v2.b64 [%rd6], {%rd1, %rd1};"
    run_snippet(body, num_threads=64)
    with pytest.raises(KernelError, match=r"16 bytes at .* may not be written"):
        run_snippet(body, num_threads=64, writable=slice(63))


def test_what_has_a_barrier_is_no_race() -> None:
    body = f"""
        {OWN_SHARED} {NEXT_SHARED}
        st.shared::cta.b32 [%r12], %r2;
        ld.shared::cta.b32 %r14, [%r12];
        bar.sync 0;
        ld.shared.b32 %r14, [%r13];
        bar.sync 0;
        st.shared.b32 [%r12], %r14;
        bar.warp.sync -1;
        xor.b32 %r15, %r2, 1;
        mul.lo.s32 %r15, %r15, 4;
        add.s32 %r15, %r11, %r15;
        ld.shared.b32 %r16, [%r15];
        st.global.b32 [%rd5], %r16;
    """
    expected = ((np.arange(64) ^ 1) + 1) % 64
    assert (run_snippet(body, num_threads=64) == expected).all()


@pytest.mark.parametrize(
    "body",
    [
        "wgmma.fence.sync.aligned;",
        "add.sat.s32 %r10, %r2, %r2;",
        "add.ftz.f32 %r10, %r2, %r2;",
        "max.NaN.f32 %r10, %r2, %r2;",
        "cvt.rz.bf16x2.f32 %r10, %r2, %r2;",
        "ld.volatile.global.b32 %r10, [%rd4];",
        "ld.local.b32 %r10, [%rd4];",
        "shfl.sync.up.b32 %r10, %r2, 1, 0, -1;",
        "shfl.sync.bfly.b32 %r10, %r2, 1, 31, 15;",
        "redux.sync.xor.b32 %r10, %r2, -1;",
        "atom.shared.add.u32 %r10, [%rd5], %r2;",
        "mul.hi.u64 %rd10, %rd1, %rd2;",
        "setp.lt.and.s32 %p1, %r2, %r2, %p2;",
        "bra %r2;",
    ],
)
def test_what_the_machine_does_not_know_is_refused(body: str) -> None:
    with pytest.raises(UnknownInstructionError, match=r"does not know .*line 26 of the PTX"):
        run_snippet(body)


def test_registers_hold_garbage_at_first() -> None:
    assert len(np.unique(run_snippet("st.global.b64 [%rd5], %rd20;"))) == 32

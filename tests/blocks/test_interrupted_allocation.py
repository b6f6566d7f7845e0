"""A signal handler that raises anywhere in an allocation gives no bytes two owners.

CPython runs signal handlers only after calls, at the start of functions and at backward jumps
(``eval_breaker`` in ``Python/ceval.c``): the tests raise at each of these places in turn.
"""

from __future__ import annotations

import dis
import gc
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from small_heaps import PAGE, heap_of

from kvheap import MemoryBatch, TensorMemoryAllocator

PAGES = 16


class InterruptError(Exception):
    """Stands for KeyboardInterrupt."""


class Interrupt:
    """Raises at the N-th place where kvheap or this file's ``task`` could run a signal handler."""

    CHECKED = ("CALL", "RESUME", "JUMP_BACKWARD")

    def __init__(self, number: int) -> None:
        self.left = number
        self._last: dict[FrameType, int] = {}  # the opcode that each frame ran last

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith("kvheap.") and frame.f_code.co_name != "task":
            return None
        frame.f_trace_opcodes = True
        return self._at_opcode

    def _at_opcode(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "opcode":
            last = self._last.get(frame)
            self._last[frame] = frame.f_code.co_code[frame.f_lasti]
            if last is not None and dis.opname[last].startswith(self.CHECKED):
                self.left -= 1
                if self.left < 0:
                    sys.settrace(None)
                    raise InterruptError
        elif event == "return":
            self._last.pop(frame, None)
        return self._at_opcode

    def strikes(self, task: Callable[[], object]) -> bool:
        """Whether ``task`` was interrupted; False if it has fewer bytecodes."""
        sys.settrace(self)
        try:
            task()
        except InterruptError:
            return True
        finally:
            sys.settrace(None)
        return False


def require_one_owner(heap: TensorMemoryAllocator, kept: list[MemoryBatch]) -> None:
    """All that lives is disjoint, and later calls are innocent."""
    gc.collect()
    heap.stats()
    heap.address_manager.check()
    others = []
    while True:
        other = heap.batched_allocate([PAGE], torch.uint8, 1)
        if other is None:
            break
        others.append(other)
    addresses = [address for batch in [*kept, *others] for address in batch.addresses.tolist()]
    assert len(set(addresses)) == len(addresses)
    for other in others:
        heap.batched_free(other)
    heap.address_manager.check()


@pytest.mark.parametrize("options", [{}, {"scrub": True}, {"debug": True}])
@pytest.mark.parametrize("filled", [False, True])
def test_no_byte_has_two_owners(options: dict[str, Any], filled: bool) -> None:
    source = torch.ones(4, PAGE, dtype=torch.uint8) if filled else None
    number, step = 0, 7 if filled else 1  # the copy itself has thousands of places
    while True:
        heap = heap_of(PAGES, on_full=None, **options)
        kept = [heap.batched_allocate([PAGE], torch.uint8, 2)]
        assert kept[0] is not None

        def task(heap: TensorMemoryAllocator = heap, kept: list[MemoryBatch | None] = kept) -> None:
            batch = heap.batched_allocate([PAGE], torch.uint8, 4, source=source)
            kept.append(batch)

        struck = Interrupt(number).strikes(task)
        require_one_owner(heap, kept)  # type: ignore[arg-type]
        if not struck:
            break
        number += step
    assert number > 30

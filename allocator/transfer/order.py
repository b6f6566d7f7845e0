"""What a copy comes behind: the transfers that fill either side, and those that use its target.

Every transfer is recorded on the blocks that it reads or fills, with what it does to them. So one
look at the blocks of a copy finds all that must come before it, whoever makes it: copies on other
streams, on the queue of host memory, threads of a tier, and foreign transfers. Transfers that have
ended cost O(1) each, and few are kept; blocks that no transfer ever used cost nothing.

Found are transfers whose call has returned. Calls of several threads at the same time have no
order, and neither have replays of a graph that has captured a copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvheap.blocks.rows import Rows
from kvheap.device.completion import Completion
from kvheap.device.copy_device import CopyDevice
from kvheap.transfer.work import Work

__all__ = ["Earlier", "transfers_before"]


@dataclass(frozen=True, slots=True, eq=False)
class Earlier:
    """A transfer in flight that a copy comes behind.

    Attributes:
        completion: its state.
        must_succeed: whether the copy fails if it fails: it fills the source, or is the
            ``transfer`` of a batch. Others that use the target's blocks only must have ended.
        is_of_batch: whether it is the ``transfer`` of a batch.
    """

    completion: Completion
    must_succeed: bool
    is_of_batch: bool = False

    def wait(self) -> None:
        """Wait on the host until it has ended.

        Raises:
            TransferError: it must succeed, and has failed.
        """
        self.completion.wait()
        if self.must_succeed:
            self.completion.require_success()

    def wait_stream(self, device: CopyDevice, stream: Any) -> None:
        """Make further work on a stream of a device wait for it.

        Raises:
            TransferError: it must succeed, and has failed.
        """
        if self.must_succeed:
            self.completion.require_success()
        self.completion.wait_stream(device, stream)
        if self.must_succeed:
            self.completion.require_success()

    def is_on(self, stream: Any) -> bool:
        """Whether further work on ``stream`` comes behind it without being told to."""
        return self.completion.is_on(stream)


def transfers_before(work: Work) -> list[Earlier]:
    """Transfers in flight that a copy must come behind; foreign ones are waited for here.

    No stream can be ordered behind a foreign transfer. The thread that copies within host memory
    could wait, but if it never ended, neither would any other copy.

    Raises:
        TransferError: a transfer that was to fill the source has failed, or one that was to fill
            the target is quarantined.
        RuntimeError: a foreign transfer cannot end while this thread waits for it.
    """
    found: dict[Completion, Earlier] = {}
    for rows in work.source.blocks:
        _add_filling(rows, found, is_target=False)
        for completion in rows.batch.users(rows.rows):
            if completion not in found and rows.batch.is_filled_by(completion, rows.rows):
                completion.require_success()
                found[completion] = Earlier(completion, must_succeed=True)
    for rows in work.target.blocks:
        _add_filling(rows, found, is_target=True)
        for completion in rows.batch.users(rows.rows):
            if not completion.is_quarantined:
                found.setdefault(completion, Earlier(completion, must_succeed=False))
            elif rows.batch.is_filled_by(completion, rows.rows):  # it may still write
                completion.require_success()
    if not found:
        return []
    return [each for each in found.values() if not _is_awaited_here(each)]


def _add_filling(rows: Rows, found: dict[Completion, Earlier], is_target: bool) -> None:
    """Add the transfer that fills a batch as a whole."""
    transfer = rows.batch.transfer
    if transfer is None:
        return
    has_ended = transfer.done()
    if not is_target or transfer.is_quarantined:  # it may still write
        transfer.require_success()
    if not has_ended:
        found[transfer.completion] = Earlier(transfer.completion, True, is_of_batch=True)


def _is_awaited_here(earlier: Earlier) -> bool:
    """Wait for a foreign transfer; False for one of ours."""
    if not earlier.completion.is_foreign:
        return False
    earlier.wait()
    return True

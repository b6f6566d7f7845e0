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
from typing import Any, Protocol

from kvheap.device.completion import Completion
from kvheap.device.copy_device import CopyDevice
from kvheap.device.transfer import Transfer
from kvheap.transfer.work import Work

__all__ = ["Earlier", "transfers_before"]


class Earlier(Protocol):
    """A transfer in flight that a copy comes behind."""

    @property
    def is_foreign(self) -> bool:
        """Whether others make it, so that it may never end."""
        ...

    def is_on(self, stream: Any) -> bool:
        """Whether further work on ``stream`` comes behind it without being told to."""
        ...

    def wait(self) -> None:
        """Wait until it has ended, on the thread that copies within host memory, or for others.

        Raises:
            TransferError: it has failed, and the copy must fail too.
        """
        ...

    def wait_stream(self, device: CopyDevice, stream: Any) -> None:
        """Make further work on a stream of a device wait for it.

        Raises:
            TransferError: it has failed, and the copy must fail too.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class OfBatch:
    """The ``transfer`` of a batch, which fills it: the copy fails if it fails."""

    transfer: Transfer

    @property
    def is_foreign(self) -> bool:
        """See ``Earlier``."""
        return self.transfer.direction == "foreign"

    def is_on(self, stream: Any) -> bool:
        """See ``Earlier``: a graph must not be replayed before it has ended, on any stream."""
        return False

    def wait(self) -> None:
        """See ``Earlier``."""
        self.transfer.result()

    def wait_stream(self, device: CopyDevice, stream: Any) -> None:
        """See ``Earlier``."""
        self.transfer.wait_stream(stream)


@dataclass(frozen=True, slots=True, eq=False)
class OfBlocks:
    """Another transfer that uses blocks of the copy.

    Attributes:
        completion: its state.
        must_succeed: whether the copy fails if it fails, as it fills the source.
    """

    completion: Completion
    must_succeed: bool

    @property
    def is_foreign(self) -> bool:
        """See ``Earlier``."""
        return self.completion.is_foreign

    def is_on(self, stream: Any) -> bool:
        """See ``Earlier``."""
        return self.completion.is_on(stream)

    def wait(self) -> None:
        """See ``Earlier``. For the queue of host memory, whose jobs come in order by themselves."""
        if not self.completion.is_in_host_queue:
            self.completion.wait()
        if self.must_succeed:
            self.completion.require_success()

    def wait_stream(self, device: CopyDevice, stream: Any) -> None:
        """See ``Earlier``."""
        self.completion.wait_stream(device, stream)
        if self.must_succeed:
            self.completion.require_success()


def transfers_before(work: Work) -> list[Earlier]:
    """Transfers in flight that a copy must come behind; foreign ones are waited for here.

    No stream can be ordered behind a foreign transfer. The thread that copies within host memory
    could wait, but if it never ended, neither would any other copy.

    Raises:
        TransferError: a transfer that was to fill the source has failed, or one that was to fill
            the target is quarantined.
        RuntimeError: a foreign transfer cannot end while this thread waits for it.
    """
    filling: dict[int, Transfer] = {}
    using: dict[Completion, bool] = {}
    for rows in work.source.blocks:
        if rows.batch.transfer is not None:
            _add_filling(rows.batch.transfer, filling, is_target=False)
        for completion in rows.fillers():
            completion.require_success()
            using[completion] = True
    for rows in work.target.blocks:
        if rows.batch.transfer is not None:
            _add_filling(rows.batch.transfer, filling, is_target=True)
        for completion in rows.users():
            if not completion.is_quarantined:
                using.setdefault(completion, False)
            elif rows.are_filled_by(completion):  # it may still write
                completion.require_success()
    if not filling and not using:
        return []
    found: list[Earlier] = [OfBatch(transfer) for transfer in filling.values()]
    for completion, must_succeed in using.items():
        if not any(transfer.is_of(completion) for transfer in filling.values()):
            found.append(OfBlocks(completion, must_succeed))
    return [each for each in found if not _is_awaited_here(each)]


def _add_filling(transfer: Transfer, filling: dict[int, Transfer], is_target: bool) -> None:
    """Add the transfer that fills a batch as a whole, unless it has ended."""
    has_ended = transfer.done()
    if not is_target or transfer.is_quarantined:  # it may still write
        transfer.require_success()
    if not has_ended:
        filling[id(transfer)] = transfer


def _is_awaited_here(earlier: Earlier) -> bool:
    """Wait for a foreign transfer; False for one of ours."""
    if not earlier.is_foreign:
        return False
    earlier.wait()
    return True

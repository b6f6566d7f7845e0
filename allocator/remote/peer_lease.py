"""``PeerLease``: chunks that a peer keeps for this node, so that reading them asks nobody."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from kvheap.addresses.block_runs import BlockRuns
from kvheap.blocks.block_layout import BlockLayout
from kvheap.errors import ClosedError, LifetimeError
from kvheap.remote.deadlines import Deadline
from kvheap.remote.errors import StaleReadError
from kvheap.remote.pairs import span_of

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Hold", "PeerLease"]

State: TypeAlias = Literal["held", "released", "expired"]


class Hold:
    """A lease as the reader knows it: it is given back when nobody reads by it any more.

    No lock is held here: a lease may be dropped in a finalizer, in the middle of any of this.

    Args:
        link: what the reader knows of the peer; only compared.
        user: who takes it; only compared.
        peer: the peer's name.
        number: of the lease there.
        until: when it is over, counted from before it was asked for.
        runs: where the blocks are there.
        layout: what they hold.
        give_back: tells the peer; must return at once, also in a finalizer. Called again if it was
            interrupted.
    """

    __slots__ = (
        "_give_back",
        "_is_told",
        "_pid",
        "_reads",
        "is_back",
        "is_released",
        "known",
        "layout",
        "link",
        "number",
        "peer",
        "runs",
        "span",
        "until",
        "user",
    )

    def __init__(
        self,
        link: object,
        user: object,
        peer: str,
        number: int,
        until: Deadline,
        runs: BlockRuns,
        layout: BlockLayout,
        give_back: Callable[[Hold], None],
    ) -> None:
        self.link = link
        self.user = user
        self.peer = peer
        self.number = number
        self.until = until
        self.runs = runs
        self.span = span_of(runs)
        """Address and bytes of the blocks there, if they are one run without padding."""
        self.layout = layout
        self.known: dict[tuple[int, int], Any] = {}
        """What NIXL has been told of these runs there, for the next read."""
        self.is_released = False
        self._reads: dict[object, None] = {}
        self._give_back = give_back
        self._pid = os.getpid()
        self._is_told = False
        self.is_back = False
        """Whether ``give_back`` was carried out; set by whoever does."""

    def begin(self, read: object, now: float) -> None:
        """Keep the lease until ``read``, which begins now, has ended.

        Raises:
            LifetimeError: it was released.
            StaleReadError: it has expired.
        """
        self._reads[read] = None  # before the look: a release that comes later waits for it
        if self.is_released:
            self.end(read)
            raise LifetimeError(
                f"the lease on blocks of peer {self.peer!r} was released: lease them again"
            )
        if now >= self.until.at:
            self.end(read)
            raise StaleReadError(
                f"the lease of {self.until.seconds:g} s on blocks of peer {self.peer!r} has "
                f"expired: lease them again"
            )

    @property
    def is_own(self) -> bool:
        """Whether this process has taken it, and not the one that it was forked from."""
        return os.getpid() == self._pid

    def require_own(self) -> None:
        """Raise in a forked child: the lease is its parent's.

        Raises:
            ClosedError: names the parent.
        """
        if not self.is_own:
            raise ClosedError(
                f"the lease on blocks of peer {self.peer!r} belongs to process {self._pid}: a "
                f"forked child can neither use nor release it"
            )

    def end(self, read: object) -> None:
        """Note that a read has ended; may be repeated."""
        self._reads.pop(read, None)
        if self.is_released:
            self._settle()

    def release(self) -> None:
        """Give the lease back, once no read needs it; may be repeated."""
        self.is_released = True
        self._settle()

    def _settle(self) -> None:
        if not self._reads and not self._is_told:
            self._give_back(self)
            self._is_told = True  # last: an exception may strike before, and this is repeated then


class PeerLease:
    """Chunks that a peer keeps for this node until they are released. Made by ``Peer.lease``.

    The chunks are neither freed nor evicted there, and ``Peer.read(lease, into)`` reads them
    without asking, any number of times. Usable as a context manager. A lease that is dropped is
    released. Reads that have begun keep it until they have ended, whatever happens to the lease.

    In a forked child it stays the parent's: ``state``, ``left_s`` and ``release`` raise
    ``ClosedError`` there, and leaving ``with`` or dropping it does nothing.

    Attributes:
        found: which of the chunks that were asked for are held, bool ``[N]``.
        keys: the keys of those, in the order in which they are read.
    """

    __slots__ = ("__weakref__", "found", "hold", "keys")

    def __init__(
        self, found: npt.NDArray[np.bool_], keys: Sequence[bytes], hold: Hold | None
    ) -> None:
        self.found = found
        self.keys = tuple(keys)
        self.hold = hold
        """What the reader knows of it; None if it holds nothing."""

    @property
    def state(self) -> State:
        """``held``, ``released`` or ``expired``; ``released`` also if nothing was found.

        Raises:
            ClosedError: the lease belongs to another process.
        """
        hold = self.hold
        if hold is None:
            return "released"
        hold.require_own()
        if hold.is_released:
            return "released"
        return "expired" if hold.until.has_passed else "held"

    @property
    def left_s(self) -> float:
        """Seconds for which it holds; 0 if it does not hold any more.

        On this machine's clock, counted from before the peer was asked: the peer holds the blocks
        for longer.

        Raises:
            ClosedError: the lease belongs to another process.
        """
        hold = self.hold
        return hold.until.left_s if hold is not None and self.state != "released" else 0.0

    def release(self) -> bool:
        """Let the peer have its blocks back; False if the lease had ended.

        Returns at once, and may be called anywhere, also in a finalizer. Reads that have begun
        keep the blocks until they have ended.

        Raises:
            ClosedError: the lease belongs to another process; nothing was released.
        """
        was_held = self.state == "held"
        if self.hold is not None:
            self.hold.release()
        return was_held

    def __len__(self) -> int:
        """How many chunks are held, or were."""
        return len(self.keys)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.hold is not None and self.hold.is_own:
            self.release()

    def __del__(self) -> None:
        hold = getattr(self, "hold", None)  # the constructor may have been interrupted
        if hold is not None and hold.is_own:
            hold.release()  # if an exception strikes here, the reader does it

    def __reduce__(self) -> NoReturn:
        """A copy that is dropped would release the lease of all."""
        raise TypeError(
            f"{self!r} cannot be copied or sent elsewhere: it is one right to read, of this process"
        )

    def __repr__(self) -> str:
        """State, chunks, and who has them."""
        hold = self.hold
        who = "" if hold is None else f" of peer {hold.peer!r}"
        state = self.state if hold is None or hold.is_own else "another process's"
        return f"PeerLease({state}, {len(self)} of {len(self.found)} chunks{who})"

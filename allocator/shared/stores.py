"""``SharedStore``: places that the owner has given to this process, to fill them with chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from kvheap.addresses.arguments import require_count
from kvheap.blocks.memory_batch import MemoryBatch
from kvheap.errors import LifetimeError
from kvheap.shared.channels import Channel, Link
from kvheap.shared.errors import NoOwnerError
from kvheap.shared.keeper import FULL, READY, Filled, Ticket
from kvheap.shared.leases import Leases
from kvheap.shared.tokens import Token

if TYPE_CHECKING:
    from typing import Self

__all__ = ["SharedStore", "as_tokens"]

TOKENS_BITS, DIGEST_BITS = 32, 64
"""Of the fields of a record."""


class SharedStore:
    """Chunks that this process fills. Made by ``SharedHeap.begin``.

    Nobody finds them before :meth:`complete`. A process that dies before leaves nothing behind. A
    context manager, whose end gives up what was not completed.

    Attributes:
        keys: those to fill: not the ones that are there, are being stored or have no room.
        rows: for each of them, its number among the keys that were asked for.
        state: ``open``, ``ready`` or ``aborted``.
    """

    def __init__(
        self,
        channel: Channel,
        leases: Leases,
        token: Token,
        keys: Sequence[bytes],
        ticket: Ticket,
        link: Link,
        batch_of: Callable[[Sequence[int]], MemoryBatch],
        digests_of: Callable[[Sequence[bytes], Sequence[int]], list[int]],
    ) -> None:
        self._channel = channel
        self._leases = leases
        self._ticket = ticket
        self._link = link
        self._token = token  # of the store
        self._locked: Token | None = None  # of its places
        self.rows = [row for row, place in enumerate(ticket.places) if place >= 0]
        self.keys = [keys[row] for row in self.rows]
        self.state: Literal["open", "ready", "aborted"] = "open"
        self._batch_of = batch_of
        self._made: list[MemoryBatch] = []  # the batch, once it was asked for
        self._digests_of = digests_of

    @property
    def batch(self) -> MemoryBatch:
        """The blocks to fill, block ``i`` for ``keys[i]``, with undefined contents."""
        if not self._made:
            self._made.append(self._batch_of(self.places))
        return self._made[0]

    @property
    def places(self) -> list[int]:
        """The places to fill, for the heap."""
        return [self._ticket.places[row] for row in self.rows]

    @property
    def were_ready(self) -> npt.NDArray[np.bool_]:
        """Which of the keys that were asked for had a chunk already, bool ``[N]``."""
        places = self._ticket.places
        return np.fromiter((place == READY for place in places), np.bool_, len(places))

    @property
    def num_refused(self) -> int:
        """For how many keys there was no room."""
        return self._ticket.places.count(FULL)

    def lock(self, epoch: Callable[[], int]) -> bool:
        """Lock the places, for the heap; only then may they be filled.

        Returns:
            Whether they are locked. If not, the store is aborted: a process that an earlier owner
            had given one of them has just locked it, and will find that it is not its own any more.

        Raises:
            NoOwnerError: they may be another owner's by now; the store is aborted.
        """
        made = self._made

        def has_ended() -> bool:
            return not made or made[0].transfer is None or made[0].transfer.done()

        self._locked = Token()
        is_locked = self._leases.fill(self._locked, self.places, has_ended)
        link = self._link
        if not link.is_open or epoch() != link.epoch:
            self.abort()
            raise NoOwnerError("the owner of the heap has gone meanwhile: begin the store again")
        if not is_locked:
            self.abort()
        return is_locked

    def complete(
        self, num_tokens: Sequence[int] | None = None, digests: Sequence[int] | None = None
    ) -> int:
        """Let everybody find the chunks. A second call changes nothing.

        Their bytes must be there, or be on their way by ``batch.transfer``, which is waited for.

        Args:
            num_tokens: how many tokens each of ``keys`` holds; None: it is not known.
            digests: their checksums, if the caller has them.

        Returns:
            How many are ready; those that were removed meanwhile are not.

        Raises:
            LifetimeError: the store was aborted.
            TransferError: the transfer has failed; nothing is stored.
            NoOwnerError: the owner has gone; nothing is stored.
            TimeoutError: the owner does not answer; nothing is stored, unless it goes on.
            TypeError, ValueError: an argument is wrong; the message names it, and the store stays
                open.
        """
        if self.state != "open":
            if self.state == "aborted":
                raise LifetimeError(f"{self!r} cannot be completed")
            return 0
        tokens = as_tokens(num_tokens, len(self.keys))
        if digests is not None:
            sums = _as_counts("digests", digests, len(self.keys), DIGEST_BITS)
        try:
            if self._made and (transfer := self._made[0].transfer) is not None:
                transfer.result()
            if digests is None:
                sums = self._digests_of(self.keys, self.places)
            filled = [Filled(*each) for each in zip(self.places, sums, tokens, strict=True)]
            num_ready = self._channel.publish(self._token, self._link, self._ticket.number, filled)
        except BaseException:
            self.abort()
            raise
        self._end("ready")
        return num_ready

    def abort(self) -> None:
        """Give the places back. On a store that has ended it changes nothing.

        They are used again once ``batch.transfer`` has ended, if there is one.
        """
        if self.state == "open":
            self._channel.abort(self._token)
            self._end("aborted")

    def _end(self, state: Literal["ready", "aborted"]) -> None:
        self.state = state
        self._unlock()

    def _unlock(self) -> None:
        """May be repeated; the token goes last, so that it is not lost."""
        if self._locked is not None:
            self._leases.end(self._locked)
            self._locked = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()

    def __del__(self) -> None:
        if getattr(self, "state", "ready") == "open":
            self.abort()
        elif getattr(self, "_locked", None) is not None:  # a signal handler has raised in its end
            self._unlock()

    def __repr__(self) -> str:
        """How many chunks, and the state."""
        return f"SharedStore({len(self.keys)} chunks, {self.state})"


def as_tokens(num_tokens: Any, num_keys: int) -> list[int]:
    """How many tokens each chunk holds; 0: not known.

    Raises:
        TypeError, ValueError: they are no such numbers, or not one for each key.
    """
    if num_tokens is None:
        return [0] * num_keys
    return _as_counts("num_tokens", num_tokens, num_keys, TOKENS_BITS)


def _as_counts(name: str, values: Any, num_keys: int, bits: int) -> list[int]:
    found = [require_count(name, each) for each in values]
    if len(found) != num_keys or (found and max(found) >= 1 << bits):
        raise ValueError(f"{name} must be {num_keys} numbers below 2**{bits}, got {values!r}")
    return found

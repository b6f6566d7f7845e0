"""``Peer``: another node, whose chunks this one reads."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from kvheap.addresses.arguments import as_number
from kvheap.addresses.block_runs import MemorySegment
from kvheap.blocks.block_layout import BlockLayout
from kvheap.blocks.heap import Heap
from kvheap.blocks.memory_batch import MemoryBatch
from kvheap.closing import Closer
from kvheap.errors import ClosedError
from kvheap.prefix.keys import require_key_list, require_keys
from kvheap.remote.ask import AskLine
from kvheap.remote.deadlines import Deadline, now_s
from kvheap.remote.errors import PeerError, ProtocolError
from kvheap.remote.link import Link
from kvheap.remote.messages import Fields, KeyList, as_keys, key_fields, new_lease_number
from kvheap.remote.pairs import parts_of, parts_of_span
from kvheap.remote.peer_lease import Hold, PeerLease
from kvheap.remote.reader import Reader
from kvheap.remote.reads import Read
from kvheap.transfer.foreign import fill_batch

__all__ = ["ANSWER_S", "READ_S", "Peer"]

ANSWER_S = 5.0
"""Seconds to wait for an answer."""

READ_S = 30.0
"""Seconds to wait for the bytes of a read."""

LEASE_S = 30.0
"""Seconds for which chunks are leased."""


class _Wanted:
    """A lease that is asked for, by its number.

    If no answer comes, or none that can be read, or a signal handler's exception strikes before it
    was, the lease is given back: its blocks would stay where they are for its ``ttl_s`` otherwise.
    """

    def __init__(self, reader: Reader, link: Link) -> None:
        self._reader = reader
        self._link = link
        self._number = new_lease_number()

    def fields(self) -> dict[str, Any]:
        """What the request says of it."""
        return {"lease": self._number}

    def again(self) -> dict[str, Any]:
        """Ask for another one, instead of one that was perhaps given on a broken connection."""
        self.give_up()
        self._number = new_lease_number()
        return self.fields()

    def give_up(self) -> None:
        """Give it back, should it have been given or still be."""
        self._reader.give_up(self._link, self._number)


class Peer:
    """Another node, whose chunks this one reads. Made by ``Node.connect``.

    All methods may be called by any thread. A peer that is gone stays so: connect again to reach
    its successor.

    Attributes:
        name: the other node's name.
        address: where it listens.
        uuid: of this life of it: a node that is started again has another one.
    """

    def __init__(
        self,
        heap: Heap,
        reader: Reader,
        link: Link,
        ask: AskLine,
        address: str,
        own_address: str,
        own_name: str,
        segments: Sequence[MemorySegment],
        closer: Closer,
    ) -> None:
        self.name = link.welcome.name
        self.address = address
        self.uuid = link.welcome.uuid
        self._heap = heap
        self._reader = reader
        self._link = link
        self._ask = ask
        self._own_address = own_address
        self._own_name = own_name
        self._segments = segments
        self._is_closed = False
        self._path = f"NIXL from {self.name!r}"
        self._closer = closer
        self._layout = link.welcome.layout

    @property
    def link(self) -> Link:
        """What the reader knows of it."""
        return self._link

    @property
    def is_gone(self) -> bool:
        """Whether it is known that the peer's process has ended, or that its node was closed."""
        return self._link.gone is not None

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._is_closed

    def lookup(self, keys: Iterable[bytes], timeout_s: float = ANSWER_S) -> npt.NDArray[np.bool_]:
        """Which chunks the peer has; some may be evicted before they are read.

        Args:
            keys: bytes, 1 to 511 each, at most 65,536.
            timeout_s: seconds to wait for the answer.

        Returns:
            bool ``[N]``.

        Raises:
            TypeError, ValueError: an argument is wrong; the message names it.
            PeerTimeoutError: the peer has not answered in time.
            PeerGoneError: it is gone; others as ``ConnectionError``: it cannot be reached.
            PeerError: it could not look up the keys; the message says why.
            ClosedError: the node or the peer is closed, or belongs to another process.
        """
        require_keys(keys)
        found = as_keys(keys)
        answer = self._answer("lookup", timeout_s, **key_fields(found))
        layout = answer.layout()
        if layout is not None:
            self._layout = layout
        flags = np.frombuffer(answer.data("found", len(found)), np.uint8)
        return np.equal(flags, 1)

    def lease(
        self, keys: Iterable[bytes], ttl_s: float = LEASE_S, timeout_s: float = ANSWER_S
    ) -> PeerLease:
        """Look chunks up, and let the peer keep those that it has: as :meth:`lookup`, for reads.

        :meth:`read` then takes the lease instead of keys, and asks the peer nothing: it costs what
        NIXL costs. As long as the lease holds, the peer's blocks are neither freed nor evicted, so
        release it soon.

        Args:
            keys: bytes, 1 to 511 each, at least one and at most 65,536. A key may be named twice.
            ttl_s: seconds for which the lease holds unless it is released; the peer gives 60 s at
                most.
            timeout_s: seconds to wait for the answer.

        Returns:
            The lease: ``found``, bool ``[N]``; ``keys`` of the chunks that are held, ``left_s``,
            ``state``, ``release()``. It holds nothing if nothing was found.

        Raises:
            PeerError: the peer could not look up the keys, the chunks have several layouts, or this
                node holds too many leases there; the message says which.
            ClosedError: the node or the peer is closed, or belongs to another process.
            Others as :meth:`lookup`.
        """
        require_keys(keys)
        names = as_keys(keys)
        if not names:
            raise ValueError("keys must name at least one chunk, got none")
        ttl_s = as_number("ttl_s", ttl_s, positive=True)
        self._require_open()
        wanted = _Wanted(self._reader, self._link)
        try:
            return self._lease(names, float(ttl_s), timeout_s, wanted)
        except PeerError:  # it has answered that it gives none
            raise
        except BaseException:  # it may have given one
            wanted.give_up()
            raise

    def _lease(self, names: KeyList, ttl_s: float, timeout_s: float, wanted: _Wanted) -> PeerLease:
        asked_at = now_s()  # the lease is over here before it is over there
        answer = self._answer(
            "lease", timeout_s, wanted.again, ttl=ttl_s, **wanted.fields(), **key_fields(names)
        )
        found = np.equal(np.frombuffer(answer.data("found", len(names)), np.uint8), 1)
        num_found = int(np.count_nonzero(found))
        hold = self._hold_of(answer, num_found, asked_at) if num_found else None
        held = names if num_found == len(names) else [names[row] for row in np.flatnonzero(found)]
        lease = PeerLease(found, held, hold)
        if hold is not None:
            self._link.holds[hold] = weakref.ref(lease)
            self._require_open()  # else it is dropped; whoever closes later releases it
        return lease

    def _require_open(self) -> None:
        self._closer.require_open()
        if self._is_closed:
            raise ClosedError(f"{self!r} was closed: connect again")

    def _hold_of(self, answer: Fields, num_found: int, asked_at: float) -> Hold:
        layout, runs = answer.layout(), answer.runs()
        if layout is None or len(runs) != num_found:
            raise ProtocolError(
                f"peer {self.name!r} has found {num_found} chunks, and leased {len(runs)} blocks "
                f"of {layout}"
            )
        if runs.size_bytes != layout.size_bytes:
            raise ProtocolError(
                f"peer {self.name!r} has leased blocks of {runs.size_bytes} bytes with {layout}"
            )
        if layout == self._layout:
            layout = self._layout
        self._layout = layout
        return Hold(
            self._link,
            self._ask,
            self.name,
            answer.integer("lease"),
            Deadline(answer.seconds("ttl"), asked_at),
            runs,
            layout,
            partial(self._reader.give_back, self._link),
        )

    def read(
        self,
        keys: Sequence[bytes] | PeerLease,
        into: Heap | MemoryBatch,
        timeout_s: float = READ_S,
    ) -> MemoryBatch | None:
        """Begin to read chunks into blocks of this node's heap; returns at once.

        All chunks are read, or none. By keys, the peer is asked for a lease of ``timeout_s`` (at
        most 60 s) on its blocks, so that they are not reused meanwhile; a lease that was taken
        before saves the question. The blocks to fill are protected as those of a copy are: they may
        be freed and dropped at any time. Neither an error nor the end of ``timeout_s`` ends a read
        that has begun: its blocks stay allocated, as ``stats().pending_bytes`` once they are freed,
        until NIXL says that it is done, or the peer is known to be gone.

        Args:
            keys: bytes, 1 to 511 each, at least one and at most 65,536. A key may be named twice.
                Or a lease of this peer: all chunks that it holds are read, in the order of its
                ``keys``. It may be read several times, and released or dropped meanwhile.
            into: the node's heap, which allocates a batch; or a batch of it, of the peer's layout,
                with as many blocks as there are keys.
            timeout_s: seconds until ``transfer.result()`` raises at the latest.

        Returns:
            The batch; None if the heap has no room. Its ``transfer`` tells how the read ends, and
            whatever reads the blocks waits for it. ``transfer.result()`` raises ``TransferError``,
            whose ``__cause__`` is a ``MissingKeysError`` that names the keys that the peer does not
            have (any more), a ``PeerGoneError``, ``PeerTimeoutError``, ``StaleReadError`` or
            ``PeerError``.

        Raises:
            TypeError, ValueError: an argument is wrong; the message names it. Nothing has begun.
            PeerGoneError: the peer is gone; nothing has begun.
            StaleReadError: the lease has expired; nothing has begun.
            RuntimeError: a transfer fills or reads the batch; nothing has begun.
            LifetimeError, ClosedError: the lease was released, a block is freed, or the heap, the
                node or the peer is closed.
            Others as :meth:`lookup`: the peer had to be asked for the layout of its blocks.
        """
        closer = self._closer
        if closer.is_closing or closer.is_foreign:
            closer.require_open()
        if type(timeout_s) is not float or not 0.0 < timeout_s < math.inf:
            timeout_s = as_number("timeout_s", timeout_s, positive=True)
        if isinstance(keys, PeerLease):
            hold = keys.hold
            if hold is None or hold.link is not self._link:
                raise self._refused(keys)
            names: Sequence[bytes] = keys.keys
        else:
            require_key_list(keys)
            names, hold = as_keys(keys), None
            if not names:
                raise ValueError("keys must name at least one chunk, got none")
            self._require_open()
        if self._link.gone is not None:
            raise self._link.gone.with_traceback(None)
        layout = self._layout if hold is None else hold.layout
        if isinstance(into, MemoryBatch):
            self._check(into, len(names), layout)
            if hold is not None:
                hold.layout = into.layout  # equal, and the next comparison is one of identities
            return self._read(names, into, timeout_s, hold)
        if into is not self._heap:
            raise ValueError(
                f"into must be the node's heap {self._heap!r}, or a batch of it, got {into!r}"
            )
        layout = layout or self._asked_layout(names, timeout_s)
        batch = into.batched_allocate(
            list(layout.shapes), list(layout.dtypes), len(names), layout.fmt
        )
        if batch is None:
            return None
        try:
            return self._read(names, batch, timeout_s, hold)
        except BaseException:
            into.batched_free(batch)
            raise

    def _refused(self, lease: PeerLease) -> ValueError:
        """Why a lease cannot be read from this peer."""
        if lease.hold is None:
            return ValueError(f"{lease!r} holds no chunks: none of them was found")
        return ValueError(f"keys must be a lease of {self!r}, got {lease!r}")

    def _check(self, batch: MemoryBatch, num_keys: int, layout: BlockLayout | None) -> None:
        if batch.allocator is not self._heap:
            raise ValueError(f"into must be of the node's heap {self._heap!r}, got {batch!r}")
        if self._heap.closed:
            self._heap.require_open()
        if batch.runs.num_blocks != num_keys:
            raise ValueError(f"{num_keys} keys need as many blocks, got {len(batch)} in into")
        own = batch.layout
        if layout is not None and layout is not own and layout != own:
            raise ValueError(
                f"into must have blocks of {layout}, as peer {self.name!r} has, got {own}"
            )

    def _asked_layout(self, keys: Sequence[bytes], timeout_s: float) -> BlockLayout:
        self.lookup(keys[:1], min(timeout_s, ANSWER_S))
        if self._layout is None:
            raise PeerError(
                f"peer {self.name!r} has no chunk yet, so the layout of its blocks is not known"
            )
        return self._layout

    def _read(
        self, keys: Sequence[bytes], batch: MemoryBatch, timeout_s: float, hold: Hold | None
    ) -> MemoryBatch:
        layout, blocks = batch.layout, batch.runs
        num_bytes = blocks.num_blocks * layout.size_bytes
        if hold is None:
            read = Read(keys, layout, num_bytes, timeout_s, batch.block_runs())
        else:
            parts = parts_of_span(hold.span, blocks, num_bytes, self._segments)
            if parts is None:
                parts = parts_of(hold.runs, batch.block_runs())
            read = Read(keys, layout, num_bytes, timeout_s, None, hold, parts)
        before, closer = batch.transfer, self._closer
        try:
            self._reader.enter(read)
            if closer.is_closing or closer.is_foreign:  # after that, whoever closes it waits
                closer.require_open()
            if hold is not None:
                hold.begin(read, read.begun_at)
            fill_batch(read.event, batch, self._path)  # NIXL has the heap's buffers
            if hold is None:
                self._reader.begin(self._link, read)
            else:
                self._reader.begin_held(self._link, read)
        except BaseException:
            if read.withdraw():
                batch.transfer = before
                self._reader.forget(read)
            raise
        finally:
            read.caller = None
        return batch

    def offer(self, keys: Iterable[bytes], timeout_s: float = ANSWER_S) -> bool:
        """Ask the peer to read chunks of this node; it finds the offer by ``Node.next_offer``.

        Returns:
            Whether the peer has taken note; False if too many offers wait there.

        Raises:
            As :meth:`lookup`.
        """
        require_keys(keys)
        answer = self._answer(
            "offer", timeout_s, keys=as_keys(keys), name=self._own_name, address=self._own_address
        )
        return bool(answer.integer("taken"))

    def _answer(
        self,
        kind: str,
        timeout_s: float,
        again: Callable[[], dict[str, Any]] = dict,
        **fields: Any,
    ) -> Fields:
        self._require_open()
        timeout_s = as_number("timeout_s", timeout_s, positive=True)
        if self._link.gone is not None:
            raise self._link.gone.with_traceback(None)
        try:
            return self._ask.ask(kind, timeout_s, again, **fields)
        finally:
            if self._is_closed:  # meanwhile: it may have made a new connection
                self._ask.close()

    def assume_gone(self) -> None:
        """Say that the peer's machine is off, or cut off for good: that nothing arrives from it.

        A machine that vanished cannot tell. Until it is known to be gone, the blocks of reads that
        were in flight stay allocated. If you are wrong, those blocks may be overwritten while
        others have them.

        Its reads end within half a second, and until then ``Node.connect`` raises
        ``PeerGoneError``. If it turns out to live, connecting to it again gives back the leases
        that this node had there.
        """
        self._closer.require_open()
        self._reader.assume_gone(self._link)

    def close(self) -> None:
        """Close the connections, and release the leases. Reads in flight go on. May be repeated."""
        self._is_closed = True
        for hold in [*self._link.holds]:
            if hold.user is self._ask:
                hold.release()
        self._ask.close()
        self._reader.drop(self._link, self._ask)

    def hang_up(self) -> None:
        """Close the connection for questions, to a peer that is gone."""
        self._ask.close()

    def __repr__(self) -> str:
        """Name, address and whether it is gone."""
        return f"Peer({self.name!r} at {self.address}{', gone' if self.is_gone else ''})"

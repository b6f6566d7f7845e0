"""``Node``: a heap whose chunks other machines read, and that reads theirs.

>>> import torch
>>> from kvheap import HostMemoryAllocator
>>> from kvheap.remote import Node
>>> here, there = HostMemoryAllocator(1 << 20), HostMemoryAllocator(1 << 20)
>>> kv = torch.randn(2, 1024)
>>> batch = there.batched_allocate(kv.shape[1:], kv.dtype, 2, source=kv)
>>> with Node("decode", here) as decode, Node("prefill", there) as prefill:
...     prefill.publish([b"a", b"b"], batch)
...     peer = decode.connect(prefill.address)
...     print(peer.lookup([b"a", b"x"]))
...     print(torch.equal(peer.read([b"b"], into=here)[0].tensor, kv[1]))
[ True False]
True
"""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kvheap.addresses.arguments import as_number, as_seconds, require_function
from kvheap.blocks.heap import BlockObjects, Heap, layout_and_addresses
from kvheap.closing import Closer, never_opened
from kvheap.device.host_queue import NestedWaitError
from kvheap.forks import starts_over_after_fork
from kvheap.interrupts import is_interrupt
from kvheap.prefix.keys import require_key_list, require_keys
from kvheap.remote.agent import Agent
from kvheap.remote.ask import AskLine
from kvheap.remote.catalogue import Catalogue, Lookup
from kvheap.remote.endpoints import as_secret, endpoint_of, require_secret
from kvheap.remote.errors import PeerError, PeerGoneError, PeerTimeoutError
from kvheap.remote.handshake import Welcome, call, channel_key
from kvheap.remote.leases import LentBlocks
from kvheap.remote.line import Line
from kvheap.remote.link import Link
from kvheap.remote.messages import as_keys, layout_fields, packed
from kvheap.remote.node_stats import NodeStats
from kvheap.remote.offers import Offer, Offers
from kvheap.remote.packages import need_msgpack, need_nixl
from kvheap.remote.peer import ANSWER_S, Peer
from kvheap.remote.reader import Reader
from kvheap.remote.server import Server
from kvheap.remote.service import Service

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Node"]

MAX_NAME = 200
BACKLOG = 64
CLOSE_POLL_S = 2e-3
OFFER_POLL_S = 0.1

EXIT_S = 1.0
"""Seconds that the end of a program waits for the reads of a node that was not closed."""


class Node:
    """A heap whose chunks other machines read by key, and that reads theirs into it.

    Bytes are moved by NIXL (UCX: shared memory, TCP, RDMA), always by the reader. A control channel
    over TCP says which keys there are and where their blocks are, and leases them.

    =============  ==================================================================
    purpose        methods
    =============  ==================================================================
    be read        ``publish``, ``withdraw``, or ``lookup``; ``next_offer``
    read           ``connect``, then the ``Peer``'s ``lookup`` or ``lease``, and ``read``
    watch          ``address``, ``stats``
    end            ``close``
    =============  ==================================================================

    While a reader has a lease, the blocks cannot be freed, and closing the heap waits for it. The
    node keeps the heap's memory mapped until it is closed, whatever happens to the heap: reading
    unmapped memory would end this process. A buffer that joins the heap later is not known to it.

    All methods may be called by any thread. A forked child cannot use the node.

    Args:
        name: of this node, for the messages of others.
        heap: holds the chunks, of host or GPU memory.
        lookup: finds blocks by key: gets a list of keys that were not published, and returns a list
            with a ``MemoryObj`` of ``heap`` or None for each. Called on the thread that serves,
            while other requests wait: it should return soon. A ``PrefixStore`` of one scheduler
            needs a lock of yours there and in the scheduler.
        bind: where to listen, ``host:port``; port 0 takes a free one.
        secret: proves to other nodes who this is; the same for all. Needed off loopback. NIXL's
            own connections are not protected: use a network that you trust.

    Raises:
        ImportError: nixl or msgpack is not installed; the message has the command.
        TypeError, ValueError: an argument is wrong; the message names it.
        ForeignProcessError: the heap is a view, or another process's.
        ClosedError: the heap is closed.
        OSError: the address cannot be bound, or too few file descriptors are left.
        RuntimeError: NIXL cannot be started, or refuses the memory.
    """

    def __init__(
        self,
        name: str,
        heap: Heap,
        lookup: Lookup | None = None,
        bind: str = "127.0.0.1:0",
        secret: bytes | str | None = None,
    ) -> None:
        if not isinstance(name, str):
            raise TypeError(f"name must be a text, got {name!r}")
        if not 0 < len(name) <= MAX_NAME:
            raise ValueError(f"name must have 1 to {MAX_NAME} characters, got {name!r:.250}")
        if not name.isprintable():
            raise ValueError(f"name must be printable, got {name!r}")
        if not isinstance(heap, Heap):
            raise TypeError(f"heap must be a heap such as a HostMemoryAllocator, got {heap!r}")
        require_function("lookup", lookup)
        host, port = endpoint_of("bind", bind)
        found_secret = as_secret(secret)
        require_secret("bind", host, found_secret)
        need_msgpack()
        need_nixl()
        heap.require_open()
        heap.require_owner("serve blocks to other machines")
        self.name = name
        self.heap = heap
        self.uuid = uuid.uuid4().hex
        """Of this life of the node."""
        self._secret = found_secret
        self._key = channel_key(found_secret)
        self._peers: dict[str, Peer] = {}
        self._catalogue = Catalogue(heap, lookup)
        self._lent = LentBlocks(heap)
        self._offers = Offers()
        self._service = Service(name, self._catalogue, self._lent, self._offers)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
        try:
            where, number = listener.getsockname()[:2]
            self.address = f"[{where}]:{number}" if ":" in where else f"{where}:{number}"
            """Where it listens; others pass it to ``connect``."""
            segments = heap.segments
            self._segments = heap.memory_segments()
            agent = Agent(name, segments)
            self._agent_name, self._metadata = agent.name, agent.metadata
            self._device = segments[0][1].device
            self._reader = Reader(agent, self._key, name)
            self._server = Server(listener, self._key, self._welcome, self._service, name)
        except BaseException:
            listener.close()
            raise
        try:
            self._server.start()
            self._reader.start()
            self._closer = Closer(self, exit_s=EXIT_S, give_up=self._reader.leak)
            starts_over_after_fork(self)
        except BaseException:  # also of a signal handler, at any moment
            never_opened(self)
            self._reader.call_off()
            self._server.call_off()
            raise

    def _welcome(self) -> bytes:
        """What this node says of itself."""
        return packed(
            name=self.name,
            uuid=self.uuid,
            agent=self._agent_name,
            metadata=self._metadata,
            segments=[list(segment) for segment in self._segments],
            kind=self._device.type,
            device=self._device.index or 0,
            layout=layout_fields(self._catalogue.layout),
        )

    # -- be read -------------------------------------------------------------------------------

    def publish(self, keys: Sequence[bytes], blocks: BlockObjects) -> None:
        """Let other nodes find blocks under keys, instead of others that were published so.

        The node keeps the batch, but not its blocks: free them when you like, and they are found no
        more. Withdraw the keys before blocks are filled anew.

        Args:
            keys: bytes, 1 to 511 each.
            blocks: a batch of the node's heap, or objects of one layout; as many as keys.

        Raises:
            TypeError, ValueError, LifetimeError: a key or a block is wrong; nothing is published.
            ClosedError: the node is closed, or belongs to another process.
        """
        self._closer.require_open()
        require_key_list(keys)
        names = as_keys(keys)
        self._require_registered(blocks)
        self._catalogue.publish(names, blocks)

    def _require_registered(self, blocks: BlockObjects) -> None:
        """Raise if a block is in a buffer that joined the heap after the node was made."""
        if len(self.heap.segments) == len(self._segments) or not len(blocks):
            return
        addresses = layout_and_addresses(blocks)[1]
        is_inside = np.zeros(len(addresses), np.bool_)
        for start, num_bytes, _ in self._segments:
            is_inside |= (addresses >= start) & (addresses < start + num_bytes)
        if not is_inside.all():
            address = int(addresses[np.argmin(is_inside)])
            raise ValueError(
                f"the block at address {address} is in a buffer that has joined the heap after "
                f"node {self.name!r} was made, and is not registered: make nodes when the heap has "
                f"grown"
            )

    def withdraw(self, keys: Iterable[bytes]) -> None:
        """Let published keys be found no more; others are skipped. Leases are not ended.

        Raises:
            TypeError, ValueError: a key is wrong.
            ClosedError: the node is closed, or belongs to another process.
        """
        self._closer.require_open()
        require_keys(keys)
        self._catalogue.withdraw(as_keys(keys))

    def next_offer(self, timeout_s: float | None = None) -> Offer | None:
        """The next offer that another node has made by ``Peer.offer``.

        Args:
            timeout_s: the most seconds to wait; None: no limit.

        Returns:
            The offer: ``connect`` to its ``address``, and read its ``keys``. None if none comes.

        Raises:
            ClosedError: the node is closed, also meanwhile, or belongs to another process.
        """
        self._closer.require_open()
        deadline = None
        if timeout_s is not None:
            deadline = time.monotonic() + as_seconds("timeout_s", timeout_s)
        while True:
            left_s = OFFER_POLL_S if deadline is None else deadline - time.monotonic()
            offer = self._offers.next(min(max(left_s, 0.0), OFFER_POLL_S))
            if offer is not None or (deadline is not None and time.monotonic() >= deadline):
                return offer
            self._closer.require_open()

    # -- read ----------------------------------------------------------------------------------

    def connect(self, address: str, timeout_s: float = ANSWER_S) -> Peer:
        """Get to know another node; returns the same ``Peer`` if it is known already.

        Args:
            address: where it listens, ``host:port``.
            timeout_s: seconds to wait for it.

        Raises:
            TypeError, ValueError: an argument is wrong, the address is not loopback and there is no
                secret, or it is this node's own.
            PeerGoneError: nobody listens there.
            PeerTimeoutError: it has not answered in time.
            AuthenticationError: it has another secret.
            VersionMismatchError: it speaks another version of the protocol.
            ProtocolError: it is no node. A ``ConnectionError``, as are all but the time-out.
            PeerError: NIXL refuses it.
            ClosedError: the node is closed, or belongs to another process.
        """
        self._closer.require_open()
        where = endpoint_of("address", address)
        require_secret("address", where[0], self._secret)
        timeout_s = as_number("timeout_s", timeout_s, positive=True)
        asking, welcome = self._call(address, where, timeout_s)
        try:
            if welcome.uuid == self.uuid:
                raise ValueError(f"address is {address!r}, where this node itself listens")
            known = self._peers.get(welcome.uuid)
            if known is not None and not known.is_gone and not known.closed:
                asking.close()
                return known
            reading, again = self._call(address, where, timeout_s)
            if again.uuid != welcome.uuid:
                reading.close()
                raise PeerGoneError(f"the node at {address} was started again meanwhile: try again")
            ask = AskLine(asking, where, self._key, self.name, welcome.name, welcome.uuid)
            try:
                link = self._reader.add(Link(again, where, reading), ask)
                return self._known(self._peer(link, ask, address))
            except BaseException:
                self._reader.leave(ask)  # also where the reader has yet to add it
                reading.close()
                raise
        except BaseException:
            asking.close()
            raise

    def _peer(self, link: Link, ask: AskLine, address: str) -> Peer:
        return Peer(
            self.heap,
            self._reader,
            link,
            ask,
            address,
            self.address,
            self.name,
            self._segments,
            self._closer,
        )

    def _known(self, peer: Peer) -> Peer:
        """The peer that is known for this life of it; closes this one if that is another.

        Raises:
            ClosedError: the node was closed meanwhile.
        """
        try:
            known = self._peers.setdefault(peer.uuid, peer)
            if known is not peer:
                if not known.is_gone and not known.closed:
                    peer.close()  # another thread was faster
                    return known
                known.hang_up()
            self._peers[peer.uuid] = peer
            self._forget_gone()
            if self._closer.is_closing:  # which may not have seen it
                raise self._closer.closed_error()
        except BaseException:
            peer.close()
            raise
        return peer

    def _forget_gone(self) -> None:
        """Peers that are gone never come back; their successors have other numbers."""
        for life, peer in [*self._peers.items()]:
            if peer.is_gone:
                peer.hang_up()
                self._peers.pop(life, None)

    def _call(self, address: str, where: tuple[str, int], timeout_s: float) -> tuple[Line, Welcome]:
        try:
            return call(where, self._key, self.name, timeout_s)
        except ConnectionRefusedError as error:
            raise PeerGoneError(f"no node listens at {address}: {error}") from None
        except PeerTimeoutError:
            raise
        except TimeoutError as error:
            if is_interrupt(error):
                raise
            raise PeerTimeoutError(f"{address} has not answered in {timeout_s:g} s") from None
        except ConnectionError as error:
            if is_interrupt(error):
                raise
            if type(error).__module__ == PeerError.__module__:
                raise type(error)(f"{address}: {error}") from None
            raise PeerGoneError(
                f"the node at {address} has closed the connection: {error}"
            ) from None

    # -- watch ---------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closer.is_closing

    def stats(self) -> NodeStats:
        """Counters; also of a node that is closed. O(reads in flight + leases)."""
        reader, service = self._reader, self._service
        reads = reader.reads
        held = [read for read in reads if read.event.is_over]
        return NodeStats(
            num_peers=reader.num_peers,
            num_clients=self._server.num_connections,
            reads_in_flight=len(reads),
            quarantined_reads=len(held),
            quarantined_bytes=sum(read.num_bytes for read in held),
            done_reads=reader.num_done,
            failed_reads=reader.num_failed,
            read_bytes=reader.bytes_done,
            leases=self._lent.num_held,
            published_keys=len(self._catalogue),
            lookups=service.num_lookups,
            locks=service.num_locks,
            failed_requests=service.num_failures,
            refused_connections=self._server.num_refused,
        )

    # -- end -----------------------------------------------------------------------------------

    def close(self, timeout_s: float | None = None) -> None:
        """Refuse new requests, wait for reads in both directions, and deregister the memory.

        May be repeated. In a forked child nothing happens.

        Args:
            timeout_s: the most seconds to wait; None: no limit. Readers elsewhere that vanished
                have their leases for at most 60 s; this node's reads in quarantine have no limit.

        Raises:
            TimeoutError: a read has not ended in time. The memory stays registered, and mapped:
                close it again later.
            NestedWaitError: in a finalizer on a thread of the node, or in a finalizer or signal
                handler in the middle of a read. A ``RuntimeError``.
        """
        self._closer.close(timeout_s, wait=self._wait_for_end, release=self._release)

    def _wait_for_end(self, timeout_s: float | None) -> None:
        self._service.is_closing = True
        if self._server.is_here() or self._reader.is_here():
            raise NestedWaitError("a thread of a Node cannot wait for its end: close it elsewhere")
        if self._reader.is_below():
            raise NestedWaitError(
                "a finalizer or signal handler cannot wait for the end of a Node in the middle of "
                "a read from it: close it elsewhere"
            )
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            reads, leases = len(self._reader.reads), self._lent.num_held
            if not reads and not leases:
                break
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(
                    f"{self!r} has not ended in {timeout_s:g} s: {reads} reads of its own are in "
                    f"flight, and readers elsewhere hold {leases} leases; its memory stays "
                    f"registered: close it again later"
                )
            time.sleep(CLOSE_POLL_S)

    def _release(self) -> None:
        for peer in [*self._peers.values()]:
            peer.close()
        self._reader.stop()  # deregisters; until then others must find somebody who listens
        self._server.stop()
        self._catalogue.clear()
        self._peers.clear()

    def start_over_after_fork(self) -> None:
        """Give the node up in a forked child: its threads, sockets and memory are the parent's."""
        if not self._closer.has_ended:  # their descriptors are others' by then
            self._server.abandon()
            self._reader.abandon()

    def __enter__(self) -> Self:
        self._closer.require_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        """Name and address."""
        return f"Node({self.name!r} at {self.address})"

"""``Reader``: the thread that reads from peers. All of NIXL happens on it.

``post`` moves hundreds of megabytes in one call where memory is shared, so it is called on no
thread of the user's; and large reads are posted in parts, between which others have their turn.
"""

from __future__ import annotations

import itertools
import logging
import os
import selectors
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import TypeVar

from kvheap.device.host_queue import NestedWaitError
from kvheap.errors import ClosedError
from kvheap.kernels.latch import Latch
from kvheap.remote.agent import Agent
from kvheap.remote.deadlines import Deadline, now_s
from kvheap.remote.errors import (
    MissingKeysError,
    PeerError,
    PeerGoneError,
    ProtocolError,
)
from kvheap.remote.line import Line
from kvheap.remote.link import Link
from kvheap.remote.messages import Fields, packed, unpacked
from kvheap.remote.moves import Moves, too_late
from kvheap.remote.probe import Probed, probe
from kvheap.remote.reads import Read
from kvheap.transfer.pairing import paired_runs

__all__ = ["Reader"]

LOGGER = logging.getLogger("kvheap")

T = TypeVar("T")

POST_BYTES = 64 << 20
"""Bytes of one request to NIXL."""

SPIN_S = 300e-6
"""So long after a read was posted, its state is asked without a pause."""

POLLS_PER_DURATION = 16
MAX_PAUSE_S = 1e-3
"""Longest pause between two looks at a read."""

QUARANTINE_PAUSE_S = 20e-3
"""The same for reads that nobody waits for any more."""

PROBE_PAUSE_S = 0.5
"""Seconds between two attempts to find out whether a peer is gone."""


class Reader:
    """Reads from peers, on a thread of its own.

    Args:
        agent: NIXL, for this thread's use.
        key: of the control channel.
        name: of the node.
    """

    def __init__(self, agent: Agent, key: bytes, name: str) -> None:
        self._agent = agent
        self._moves = Moves(agent, self._look_for, self._ended)
        self._key = key
        self._name = name
        self._links: dict[str, Link] = {}
        self._open: dict[Read, None] = {}
        self._numbers = itertools.count(1)
        self._tasks: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._is_stopping = False
        self._has_stopped = Latch()
        self.num_done = self.num_failed = self.bytes_done = 0
        self._selector = selectors.DefaultSelector()
        self._wake_reading, self._wake_writing = os.pipe()
        for descriptor in (self._wake_reading, self._wake_writing):
            os.set_blocking(descriptor, False)
        self._selector.register(self._wake_reading, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name=f"kvheap-read-{name}", daemon=True)

    # -- for other threads ---------------------------------------------------------------------

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def is_here(self) -> bool:
        """Whether the calling thread is the one that reads."""
        return threading.current_thread() is self._thread

    @property
    def reads(self) -> list[Read]:
        """All reads that have not ended."""
        return [read for read in [*self._open] if not read.event.has_ended]

    @property
    def num_peers(self) -> int:
        """Peers that are connected, or looked for."""
        links = [*self._links.values()]
        return sum(link.gone is None and not link.is_closed for link in links)

    def submit(self, task: Callable[[], None]) -> None:
        """Do something on the thread, soon."""
        self._tasks.put(task)
        with suppress(OSError):  # the pipe is full: it wakes up anyway
            os.write(self._wake_writing, b"!")

    def ask(self, question: Callable[[], T]) -> T:
        """What a function returns or raises on the thread.

        Raises:
            NestedWaitError: this is the thread.
            ClosedError: the thread has ended.
        """
        if self.is_here():
            raise NestedWaitError("a finalizer on a thread of a Node cannot wait for that node")
        answered = Latch()
        answers: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                answers.append(question())
            except BaseException as error:
                errors.append(error)
            answered.open()

        self.submit(run)
        while not answered.wait(0.1):
            if self._has_stopped.is_open and not answered.is_open:
                raise ClosedError(f"node {self._name!r} is closed")
        if errors:
            raise errors[0]
        return answers[0]

    def begin(self, link: Link, read: Read) -> None:
        """Make a read."""
        self._open[read] = None
        self.submit(partial(self._begin, link, read))

    def add(self, link: Link) -> Link:
        """Get to know a peer; returns the link that is known for this life of it, if there is one.

        Raises:
            PeerError: NIXL refuses the peer's metadata.
            PeerGoneError: it is known to be gone by now.
        """
        return self.ask(partial(self._add, link))

    def drop(self, link: Link) -> None:
        """Be done with a peer. Its reads go on."""
        self.submit(partial(self._drop, link))

    def assume_gone(self, link: Link) -> None:
        """End a peer's reads because the user knows that its machine sends nothing any more."""
        self.ask(partial(self._assume_gone, link))

    def stop(self) -> None:
        """End the thread, and NIXL; nothing may be in flight."""
        self._is_stopping = True
        self.submit(lambda: None)
        self._has_stopped.wait()

    def abandon(self) -> None:
        """Close this process's copies of the sockets, in a forked child without the thread."""
        self._has_stopped.open()
        self._agent.leak()
        self._close_all()

    def leak(self) -> None:
        """Keep NIXL from ending with the interpreter, since something is in flight."""
        self._agent.leak()

    # -- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                for key, mask in self._selector.select(self._pause()):
                    if key.fd == self._wake_reading:
                        with suppress(OSError):
                            os.read(self._wake_reading, 4096)
                    else:
                        self._serve(key.data, mask)
                self._run_tasks()
                self._look_at_all()
            for link in self._links.values():
                if link.is_known:
                    self._agent.remove(link.welcome.agent)
            self._agent.close()
        except BaseException as error:
            LOGGER.exception("node %r reads no more", self._name)
            self._agent.leak()
            for read in self.reads:  # what NIXL has to do with stays in quarantine
                read.event.fail(RuntimeError(f"the thread that reads has ended: {error!r}"))
        finally:
            self._close_all()
            self._has_stopped.open()

    def _run_tasks(self) -> None:
        while True:
            try:
                task = self._tasks.get_nowait()
            except Empty:
                return
            task()

    def _pause(self) -> float | None:
        """Seconds to wait for something; None: for ever."""
        if not self._tasks.empty():
            return 0.0
        now, pause = now_s(), None
        for link in self._links.values():
            for read in link.running:
                if read.event.is_over:
                    wait = QUARANTINE_PAUSE_S
                elif read.groups is not None and not read.running:
                    return 0.0  # the next part is to be posted
                elif now - read.posted_at < SPIN_S:
                    return 0.0
                else:
                    wait = min((now - read.posted_at) / POLLS_PER_DURATION, MAX_PAUSE_S)
                pause = wait if pause is None else min(pause, wait)
            ends = [read.limit.at for read in (*link.queued, *link.asked.values())]
            if link.probe_after is not None and link.reads:
                ends.append(link.probe_after.at)
            if ends:
                wait = max(min(ends) - now, 0.0)
                pause = wait if pause is None else min(pause, wait)
        if pause is not None and 0.0 < pause < MAX_PAUSE_S:  # the selector rounds up to that
            time.sleep(pause)
            return 0.0
        return pause

    def _add(self, link: Link) -> Link:
        known = self._links.get(link.welcome.uuid)
        if known is not None and known.gone is None:
            known.is_closed = False
            if link.line is not None:
                if known.line is None:
                    self._take(known, link.line)
                else:
                    link.line.close()
            return known
        if known is not None and known.reads:  # they are followed by that link
            raise PeerGoneError(str(known.gone))
        welcome = link.welcome
        try:
            agent = self._agent.add(welcome.metadata)
        except Exception as error:
            raise PeerError(
                f"NIXL refuses the metadata of peer {welcome.name!r}: {error!r}"
            ) from error
        if agent != welcome.agent:
            raise ProtocolError(
                f"peer {welcome.name!r} has sent the metadata of another agent, {agent!r}"
            )
        link.is_known = True
        self._agent.connect(welcome.agent)
        self._links[welcome.uuid] = link
        assert link.line is not None
        self._take(link, link.line)
        return link

    def _take(self, link: Link, line: Line) -> None:
        """Use a connection."""
        link.line, link.probe_after = line, None
        self._selector.register(line, selectors.EVENT_READ, link)
        queued, link.queued = link.queued, []
        for read in queued:
            self._request(link, read)

    def _drop(self, link: Link) -> None:
        link.is_closed = True
        self._forget_if_idle(link)

    def _forget_if_idle(self, link: Link) -> None:
        """Remove a peer that nobody needs, and with which nothing is in flight."""
        if not (link.is_closed or link.gone) or link.reads:
            return
        self._disconnect(link)
        if link.is_known:
            link.is_known = False
            self._agent.remove(link.welcome.agent)
        if self._links.get(link.welcome.uuid) is link:  # not another connection to that life
            del self._links[link.welcome.uuid]

    def _disconnect(self, link: Link) -> None:
        line, link.line = link.line, None
        if line is not None:
            with suppress(KeyError, ValueError, OSError):
                self._selector.unregister(line)
            line.close()

    # -- locks ---------------------------------------------------------------------------------

    def _begin(self, link: Link, read: Read) -> None:
        if not read.right.take(read):  # it was withdrawn
            self._open.pop(read, None)
            return
        if link.gone is not None:
            self._fail(read, link.gone)
        elif link.line is None:
            link.queued.append(read)
            self._look_for(link)
        else:
            self._request(link, read)

    def _request(self, link: Link, read: Read) -> None:
        """Ask for a lock on the blocks."""
        number = next(self._numbers)
        read.asked_at = now_s()
        link.asked[number] = read
        ttl = max(read.limit.at - read.asked_at, 1e-3)
        self._push(link, packed(kind="lock", number=number, keys=read.keys, ttl=ttl))

    def _push(self, link: Link, payload: bytes = b"") -> None:
        line = link.line
        if line is None:
            return
        try:
            line.push(payload)
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if line.has_unsent else 0)
            self._selector.modify(line, events, link)
        except OSError as error:
            self._lose(link, error)

    def _serve(self, link: Link, mask: int) -> None:
        line = link.line
        if line is None:
            return
        try:
            if mask & selectors.EVENT_READ:
                for payload in line.pull():
                    self._answered(link, unpacked(payload))
            if mask & selectors.EVENT_WRITE:
                self._push(link)
        except ProtocolError as error:
            for read in [*link.asked.values()]:
                self._fail(read, ProtocolError(f"peer {link.name!r}: {error}"))
            link.asked.clear()
            self._lose(link, error)
        except OSError as error:
            self._lose(link, error)

    def _lose(self, link: Link, error: BaseException) -> None:
        """The control connection is broken: the peer may be gone, or not."""
        LOGGER.info("node %r lost its connection to peer %r: %s", self._name, link.name, error)
        self._disconnect(link)
        link.queued += link.asked.values()
        link.asked.clear()
        if link.is_closed and not link.reads:
            self._forget_if_idle(link)
        else:
            self._look_for(link)

    def _answered(self, link: Link, answer: Fields) -> None:
        read = link.asked.pop(answer.integer("number"), None)
        if read is None or read.event.is_over:  # it has waited too long
            if "lease" in answer:
                self._unlock(link, answer.integer("lease"))
            return
        try:
            self._start(link, read, answer)
        except Exception as error:
            if "lease" in answer:
                self._unlock(link, answer.integer("lease"))
            self._fail(read, error)
            if isinstance(error, ProtocolError):
                raise

    def _start(self, link: Link, read: Read, answer: Fields) -> None:
        """Begin to move the bytes.

        Raises:
            Exception: that cannot be; nothing has begun.
        """
        if "error" in answer:
            kind = PeerGoneError if "gone" in answer else PeerError
            raise kind(f"peer {link.name!r}: {answer.text('error')}")
        if "missing" in answer:
            rows = answer.array("missing").tolist()
            if not all(0 <= row < len(read.keys) for row in rows):
                raise ProtocolError(f"peer {link.name!r} misses keys that were not asked for")
            raise MissingKeysError(link.name, [read.keys[row] for row in rows])
        layout, runs = answer.layout(), answer.runs()
        if layout != read.layout:
            raise PeerError(
                f"the blocks of peer {link.name!r} are {layout}, those to fill are {read.layout}"
            )
        if len(runs) != len(read.keys):
            raise ProtocolError(
                f"peer {link.name!r} has answered {len(read.keys)} keys with {len(runs)} blocks"
            )
        read.lease = answer.integer("lease")
        read.lease_until = Deadline(answer.seconds("ttl"), read.asked_at)
        read.groups = paired_runs(runs, read.target).by_bytes(POST_BYTES)
        read.posted_at = now_s()
        link.running[read] = None
        self._moves.post(link, read)

    def _unlock(self, link: Link, lease: int) -> None:
        self._push(link, packed(kind="unlock", lease=lease))

    # -- bytes ---------------------------------------------------------------------------------

    def _look_at_all(self) -> None:
        for link in [*self._links.values()]:
            for read in [*link.running]:
                self._moves.look_at(link, read)
            for reads in (link.queued, link.asked.values()):
                for read in [*reads]:
                    if read.limit.has_passed:
                        self._fail(read, too_late(link, read))
            link.queued = [read for read in link.queued if not read.event.has_ended]
            for number in [n for n, read in link.asked.items() if read.event.has_ended]:
                del link.asked[number]
            if link.probe_after is not None and link.probe_after.has_passed and link.reads:
                self._look_for(link)
            self._forget_if_idle(link)

    def _ended(self, link: Link, read: Read) -> None:
        """Nothing of a read can arrive any more."""
        if read.event.cause is None:
            self.num_done += 1
            self.bytes_done += read.num_bytes
        else:
            self.num_failed += 1
        self._open.pop(read, None)
        read.event.end()
        self._unlock(link, read.lease)

    def _fail(self, read: Read, error: BaseException) -> None:
        """End a read that NIXL has nothing to do with."""
        self.num_failed += 1
        self._open.pop(read, None)
        read.fail(error)

    # -- is the peer gone? ---------------------------------------------------------------------

    def _look_for(self, link: Link) -> None:
        """Find out on another thread whether the peer is gone; connect to it again if not."""
        if link.is_probing or link.gone is not None:
            return
        link.is_probing, link.probe_after = True, None

        def look() -> None:
            found = probe(link.address, self._key, self._name, link.welcome.uuid)
            self.submit(partial(self._probed, link, found))

        thread = threading.Thread(target=look, name=f"kvheap-probe-{link.name}", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no thread can be had now
            link.is_probing, link.probe_after = False, Deadline(PROBE_PAUSE_S)

    def _probed(self, link: Link, found: Probed) -> None:
        link.is_probing = False
        if not found.is_gone:
            for read in link.running:
                if read.failure is not None:
                    read.event.fail(read.failure)
        if found.line is not None:
            if link.line is None and link.gone is None and not self._is_stopping:
                self._take(link, found.line)
            else:
                found.line.close()
        elif found.is_gone:
            self._is_gone(link, PeerGoneError(f"peer {link.name!r} is gone: {found.why}"))
        else:
            link.probe_after = Deadline(PROBE_PAUSE_S)

    def _is_gone(self, link: Link, gone: PeerGoneError) -> None:
        if link.gone is None:
            link.gone = gone
        self._disconnect(link)
        for read in (*link.queued, *link.asked.values()):
            self._fail(read, gone)
        link.queued, link.asked = [], {}
        for read in link.running:
            read.event.fail(gone)

    def _assume_gone(self, link: Link) -> None:
        link.is_assumed_gone = True
        self._is_gone(link, PeerGoneError(f"peer {link.name!r} was declared gone"))

    def _close_all(self) -> None:
        for link in self._links.values():
            if link.line is not None:
                link.line.close()
        self._selector.close()
        for descriptor in (self._wake_reading, self._wake_writing):
            with suppress(OSError):
                os.close(descriptor)

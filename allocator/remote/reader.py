"""``Reader``: reads from peers, on a thread of its own, and small ones on their callers'.

``post`` moves hundreds of megabytes in one call where memory is shared, so a large read is posted
on the reader's thread, and in parts, between which others have their turn. What asks for little is
done at once, by whoever has the :class:`~kvheap.remote.turn.Turn`: a thread that begins a small
read posts it, and one that waits for a read asks NIXL itself. Nobody is woken up for that.

All state below changes under the turn. An exception of a signal handler may end anything that is
done on other threads than the reader's, between any two steps; the reader goes on from there.
"""

from __future__ import annotations

import logging
import selectors
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

from kvheap.device.host_queue import NestedWaitError
from kvheap.errors import ClosedError
from kvheap.kernels.latch import Latch
from kvheap.remote.agent import Agent
from kvheap.remote.deadlines import Deadline, now_s
from kvheap.remote.errors import PeerError, PeerGoneError, ProtocolError
from kvheap.remote.leases import MAX_LEASE_S
from kvheap.remote.link import Link
from kvheap.remote.moves import SETTLE_S, Moves, too_late
from kvheap.remote.pairs import is_small
from kvheap.remote.pauses import MAX_PAUSE_S, WATCHED_S, between_looks_s, next_look_s
from kvheap.remote.peer_lease import Hold
from kvheap.remote.probe import Probed, probe
from kvheap.remote.questions import Questions
from kvheap.remote.reads import WAIT_S, Read
from kvheap.remote.tasks import Tasks
from kvheap.remote.turn import Turn, Visit

__all__ = ["Reader"]

LOGGER = logging.getLogger("kvheap")

T = TypeVar("T")

DROPPED_S = 0.5
"""Seconds between two looks for leases whose release was interrupted."""

PROBE_PAUSE_S = 0.5
"""Seconds between two attempts to find out whether a peer is gone."""


class Reader:
    """Reads from peers, on a thread of its own.

    Args:
        agent: NIXL, for this reader's use.
        key: of the control channel.
        name: of the node.
    """

    def __init__(self, agent: Agent, key: bytes, name: str) -> None:
        self._agent = agent
        self._moves = Moves(agent, self._suspect, self._ended)
        self._turn = Turn()
        self._key = key
        self._name = name
        self._links: dict[str, Link] = {}
        self._parted: dict[str, str] = {}
        """Agents of peers that were closed while they were alive, by the peer's life."""
        self._owed: dict[str, tuple[Deadline, list[int]]] = {}
        """Leases of peers that were declared gone, to be given back to those that come again."""
        self._open: dict[Read, None] = {}
        self._look_for_dropped = Deadline(DROPPED_S)
        self._tasks = Tasks()
        self._is_stopping = False
        self._has_stopped = Latch()
        self.num_done = self.num_failed = self.bytes_done = 0
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._tasks.signal, selectors.EVENT_READ)
        self._questions = Questions(
            name,
            self._selector,
            self._do_here,
            leased=self._move,
            failed=self._fail,
            withdrawn=self.forget,
            lost=self._lost,
        )
        self._thread = threading.Thread(target=self._run, name=f"kvheap-read-{name}", daemon=True)

    # -- for other threads ---------------------------------------------------------------------

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def is_here(self) -> bool:
        """Whether the calling thread is the one that reads."""
        return threading.current_thread() is self._thread

    def is_below(self) -> bool:
        """Whether code of this reader was interrupted on this thread, and must go on first."""
        me = threading.get_ident()
        return self._turn.is_here or any(read.caller == me for read in [*self._open])

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

    def ask(self, question: Callable[[], T]) -> T:
        """What a function returns or raises on the thread.

        Raises:
            NestedWaitError: this is the thread, or code that it waits for was interrupted here.
            ClosedError: the thread has ended.
        """
        if self.is_here():
            raise NestedWaitError("a finalizer on a thread of a Node cannot wait for that node")
        if self._turn.is_here:
            raise NestedWaitError(
                "a finalizer or signal handler cannot connect to a peer, nor declare one gone, in "
                "the middle of a read: the thread that does it waits for that read"
            )
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

    def enter(self, read: Read) -> None:
        """Announce a read: it counts as one of :attr:`reads` until it is forgotten or has ended."""
        self._open[read] = None

    def begin(self, link: Link, read: Read) -> None:
        """Make a read that was announced, and asks for a lease."""
        read.event.look = partial(self._help, link, read)  # from here on others may begin it
        visit = Visit()
        try:
            if link.line is not None and self._turn.take_soon(visit):
                self._begin(link, read)
            else:
                self.submit(partial(self._begin, link, read))
        except BaseException as error:
            if visit.has_turn and not read.was_asked:  # half a frame may be sent
                self.submit(partial(self._questions.lose, link, link.line, error))
            raise
        finally:
            self._turn.free.extend(visit.back)

    def begin_held(self, link: Link, read: Read) -> None:
        """Make a read that was announced, and whose blocks are leased: at once if it is small.

        The reader is not woken up for one that is under way: whoever asks for it looks at it, and
        the reader will, within ``IDLE_S``.
        """
        read.event.look = partial(self._help, link, read)
        visit = Visit()
        try:
            if is_small(read.parts, read.num_bytes) and self._turn.take_soon(visit):
                self._moves.looking.clear()
                if self._links.get(link.welcome.uuid) is link:
                    link.running[read] = None
                    self._moves.begin(link, read)
                else:
                    self._refuse(link, read)
        finally:
            self._turn.free.extend(visit.back)
            if not (read.event.has_ended or read.posted_at):
                self.submit(partial(self._move, link, read))

    def forget(self, read: Read) -> None:
        """Forget a read that was withdrawn before it began."""
        self._open.pop(read, None)
        if read.hold is not None:
            read.hold.end(read)

    def _help(self, link: Link, read: Read, is_waiting: bool) -> float:
        """Look at a read for whoever waits for it; returns the seconds until it should again.

        Whoever only asks for its state looks too, if nothing of it is still to be posted.

        Raises:
            NestedWaitError: the code that was interrupted on this thread must go on first; only if
                it waits.
        """
        if not is_waiting:
            if read.running and not read.parts:
                self._look(link, read, is_waiting=False)
            return 0.0
        if read.hold is None and read not in link.running:
            return self._help_asked(read)
        if not self._look(link, read, is_waiting=True):
            return MAX_PAUSE_S
        if read.event.is_over:
            return 0.0
        now = now_s()
        read.watched_until = now + WATCHED_S
        return between_looks_s(now, read)

    def _look(self, link: Link, read: Read, *, is_waiting: bool) -> bool:
        """Look at a read, if the turn can be had; returns whether it can."""
        visit = Visit()
        try:
            if not (self._turn.share(visit) if is_waiting else self._turn.take(visit)):
                return False
            if visit.has_turn:
                self._moves.looking.clear()
            self._move(link, read)
            if is_waiting and read.running and not read.event.is_over:
                self._moves.follow(link, read)
        finally:
            self._turn.free.extend(visit.back)
        return True

    def _help_asked(self, read: Read) -> float:
        """The same while the peer has not said where the blocks are: the reader listens to it."""
        if self._turn.is_here:
            raise NestedWaitError(
                "a finalizer or signal handler cannot wait for a read by keys in the middle of "
                "another read: lease the chunks before"
            )
        if read.limit.has_passed:
            self._tasks.wake()
        return min(max(read.limit.left_s, MAX_PAUSE_S), WAIT_S)

    def give_up(self, link: Link, number: int) -> None:
        """Give back a lease that was asked for, without knowing whether it was given."""
        self.submit(partial(self._give_up, link, number))

    def give_back(self, link: Link, hold: Hold) -> None:
        """Tell a peer that a lease is over; may be called anywhere, also in a finalizer."""
        self.submit(partial(self._give_back, link, hold))

    def add(self, link: Link, user: object) -> Link:
        """Get to know a peer; returns the link that is known for this life of it, if there is one.

        Args:
            link: to be used otherwise.
            user: who needs it until :meth:`drop`.

        Raises:
            PeerError: NIXL refuses the peer's metadata.
            PeerGoneError: it is known to be gone by now.
        """
        return self.ask(partial(self._add, link, user))

    def drop(self, link: Link, user: object) -> None:
        """Be done with a peer, unless others use it. Reads go on. May be repeated."""
        self.submit(partial(self._drop, link, user))

    def leave(self, user: object) -> None:
        """:meth:`drop` whatever peer somebody uses: an :meth:`add` was interrupted."""
        self.submit(partial(self._leave, user))

    def assume_gone(self, link: Link) -> None:
        """End a peer's reads because the user knows that its machine sends nothing any more."""
        self.ask(partial(self._assume_gone, link))

    def stop(self) -> None:
        """End the thread, and NIXL; nothing may be in flight."""
        self._is_stopping = True
        self.submit(lambda: None)
        self._has_stopped.wait()

    def call_off(self) -> None:
        """End it in the middle of an opening: whether the thread runs may not be known."""
        self._is_stopping = True
        self.submit(lambda: None)
        with suppress(RuntimeError):  # it was not started, or begins later, and ends at once
            self._thread.join()
        self._agent.close()
        self._close_all()
        self._has_stopped.open()

    def abandon(self) -> None:
        """Close this process's copies of the sockets, in a forked child without the thread."""
        self._has_stopped.open()
        self._agent.leak()
        for read in [*self._open]:
            read.event.look = None  # NIXL is not to be asked here
        self._close_all()

    def leak(self) -> None:
        """Keep NIXL from ending with the interpreter, since something is in flight."""
        self._agent.leak()

    # -- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        visit = Visit()
        try:
            while not self._is_stopping:
                ready = self._selector.select(self._pause())
                visit = Visit()
                try:
                    self._turn.wait(visit)
                    self._work(ready)
                finally:
                    self._turn.free.extend(visit.back)
            visit = Visit()
            self._turn.wait(visit)
            for link in [*self._links.values()]:
                for hold in [*link.holds]:
                    hold.release()
            self._work([])  # what was left to be told to others
            known = [link.welcome.agent for link in self._links.values() if link.is_known]
            for agent in (*known, *self._parted.values()):
                self._agent.remove(agent)
            self._agent.close()
        except BaseException as error:
            LOGGER.exception("node %r reads no more", self._name)
            self._agent.leak()
            for read in self.reads:  # what NIXL has to do with stays in quarantine
                read.event.fail(RuntimeError(f"the thread that reads has ended: {error!r}"))
                read.event.look = None
        finally:
            self._close_all()
            self._has_stopped.open()
            self._turn.free.extend(visit.back)

    def _work(self, ready: list[tuple[selectors.SelectorKey, int]]) -> None:
        """Do everything that can be done now."""
        self._moves.looking.clear()
        for key, mask in ready:
            if key.fileobj is self._tasks.signal:
                self._tasks.calm()
            else:
                self._questions.serve(key.data, mask)
        self._tasks.run()
        self._look_at_all()

    def _pause(self) -> float:
        """Seconds to wait for something."""
        if not self._tasks.is_empty:
            return 0.0
        pause = next_look_s([*self._links.values()])
        if 0.0 < pause < MAX_PAUSE_S:  # the selector rounds up to that
            time.sleep(pause)
            return 0.0
        return pause

    def _add(self, link: Link, user: object) -> Link:
        known = self._links.get(link.welcome.uuid)
        if known is not None and known.gone is None:
            known.users[user] = None
            known.is_closed = False
            if link.line is not None:
                if known.line is None:
                    self._questions.take(known, link.line)
                else:
                    link.line.close()
            return known
        if known is not None and known.reads:  # they are followed by that link
            raise PeerGoneError(
                f"{known.gone}; reads from it have not ended yet: connect again in {SETTLE_S:g} s"
            )
        welcome = link.welcome
        try:
            agent = self._agent.add(welcome.metadata)
        except Exception as error:
            raise PeerError(
                f"NIXL refuses the metadata of peer {welcome.name!r}: {error!r}; if its process "
                f"ran out of file descriptors, its node must be made anew"
            ) from error
        if agent != welcome.agent:
            raise ProtocolError(
                f"peer {welcome.name!r} has sent the metadata of another agent, {agent!r}"
            )
        link.is_known = True
        self._parted.pop(welcome.uuid, None)
        self._agent.connect(welcome.agent)
        self._links[welcome.uuid] = link
        link.users[user] = None
        assert link.line is not None
        _, owed = self._owed.pop(welcome.uuid, (None, []))
        link.unlocks.extend(owed)
        self._questions.take(link, link.line)
        return link

    def _drop(self, link: Link, user: object) -> None:
        link.users.pop(user, None)
        link.is_closed = not link.users
        for hold in [*link.holds]:
            if hold.user is user:
                hold.release()
        self._forget_if_idle(link)

    def _leave(self, user: object) -> None:
        for link in [*self._links.values()]:
            if user in link.users:
                self._drop(link, user)

    def _forget_if_idle(self, link: Link) -> None:
        """Remove a peer that nobody needs, and with which nothing is in flight."""
        if not (link.is_closed or link.gone) or link.reads or link.holds:
            return
        self._questions.unlock(link)
        self._questions.disconnect(link)
        if self._links.get(link.welcome.uuid) is not link:  # forgotten; another may be known now
            return
        if link.is_known:
            link.is_known = False
            if link.gone is None:  # NIXL would keep a socket here and there, and make new ones
                self._parted[link.welcome.uuid] = link.welcome.agent
            else:
                self._agent.remove(link.welcome.agent)
        if self._links.get(link.welcome.uuid) is link:  # not another connection to that life
            del self._links[link.welcome.uuid]

    # -- locks ---------------------------------------------------------------------------------

    def _begin(self, link: Link, read: Read) -> None:
        if link.gone is not None or not self._knows(link):
            self._refuse(link, read)
        elif link.line is None:
            link.queued.append(read)
            self._look_for(link)
        else:
            self._questions.request(link, read)

    def _do_here(self, task: Callable[[], None]) -> None:
        """Do something on the reader's thread: now, if it is this one."""
        if self.is_here():
            task()
        else:
            self.submit(task)

    def _lost(self, link: Link) -> None:
        """The control connection is broken: the peer may be gone, or not."""
        if link.is_closed and not link.reads:
            self._forget_if_idle(link)
        else:
            self._look_for(link)

    def _give_up(self, link: Link, number: int) -> None:
        if link.gone is None:
            link.unlocks.append(number)
            self._questions.unlock(link)

    def _give_back(self, link: Link, hold: Hold) -> None:
        link.holds.pop(hold, None)
        if hold.is_back:  # an exception of a signal handler made it be told twice
            return
        hold.is_back = True
        if link.gone is None:
            link.unlocks.append(hold.number)
        self._forget_if_idle(link)

    def _release_dropped(self) -> None:
        """Give back leases that nobody has, or that were released, as a finalizer does at once.

        One that is interrupted is not called again.
        """
        if not self._look_for_dropped.has_passed:
            return
        self._look_for_dropped = Deadline(DROPPED_S)
        for link in [*self._links.values()]:
            for hold, lease in [*link.holds.items()]:
                if hold.is_released or lease() is None:
                    hold.release()

    # -- bytes ---------------------------------------------------------------------------------

    def _move(self, link: Link, read: Read) -> None:
        """Begin to move the bytes of a read whose blocks are leased; may be repeated."""
        if read.event.has_ended:
            return
        if self._links.get(link.welcome.uuid) is not link:
            self._refuse(link, read)
            return
        link.running[read] = None
        self._moves.look_at(link, read)

    def _look_at_all(self) -> None:
        self._release_dropped()
        for link in [*self._links.values()]:
            for read in [*link.running]:
                self._moves.look_at(link, read)
            for reads in (link.queued, link.asked.values()):
                for read in [*reads]:
                    if read.limit.has_passed:
                        self._questions.not_answered(link, read)
                        self._fail(read, too_late(link, read))
            link.queued = [read for read in link.queued if not read.event.has_ended]
            for number in [n for n, read in link.asked.items() if read.event.has_ended]:
                del link.asked[number]
            if link.probe_after is not None and link.probe_after.has_passed and link.has_to_tell:
                self._look_for(link)
            self._questions.unlock(link)
            if link.queued and link.line is not None and not link.line.has_unsent:
                self._questions.request_queued(link)
            self._forget_if_idle(link)

    def _ended(self, link: Link, read: Read) -> None:
        """Nothing of a read can arrive any more. May be told again, until it is not running."""
        read.event.end()
        if read.hold is not None:
            read.hold.end(read)
        self._open.pop(read, None)
        if read.lease:
            link.unlocks.append(read.lease)
            if not self.is_here():
                self._tasks.wake()
        if link.running.pop(read, self) is self:  # last: until then it is looked at again
            return
        if read.event.cause is None:
            self.num_done += 1
            self.bytes_done += read.num_bytes
        else:
            self.num_failed += 1

    def _fail(self, read: Read, error: BaseException) -> None:
        """End a read that NIXL has nothing to do with."""
        self._open.pop(read, None)
        if read.hold is not None:
            read.hold.end(read)
        read.fail(error)
        self.num_failed += 1

    def _knows(self, link: Link) -> bool:
        """Whether it was not forgotten: then nobody looks at it any more."""
        return self._links.get(link.welcome.uuid) is link

    def _refuse(self, link: Link, read: Read) -> None:
        """End a read from a peer that is gone, or closed, unless it was withdrawn."""
        if read.right.take(read):
            self._fail(read, link.gone or PeerError(f"peer {link.name!r} was closed"))

    # -- is the peer gone? ---------------------------------------------------------------------

    def _suspect(self, link: Link) -> None:
        self._do_here(partial(self._look_for, link))

    def _look_for(self, link: Link) -> None:
        """Find out on another thread whether the peer is gone; connect to it again if not."""
        if link.is_probing or link.gone is not None:
            return
        link.is_probing, link.probe_after = True, None

        def look() -> None:
            found = probe(link.address, self._key, self._name, link.welcome.uuid)
            self.submit(partial(self._probed, link, found))
            if self._has_stopped.is_open and found.line is not None:  # nobody does that any more
                found.line.close()

        thread = threading.Thread(target=look, name=f"kvheap-probe-{link.name}", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no thread can be had now
            link.is_probing, link.probe_after = False, Deadline(PROBE_PAUSE_S)

    def _probed(self, link: Link, found: Probed) -> None:
        link.is_probing = False
        if not found.is_gone:
            for read in [*link.running]:
                if read.failure is not None:
                    read.event.fail(read.failure)
        if found.line is not None:
            is_needed = self._knows(link) and link.line is None and link.gone is None
            if is_needed and not self._is_stopping:
                self._questions.take(link, found.line)
            else:
                found.line.close()
        elif found.is_gone:
            self._is_gone(link, PeerGoneError(f"peer {link.name!r} is gone: {found.why}"))
        else:
            link.probe_after = Deadline(PROBE_PAUSE_S)

    def _is_gone(self, link: Link, gone: PeerGoneError) -> None:
        if link.gone is None:
            link.gone = gone
        self._questions.disconnect(link)
        for read in (*link.queued, *link.asked.values()):
            self._fail(read, gone)
        link.queued, link.asked = [], {}
        link.holds.clear()
        link.unlocks.clear()
        for read in [*link.running]:
            read.event.fail(gone)

    def _assume_gone(self, link: Link) -> None:
        if link.gone is None:  # it may live after all, and has our leases
            reads = (*link.asked.values(), *link.running)
            holds = [*link.holds]  # other threads add theirs
            numbers = [*link.unlocks, *(hold.number for hold in holds)]
            numbers += [number for read in reads for number in (read.asked_for, read.lease)]
            self._owed = {of: owed for of, owed in self._owed.items() if not owed[0].has_passed}
            self._owed[link.welcome.uuid] = Deadline(MAX_LEASE_S), [*filter(None, numbers)]
        link.is_assumed_gone = True
        self._is_gone(link, PeerGoneError(f"peer {link.name!r} was declared gone"))

    def _close_all(self) -> None:
        for link in [*self._links.values()]:
            if link.line is not None:
                link.line.close()
        self._selector.close()
        self._tasks.close()

"""``enter_lease``: what a peer answers to a read that asks for its blocks."""

from __future__ import annotations

from kvheap.remote.deadlines import Deadline
from kvheap.remote.errors import MissingKeysError, PeerError, PeerGoneError, ProtocolError
from kvheap.remote.messages import Fields
from kvheap.remote.pairs import parts_of
from kvheap.remote.reads import Read

__all__ = ["enter_lease"]


def enter_lease(peer: str, read: Read, answer: Fields) -> None:
    """Enter in a read where its blocks are, and until when.

    Args:
        peer: the peer's name.
        read: has asked.
        answer: to that.

    Raises:
        MissingKeysError: the peer does not have them all.
        PeerError, PeerGoneError: it could not answer, or its blocks are others than those to fill.
        ProtocolError: this is no answer.
    """
    if "error" in answer:
        kind = PeerGoneError if "gone" in answer else PeerError
        raise kind(f"peer {peer!r}: {answer.text('error')}")
    if "missing" in answer:
        rows = answer.array("missing").tolist()
        if not all(0 <= row < len(read.keys) for row in rows):
            raise ProtocolError(f"peer {peer!r} misses keys that were not asked for")
        raise MissingKeysError(peer, [read.keys[row] for row in rows])
    layout, runs = answer.layout(), answer.runs()
    if layout != read.layout:
        raise PeerError(
            f"the blocks of peer {peer!r} are {layout}, those to fill are {read.layout}"
        )
    if len(runs) != len(read.keys):
        raise ProtocolError(
            f"peer {peer!r} has answered {len(read.keys)} keys with {len(runs)} blocks"
        )
    assert read.target is not None
    read.parts = parts_of(runs, read.target)
    read.lease_until = Deadline(answer.seconds("ttl"), read.asked_at)
    read.lease, read.asked_for = answer.integer("lease"), 0

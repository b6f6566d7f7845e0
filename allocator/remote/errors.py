"""What goes wrong between two nodes. Messages name the peer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = [
    "AuthenticationError",
    "MissingKeysError",
    "PeerError",
    "PeerGoneError",
    "PeerTimeoutError",
    "ProtocolError",
    "StaleReadError",
    "VersionMismatchError",
]

NAMED_KEYS = 3
"""How many keys a message names."""


class PeerError(RuntimeError):
    """A peer refused a request, or could not serve it; the message says why."""


class ProtocolError(ConnectionError):
    """What arrived is not what a node sends: damaged, too large, or not in the protocol."""


class AuthenticationError(ProtocolError):
    """What arrived was not written by a holder of the same secret, or was damaged on the way."""


class VersionMismatchError(ProtocolError):
    """The other node speaks another version of the protocol."""


class PeerGoneError(ConnectionError):
    """The peer's process has ended, or its node was closed.

    Connect again to reach its successor.
    """


class PeerTimeoutError(TimeoutError):
    """The peer has not answered, or the bytes have not arrived, in time."""


class StaleReadError(PeerTimeoutError):
    """The bytes arrived after the lease on the peer's blocks: they may be another chunk's."""


class MissingKeysError(LookupError):
    """The peer does not have all chunks, or not any more; nothing was read.

    Attributes:
        peer: the peer's name.
        missing: the keys that it does not have, in the order given.
    """

    def __init__(self, peer: str, missing: Sequence[bytes]) -> None:
        names = ", ".join([repr(key) for key in missing[:NAMED_KEYS]])
        more = len(missing) - NAMED_KEYS
        names = f"{names} and {more} more" if more > 0 else names
        super().__init__(f"peer {peer!r} does not have {names}: nothing was read")
        self.peer = peer
        self.missing = tuple(missing)

    def __reduce__(self) -> tuple[type[MissingKeysError], tuple[Any, ...]]:
        return type(self), (self.peer, self.missing)

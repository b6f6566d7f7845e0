"""``probe``: whether a peer is gone, alive, or neither is known.

A connection that ends proves nothing: the network, or the peer, may have closed it. A peer is gone
if its machine says that nobody listens at its address any more, or if another life of it answers
there: a node listens for as long as it has memory registered. No answer is no proof either: it may
be frozen, or cut off, and go on later.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvheap.remote.errors import ProtocolError
from kvheap.remote.handshake import call
from kvheap.remote.line import Line

__all__ = ["Probed", "probe"]

PROBE_S = 0.7
"""Seconds to wait for an answer."""


@dataclass(frozen=True, slots=True)
class Probed:
    """What became of an attempt to reach a peer.

    Attributes:
        is_gone: whether it is known to be gone.
        why: how that is known, or why nothing is.
        line: a new connection to it, if it is alive.
    """

    is_gone: bool
    why: str
    line: Line | None = None


def probe(address: tuple[str, int], key: bytes, name: str, uuid: str) -> Probed:
    """Look for the life ``uuid`` of a peer at an address. Raises nothing."""
    try:
        line, welcome = call(address, key, name, PROBE_S)
    except ConnectionRefusedError:
        return Probed(True, f"nobody listens at {address[0]}:{address[1]} any more")
    except (ProtocolError, OSError) as error:
        return Probed(False, str(error))
    except Exception as error:
        return Probed(False, repr(error))
    if welcome.uuid == uuid:
        return Probed(False, "it is alive", line)
    line.close()
    return Probed(True, f"another node, {welcome.name!r}, listens at its address")

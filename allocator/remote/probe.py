"""``probe``: whether a peer is gone, alive, or neither is known.

A connection that ends proves nothing: the network, or the peer, may have closed it. A peer is gone
if its machine says that nobody listens at its address any more, or if another life of it answers
there: a node listens for as long as it has memory registered. No answer is no proof either: it may
be frozen, or cut off, and go on later.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from kvheap.remote.deadlines import Deadline
from kvheap.remote.handshake import call
from kvheap.remote.line import Line

__all__ = ["Probed", "probe"]

PROBE_S = 0.7
"""Seconds to wait for an answer."""

MIN_S = 0.05
"""The same for the last attempt."""

AGAIN_S = 0.01
"""Seconds between two attempts."""


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
    deadline = Deadline(PROBE_S)
    found = _probe(address, key, name, uuid, PROBE_S)
    while found is None:
        # A process that ends closes its sockets one after another, the listening one last perhaps.
        time.sleep(AGAIN_S)
        if deadline.has_passed:
            return Probed(False, "it hangs up on whoever connects")
        found = _probe(address, key, name, uuid, max(deadline.left_s, MIN_S))
    return found


def _probe(
    address: tuple[str, int], key: bytes, name: str, uuid: str, timeout_s: float
) -> Probed | None:
    """One attempt; None if it shows nothing."""
    try:
        line, welcome = call(address, key, name, timeout_s)
    except ConnectionRefusedError:
        return Probed(True, f"nobody listens at {address[0]}:{address[1]} any more")
    except (ConnectionResetError, BrokenPipeError):
        return None
    except Exception as error:
        return Probed(False, str(error) or repr(error))
    if welcome.uuid == uuid:
        return Probed(False, "it is alive", line)
    line.close()
    return Probed(True, f"another node, {welcome.name!r}, listens at its address")

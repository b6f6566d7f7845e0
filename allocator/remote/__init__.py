"""Chunks on other machines: read by key, through NIXL.

Needs ``pip install msgpack`` (the extra ``nixl``) and, without its dependencies, NIXL itself: ``pip
install --no-deps nixl-cu13==1.5.1 nixl==1.5.1``. Both are imported when a node is made.
"""

from __future__ import annotations

from kvheap.remote.errors import (
    AuthenticationError,
    MissingKeysError,
    PeerError,
    PeerGoneError,
    PeerTimeoutError,
    ProtocolError,
    StaleReadError,
    VersionMismatchError,
)
from kvheap.remote.node import Node
from kvheap.remote.node_stats import NodeStats
from kvheap.remote.offers import Offer
from kvheap.remote.peer import Peer
from kvheap.remote.peer_lease import PeerLease

__all__ = [
    "AuthenticationError",
    "MissingKeysError",
    "Node",
    "NodeStats",
    "Offer",
    "Peer",
    "PeerError",
    "PeerGoneError",
    "PeerLease",
    "PeerTimeoutError",
    "ProtocolError",
    "StaleReadError",
    "VersionMismatchError",
]

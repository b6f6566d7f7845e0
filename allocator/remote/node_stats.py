"""``NodeStats``: what a node does, and has done."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["NodeStats"]


@dataclass(frozen=True, slots=True)
class NodeStats:
    """Counters of a node at one moment.

    Attributes:
        num_peers: peers that this node is connected to, and that are not known to be gone.
        num_clients: control connections of other nodes; a peer has two.
        reads_in_flight: reads that have begun and not ended, also those in quarantine.
        quarantined_reads: reads that have failed, and whose bytes may still arrive.
        quarantined_bytes: bytes of their blocks.
        done_reads, failed_reads: reads that have ended so far.
        read_bytes: bytes that have been read so far.
        leases: leases that readers elsewhere hold.
        published_keys: keys that were published.
        lookups, locks: requests of other nodes so far.
        failed_requests: those that this node could not answer.
        refused_connections: connections ended because of what they sent, or did not send.
    """

    num_peers: int
    num_clients: int
    reads_in_flight: int
    quarantined_reads: int
    quarantined_bytes: int
    done_reads: int
    failed_reads: int
    read_bytes: int
    leases: int
    published_keys: int
    lookups: int
    locks: int
    failed_requests: int
    refused_connections: int

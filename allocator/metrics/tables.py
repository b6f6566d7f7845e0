"""The metrics of heaps, prefix stores, file tiers, shared heaps and nodes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from kvheap.metrics.heap_values import heap_values
from kvheap.metrics.kinds import Kind, counter, gauge

__all__ = [
    "ADDRESSES",
    "FILE_TIER",
    "HEAP",
    "KINDS",
    "NODE",
    "PREFIX_INDEX",
    "PREFIX_STORE",
    "SHARED_HEAP",
]

HEAP = Kind(
    "heap",
    (
        gauge(
            "kvheap_heap_bytes",
            {
                "live": "live_state_bytes",
                "pinned": "pinned_state_bytes",
                "pending": "pending_state_bytes",
                "quarantined": "quarantined_state_bytes",
                "free": "free_bytes",
                "other": "other_state_bytes",
            },
            "Bytes of a heap by state; they add up to its size. live: of blocks that are not "
            "freed. pinned: of live blocks with a pin count above zero. pending: freed, while a "
            "stream or a transfer still uses them. quarantined: freed, but a failed transfer may "
            "use them for ever. other: allocated by users of the address space that are no blocks.",
            label="state",
        ),
        gauge(
            "kvheap_heap_largest_free_extent_bytes",
            "largest_free_bytes",
            "Bytes of the largest free extent, the largest block that could be allocated.",
        ),
        gauge("kvheap_heap_free_extents", "free_extents", "Number of free extents."),
        gauge(
            "kvheap_heap_page_locked_bytes",
            "pinned_bytes",
            "Bytes of a heap that are page-locked host memory.",
        ),
        gauge("kvheap_heap_live_blocks", "live_blocks", "Blocks that are not freed."),
        gauge(
            "kvheap_heap_pinned_blocks",
            "pinned_blocks",
            "Live blocks with a pin count above zero.",
        ),
        gauge(
            "kvheap_heap_oldest_block_age_seconds",
            "oldest_s",
            "Seconds since the oldest live block was allocated; 0 if there is none. It grows for "
            "as long as a block leaks.",
        ),
        counter(
            "kvheap_heap_failed_allocations_total",
            "failed_allocations",
            "Allocations for which a heap had no room.",
        ),
        counter(
            "kvheap_heap_dropped_blocks_total",
            "dropped_blocks",
            "Blocks that were leaked: dropped without being freed, and then reclaimed.",
        ),
        counter(
            "kvheap_heap_expired_leases_total",
            "expired_leases",
            "Leases that expired before they were released.",
        ),
        gauge(
            "kvheap_heap_view_only",
            "view_only",
            "1 if another process keeps the books of a heap: its figures are then those at the "
            "fork, or of an empty heap. Else 0.",
        ),
    ),
    heap_values,
)

ADDRESSES = Kind(
    "address_space",
    (
        gauge(
            "kvheap_address_space_bytes",
            {"allocated": "allocated_bytes", "free": "free_bytes"},
            "Bytes of an address space by state.",
            label="state",
        ),
        gauge(
            "kvheap_address_space_largest_free_extent_bytes",
            "largest_free_bytes",
            "Bytes of the largest free extent.",
        ),
        gauge("kvheap_address_space_free_extents", "free_extents", "Number of free extents."),
    ),
)

_CHUNKS = (
    gauge(
        "kvheap_prefix_chunks",
        {
            "evictable": "evictable_chunks",
            "held": "held_chunks",
            "pending": "pending_chunks",
            "removed": "removed_chunks",
            "ended": "ended_chunks",
        },
        "Chunks by state. evictable, held: found by look-ups. pending: their stores have not "
        "ended. removed: no longer found, but still held or pending. ended: to be freed.",
        label="state",
    ),
    gauge(
        "kvheap_prefix_bytes",
        {
            "evictable": "evictable_bytes",
            "held": "held_bytes",
            "pending": "pending_bytes",
            "removed": "removed_bytes",
            "ended": "ended_bytes",
        },
        "Bytes of the chunks by state; the states are those of kvheap_prefix_chunks.",
        label="state",
    ),
)

PREFIX_INDEX = Kind("store", _CHUNKS)

PREFIX_STORE = Kind(
    "store",
    (
        *_CHUNKS,
        gauge(
            "kvheap_prefix_stores_in_flight",
            "stores_in_flight",
            "Stores that were begun and have not ended.",
        ),
        counter(
            "kvheap_prefix_evicted_chunks_total",
            "evicted_chunks",
            "Chunks that were evicted to make room.",
        ),
        counter(
            "kvheap_prefix_evicted_bytes_total",
            "evicted_bytes",
            "Bytes of the chunks that were evicted to make room.",
        ),
    ),
)

FILE_TIER = Kind(
    "tier",
    (
        gauge("kvheap_file_tier_size_bytes", "file_bytes", "Bytes of a tier's places for chunks."),
        gauge(
            "kvheap_file_tier_free_bytes", "free_bytes", "Bytes of the places that no chunk has."
        ),
        gauge(
            "kvheap_file_tier_chunks",
            {"ready": "ready_chunks", "pending": "pending_chunks"},
            "Chunks by state. ready: can be loaded. pending: are being stored.",
            label="state",
        ),
        gauge(
            "kvheap_file_tier_loading_chunks",
            "loading_chunks",
            "Ready chunks that are being loaded now.",
        ),
        gauge(
            "kvheap_file_tier_restored_chunks",
            "restored_chunks",
            "Chunks of an earlier owner that were found when the tier was opened.",
        ),
        counter(
            "kvheap_file_tier_stored_chunks_total", "stored_chunks", "Chunks that were stored."
        ),
        counter(
            "kvheap_file_tier_refused_chunks_total",
            "refused_chunks",
            "Chunks that were not stored, because all others were in use.",
        ),
        counter(
            "kvheap_file_tier_failed_chunks_total",
            "failed_chunks",
            "Chunks that could not be written, or not be read for the time being.",
        ),
        counter("kvheap_file_tier_loaded_chunks_total", "loaded_chunks", "Hits: chunks loaded."),
        counter(
            "kvheap_file_tier_missed_chunks_total",
            "missed_chunks",
            "Misses: chunks that a load asked for and that were not there.",
        ),
        counter(
            "kvheap_file_tier_damaged_chunks_total",
            "damaged_chunks",
            "Chunks that were removed because their bytes were damaged or unreadable.",
        ),
        counter(
            "kvheap_file_tier_evicted_chunks_total",
            "evicted_chunks",
            "Chunks that were evicted to make room.",
        ),
        counter(
            "kvheap_file_tier_removed_chunks_total",
            "removed_chunks",
            "Chunks that were removed by their user.",
        ),
        counter(
            "kvheap_file_tier_written_bytes_total", "written_bytes", "Bytes written to the file."
        ),
        counter("kvheap_file_tier_read_bytes_total", "read_bytes", "Bytes read from the file."),
        counter(
            "kvheap_file_tier_direct_bytes_total",
            "direct_bytes",
            "Bytes of both that were moved past the page cache.",
        ),
    ),
)

SHARED_HEAP = Kind(
    "shared_heap",
    (
        gauge(
            "kvheap_shared_heap_size_bytes",
            "heap_bytes",
            "Bytes of the places for chunks of a heap that processes share.",
        ),
        gauge(
            "kvheap_shared_heap_chunks",
            {"ready": "ready_chunks", "pending": "pending_chunks"},
            "Chunks by state. ready: can be held and loaded. pending: are being stored; only the "
            "owner knows.",
            label="state",
        ),
        gauge(
            "kvheap_shared_heap_places",
            {"free": "free_places", "waiting": "waiting_places"},
            "Places without a chunk, by state; only the owner knows. waiting: somebody still holds "
            "or fills what was there.",
            label="state",
        ),
        gauge(
            "kvheap_shared_heap_owner",
            "is_owner",
            "1 if this process owns the heap and keeps its books, else 0.",
        ),
        gauge(
            "kvheap_shared_heap_writers",
            "num_writers",
            "Other processes that are connected to have chunks stored.",
        ),
        gauge(
            "kvheap_shared_heap_restored_chunks",
            "restored_chunks",
            "Chunks of an earlier owner that were found at the opening.",
        ),
        counter(
            "kvheap_shared_heap_stored_chunks_total",
            "stored_chunks",
            "Chunks that were stored, by all processes.",
        ),
        counter(
            "kvheap_shared_heap_refused_chunks_total",
            "refused_chunks",
            "Chunks that found no room, because all others were in use.",
        ),
        counter(
            "kvheap_shared_heap_aborted_chunks_total",
            "aborted_chunks",
            "Chunks that were given up, as by a process that died while it filled them.",
        ),
        counter(
            "kvheap_shared_heap_evicted_chunks_total",
            "evicted_chunks",
            "Chunks that were evicted to make room.",
        ),
        counter(
            "kvheap_shared_heap_removed_chunks_total",
            "removed_chunks",
            "Chunks that were removed by their user.",
        ),
        counter(
            "kvheap_shared_heap_damaged_chunks_total",
            "damaged_chunks",
            "Chunks that were removed because their bytes were damaged.",
        ),
        counter(
            "kvheap_shared_heap_broken_leases_total",
            "broken_leases",
            "Places that were reused although somebody held them for too long.",
        ),
    ),
)

NODE = Kind(
    "node",
    (
        gauge("kvheap_node_peers", "num_peers", "Peers that a node is connected to."),
        gauge("kvheap_node_clients", "num_clients", "Control connections of other nodes."),
        gauge(
            "kvheap_node_reads_in_flight",
            "reads_in_flight",
            "Reads of other machines' chunks that have not ended, those in quarantine included.",
        ),
        gauge(
            "kvheap_node_quarantined_reads",
            "quarantined_reads",
            "Reads that have failed, and whose bytes may still arrive.",
        ),
        gauge(
            "kvheap_node_quarantined_bytes",
            "quarantined_bytes",
            "Bytes of the blocks of reads in quarantine.",
        ),
        gauge("kvheap_node_leases", "leases", "Leases that readers elsewhere hold."),
        gauge("kvheap_node_published_keys", "published_keys", "Keys that were published."),
        counter(
            "kvheap_node_reads_total",
            {"done": "done_reads", "failed": "failed_reads"},
            "Reads that have ended, by outcome.",
            label="outcome",
        ),
        counter("kvheap_node_read_bytes_total", "read_bytes", "Bytes that have been read."),
        counter("kvheap_node_lookups_total", "lookups", "Look-ups of other nodes."),
        counter("kvheap_node_locks_total", "locks", "Leases that other nodes asked for."),
        counter(
            "kvheap_node_failed_requests_total",
            "failed_requests",
            "Requests of other nodes that could not be answered.",
        ),
        counter(
            "kvheap_node_refused_connections_total",
            "refused_connections",
            "Connections that were ended because of what they sent, or did not send.",
        ),
    ),
)

KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "kvheap.addresses.address_manager.AddressManager": ADDRESSES,
        "kvheap.files.tier.FileTier": FILE_TIER,
        "kvheap.heaps.tensor_allocator.TensorMemoryAllocator": HEAP,
        "kvheap.prefix.index.PrefixIndex": PREFIX_INDEX,
        "kvheap.prefix.store.PrefixStore": PREFIX_STORE,
        "kvheap.remote.node.Node": NODE,
        "kvheap.shared.shared_heap.SharedHeap": SHARED_HEAP,
    }
)
"""The kind of objects of a class and its subclasses, by the class's full name. Names, so that what
is not used is not imported."""

"""Chunks in files: a tier that is bounded, checks what it reads, and outlives the process.

Needs ``pip install lmdb xxhash``: lmdb for the index and xxhash for checksums, which are
imported when a tier is opened.
"""

from __future__ import annotations

from kvheap.files.errors import MissingChunksError, TierInUseError, TierMismatchError
from kvheap.files.tier import FileTier
from kvheap.files.tier_stats import FileTierStats
from kvheap.files.transfers import FileTransfer

__all__ = [
    "FileTier",
    "FileTierStats",
    "FileTransfer",
    "MissingChunksError",
    "TierInUseError",
    "TierMismatchError",
]

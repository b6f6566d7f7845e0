"""``ChunkIndex``: which key is at which place, in LMDB.

One process has it open (``TierFolder``), and writes one transaction at a time, so LMDB's own locks
are not used. A transaction is there as a whole or not at all, also after ``kill -9``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from kvheap.files.packages import need_lmdb

__all__ = ["MAX_KEY_BYTES", "ChunkIndex", "Entry"]

MAX_KEY_BYTES = 511
"""LMDB's limit."""

MAX_CHANGES = 4096
"""In one transaction: LMDB has a limit of 131,072 changed pages, and a change can take two."""

FIRST_BYTES, BYTES_PER_PLACE = 64 << 20, 2048
"""Of address space for the index; a file grows only as far as it is used."""

VALUE = struct.Struct("<QQQ")


class Entry(NamedTuple):
    """Where a chunk is.

    Attributes:
        key: what it is found by.
        address: its first byte in the file.
        digest: its checksum.
        used: the clock of the tier when it was last used.
    """

    key: bytes
    address: int
    digest: int
    used: int


class ChunkIndex:
    """The index of one file of chunks. Not thread-safe.

    Args:
        path: the file; made if it is missing.
        num_places: how many chunks there can be.
        is_durable: synchronize each transaction.

    Raises:
        ImportError: lmdb is not installed.
        lmdb.Error, OSError: the index cannot be opened.
    """

    def __init__(self, path: Path, num_places: int, is_durable: bool) -> None:
        self._lmdb = need_lmdb()
        self._env: Any = self._lmdb.open(
            str(path),
            subdir=False,
            lock=False,
            map_size=FIRST_BYTES + num_places * BYTES_PER_PLACE,
            sync=is_durable,
            metasync=is_durable,
            readahead=False,
            mode=0o600,
            max_spare_txns=1,
        )

    def entries(self) -> Iterator[Entry | bytes]:
        """All entries, in the order of their keys; of one that is not an entry, its key."""
        with self._env.begin(buffers=False) as transaction:
            for key, value in transaction.cursor():
                yield Entry(key, *VALUE.unpack(value)) if len(value) == VALUE.size else key

    def write(self, removed: Iterable[bytes], stored: Sequence[Entry] = ()) -> None:
        """Remove keys, which may be absent, then write entries.

        In one transaction, unless there are more than ``MAX_CHANGES``.

        Raises:
            lmdb.Error: the index cannot be written; no later transaction is begun.
        """
        removals = iter(removed)
        while keys := list(islice(removals, MAX_CHANGES)):
            if len(keys) + len(stored) <= MAX_CHANGES:
                self._commit(keys, stored)
                return
            self._commit(keys, ())
        for at in range(0, len(stored), MAX_CHANGES):
            self._commit((), stored[at : at + MAX_CHANGES])

    def _commit(self, removed: Sequence[bytes], stored: Sequence[Entry]) -> None:
        try:
            with self._env.begin(write=True) as transaction:
                for key in removed:
                    transaction.delete(key)
                for key, *values in stored:
                    transaction.put(key, VALUE.pack(*values))
        except self._lmdb.MapFullError:
            self._env.set_mapsize(2 * self._env.info()["map_size"])
            self._commit(removed, stored)

    def sync(self) -> None:
        """Wait until all transactions are on the disk."""
        self._env.sync(True)

    def close(self) -> None:
        """Close it; may be repeated."""
        self._env.close()

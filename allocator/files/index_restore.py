"""``restored_index``: the index that an earlier process has left, or what is readable of it.

If a page of it is damaged, the entries that could be read are written to a new file, which replaces
it. None of them is trusted for that: a chunk's checksum is compared at every load.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from kvheap.files.chunk_index import ChunkIndex, Entry
from kvheap.files.index_pages import IndexContents, read_index
from kvheap.files.packages import need_lmdb

__all__ = ["RestoredIndex", "restored_index"]

LOGGER = logging.getLogger("kvheap")


class RestoredIndex(NamedTuple):
    """An index and what was in it.

    Attributes:
        opened: the index, for use.
        entries: what it has.
        num_dropped: how many entries were of no use; at least 1 if it was made anew.
    """

    opened: ChunkIndex
    entries: list[Entry]
    num_dropped: int


def restored_index(path: Path, num_places: int, is_durable: bool) -> RestoredIndex:
    """Open an index; make it if it is missing, and anew if it is damaged.

    Args:
        path: its file.
        num_places: how many chunks there can be.
        is_durable: synchronize each transaction.

    Raises:
        ImportError: lmdb is not installed.
        OSError: it cannot be opened or written.
    """
    lmdb = need_lmdb()
    try:
        contents: IndexContents | None = IndexContents([], 0, None)
        with suppress(FileNotFoundError):
            contents = read_index(path)
        if contents is not None and contents.damage is not None:
            _make_anew(path, contents.entries, num_places, is_durable)
            LOGGER.warning(
                "the index %s was damaged (%s): it was made anew with the %d chunks that could be "
                "read",
                path,
                contents.damage,
                len(contents.entries),
            )
        index = ChunkIndex(path, num_places, is_durable)
        if contents is not None:
            is_new = contents.damage is not None
            return RestoredIndex(index, contents.entries, max(contents.num_wrong, int(is_new)))
        found = [*index.entries()]  # as LMDB reads them
        entries = [entry for entry in found if isinstance(entry, Entry)]
        index.write([key for key in found if not isinstance(key, Entry)])
        return RestoredIndex(index, entries, len(found) - len(entries))
    except lmdb.Error as error:
        code = getattr(error, "code", 0) or 0
        if code > 0:  # an error of the system, such as a full disk: the index is not to blame
            raise OSError(code, os.strerror(code), str(path)) from error
        advice = "delete it to begin empty" if code else "close what has it open"
        raise OSError(f"the index {path} cannot be used: {error}: {advice}") from error


def _make_anew(path: Path, entries: Sequence[Entry], num_places: int, is_durable: bool) -> None:
    new = path.with_name(f"{path.name}.new")
    with suppress(FileNotFoundError):
        os.unlink(new)
    index = ChunkIndex(new, num_places, is_durable)
    try:
        index.write([], entries)
        if is_durable:
            index.sync()
    finally:
        index.close()
    os.replace(new, path)

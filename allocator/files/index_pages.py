"""``read_index``: the entries of an index, by its pages, and whether all of them are whole.

LMDB trusts its file: it has no checksums, and maps it. A file that was cut off, or has a changed
bit, can end the process, by a read behind its end or by an assertion. So before LMDB opens a file
that an earlier process has left, its pages are read here, where nothing is trusted. Format version
1, of LMDB 0.9, on machines with 64-bit pointers (``mdb.c``: ``MDB_meta``, ``MDB_page``,
``MDB_node``)::

    page 0, 1   metas: format, the roots of two trees, the last page, the transaction; the later
                transaction counts
    a page      its number, flags, where its nodes begin and end; an offset for each node
    a node      in a branch: the first key below a page, and that page; in a leaf: a key and a value

One tree has the entries, and the other one which pages are free.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from kvheap.files.chunk_index import MAX_KEY_BYTES, VALUE, Entry
from kvheap.memory.descriptors import Descriptor

__all__ = ["IndexContents", "read_index"]

MAGIC, VERSION = 0xBEEFC0DE, 1
PAGE = struct.Struct("<QHHHH")  # number, pad, flags, lower, upper
META = struct.Struct("<IIQQ" + 2 * "IHHQQQQQ" + "QQ")
TREE_FIELDS = 8
NODE = struct.Struct(
    "<HHHH"
)  # three parts of a size or a page number, the last one flags; key size
COUNT = struct.Struct("<Q")

BRANCH, LEAF, OVERFLOW = 1, 2, 4
IS_BIG = 1
"""Of a node: its value is on pages of its own."""

NO_PAGE = (1 << 64) - 1
MAX_DEPTH = 32


class _DamageError(Exception):
    """A page is not what LMDB writes; the message says what."""


class _Tree(NamedTuple):
    flags: int
    depth: int
    num_branches: int
    num_leaves: int
    num_entries: int
    root: int


class _Meta(NamedTuple):
    page_bytes: int
    free: _Tree
    main: _Tree
    last_page: int
    transaction: int


class IndexContents(NamedTuple):
    """What is in an index.

    Attributes:
        entries: those that could be read, in the order of their keys.
        num_wrong: how many others are none.
        damage: what is wrong; None: all is whole.
    """

    entries: list[Entry]
    num_wrong: int
    damage: str | None


def read_index(path: Path) -> IndexContents | None:
    """Read all pages of an index that no process has open. O(pages).

    Returns:
        What is in it; None if it has a format that is not known here.

    Raises:
        OSError: the file cannot be read; FileNotFoundError: there is none.
    """
    file = Descriptor(path, os.O_RDONLY)
    fd = file.fd
    try:
        if not os.fstat(fd).st_size:
            return IndexContents([], 0, None)
        if sys.byteorder != "little" or struct.calcsize("P") != 8:
            return None
        return _Pages(fd).read()
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        file.close()


class _Pages:
    """The pages of one file."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._page_bytes = 0
        self._last_page = 0
        self._damage: str | None = None
        self._seen = {0, 1}

    def read(self) -> IndexContents | None:
        entries: list[Entry] = []
        num_wrong = 0
        try:
            meta = self._meta()
            if meta is None:
                return None
            for key, value, _ in self._items(meta.main):
                if len(value) == VALUE.size and 0 < len(key) <= MAX_KEY_BYTES:
                    entries.append(Entry(key, *VALUE.unpack(value)))
                else:
                    num_wrong += 1
            self._read_free(meta.free)
        except _DamageError as error:
            self._note(error)
        if num_wrong:
            self._note(f"{num_wrong} entries are none")
        return IndexContents(entries, num_wrong, self._damage)

    def _note(self, damage: object) -> None:
        """Keep the first damage that is found; what else can be read is read."""
        self._damage = self._damage or str(damage)

    def _meta(self) -> _Meta | None:
        """The meta page that counts; None: another format."""
        first = self._meta_at(0)
        if first is None:
            return None
        size = first.page_bytes
        if size < 512 or size > 1 << 16 or size & (size - 1):
            raise _DamageError(f"pages have {size} bytes")
        second = self._meta_at(size)
        if second is None:
            return None
        later = max(first, second, key=lambda meta: meta.transaction)
        if second.page_bytes != size:
            raise _DamageError("the two meta pages differ in the size of pages")
        self._page_bytes, self._last_page = size, later.last_page
        if self._last_page > os.fstat(self._fd).st_size // size + (1 << 20):
            raise _DamageError(f"the last page is {self._last_page}")
        return later

    def _meta_at(self, at: int) -> _Meta | None:
        raw = os.pread(self._fd, META.size, at + PAGE.size)
        if len(raw) < META.size:
            raise _DamageError("it ends within its first pages")
        magic, version, _, _, *rest = META.unpack(raw)
        if magic != MAGIC:
            raise _DamageError("it is no file of LMDB")
        if version != VERSION:
            return None
        trees = []
        for each in (rest[:TREE_FIELDS], rest[TREE_FIELDS : 2 * TREE_FIELDS]):
            _, flags, depth, branches, leaves, _, num_entries, root = each
            trees.append(_Tree(flags, depth, branches, leaves, num_entries, root))
        return _Meta(rest[0], trees[0], trees[1], *rest[-2:])

    def _page(self, number: int, num_pages: int = 1) -> bytes:
        """The bytes of pages that nothing else has."""
        for each in range(number, number + num_pages):
            if each > self._last_page or each in self._seen:
                raise _DamageError(f"page {each} is none, or is used twice")
            self._seen.add(each)
        size = num_pages * self._page_bytes
        raw = os.pread(self._fd, size, number * self._page_bytes)
        if len(raw) < size:
            self._note(f"it ends before the end of page {number}")
            raw = raw.ljust(size, b"\0")
        if PAGE.unpack_from(raw)[0] != number:
            raise _DamageError(f"page {number} has another number")
        return raw

    def _items(self, tree: _Tree) -> Iterator[tuple[bytes, bytes, bool]]:
        """The keys of a tree in order, with their values, and whether each is a page's number.

        Without those of pages that are damaged.
        """
        if tree.root == NO_PAGE:
            if tree.num_entries or tree.depth:
                raise _DamageError("a tree with entries has no root")
            return
        if not 0 < tree.depth <= MAX_DEPTH:
            raise _DamageError(f"a tree has {tree.depth} levels")
        is_integer = bool(tree.flags & 8)
        counts = [0, 0, 0]  # branches, leaves, entries
        before: bytes | None = None
        # Pages to read, the next one last: number, level, least key, key that is too large.
        left: list[tuple[int, int, bytes | None, bytes | None]] = [(tree.root, 1, None, None)]
        while left:
            number, level, least, bound = left.pop()
            is_leaf = level == tree.depth
            try:
                nodes = self._nodes(number, self._page(number), is_leaf)
            except _DamageError as error:
                self._note(error)
                continue
            counts[is_leaf] += 1
            if is_leaf:
                for key, value, is_big in nodes:
                    order = key[::-1] if is_integer else key
                    if (
                        (before is not None and order <= before)
                        or (least is not None and order < least)
                        or (bound is not None and order >= bound)
                    ):
                        self._note(f"the keys of page {number} are not in order")
                        continue
                    before = order
                    counts[2] += 1
                    yield key, value, is_big
                continue
            keys = [least, *[key[::-1] if is_integer else key for key, _, _ in nodes[1:]], bound]
            for at in reversed(range(len(nodes))):
                child = int.from_bytes(nodes[at][1], "little")
                left.append((child, level + 1, keys[at], keys[at + 1]))
        if counts != [tree.num_branches, tree.num_leaves, tree.num_entries]:
            self._note("a tree has other numbers of pages or entries than it says")

    def _nodes(self, number: int, page: bytes, is_leaf: bool) -> list[tuple[bytes, bytes, bool]]:
        """The nodes of a page: key, value or page number, and whether the value is elsewhere."""
        _, _, flags, lower, upper = PAGE.unpack_from(page)
        size = len(page)
        num_nodes = (lower - PAGE.size) // 2
        if flags != (LEAF if is_leaf else BRANCH):
            raise _DamageError(f"page {number} is of another kind")
        if lower % 2 or not PAGE.size < lower <= upper <= size or (not is_leaf and num_nodes < 2):
            raise _DamageError(f"page {number} has other bounds")
        nodes: list[tuple[bytes, bytes, bool]] = []
        used = 0
        for at in struct.unpack_from(f"<{num_nodes}H", page, PAGE.size):
            if at < upper or at + NODE.size > size or at % 2:
                raise _DamageError(f"page {number} has a node elsewhere")
            low, high, top, key_bytes = NODE.unpack_from(page, at)
            begin = at + NODE.size + key_bytes
            if not is_leaf:
                length, value = 0, page[at : at + 6]
            elif top == IS_BIG:
                length, value = 8, page[begin : begin + 8]
            elif top:
                raise _DamageError(f"page {number} has a node of another kind")
            else:
                length = low | high << 16
                value = page[begin : begin + length]
            if begin + length > size:
                raise _DamageError(f"page {number} has a node that is too long")
            used += (NODE.size + key_bytes + length + 1) & ~1
            nodes.append((page[at + NODE.size : begin], value, bool(is_leaf and top)))
        if used != size - upper:
            raise _DamageError(f"page {number} has nodes of another size")
        return nodes

    def _read_free(self, tree: _Tree) -> None:
        """Look at the list of free pages."""
        if not tree.flags & 8:
            raise _DamageError("the tree of free pages is of another kind")
        free: set[int] = set()
        for _, value, is_big in self._items(tree):
            numbers = self._big(int.from_bytes(value, "little")) if is_big else value
            if len(numbers) < COUNT.size:
                raise _DamageError("a list of free pages is too short")
            (count,) = COUNT.unpack_from(numbers)
            if COUNT.size * (count + 1) > len(numbers):
                raise _DamageError("a list of free pages is too short")
            found = struct.unpack_from(f"<{count}Q", numbers, COUNT.size)
            is_falling = all(a > b for a, b in pairwise(found))
            if not is_falling or not free.isdisjoint(found):
                raise _DamageError("a list of free pages is not in order")
            free.update(found)
        if free and (min(free) < 2 or max(free) > self._last_page or free & self._seen):
            raise _DamageError("a page is free and used")

    def _big(self, number: int) -> bytes:
        """A value on pages of its own."""
        with suppress(struct.error):
            raw = os.pread(self._fd, PAGE.size, number * self._page_bytes)
            _, _, flags, low, high = PAGE.unpack(raw)
            num_pages = low | high << 16
            if flags == OVERFLOW and 0 < num_pages <= self._last_page:
                return self._page(number, num_pages)[PAGE.size :]
        raise _DamageError(f"page {number} is of another kind")

"""``RestartIndex``: lets the next process find the chunks that this one leaves in its heaps.

When the workers have ended, the scheduler writes what is in their heaps to an index. When it
starts, it reads the index, removes it, and finds the chunks again, if the index belongs to this
model, to this layout, and to the very bytes that the workers have found in their heaps. Otherwise
it says what differs, and begins with an empty tier.

An index serves once. It is removed before the engine stores anything; and even if it came back, the
ids in it would no longer be those of the heaps (see ``heap_label``).

Needs no vLLM.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from kvheap.forks import starts_over_after_fork
from kvheap.guards import read_meanwhile
from kvheap.integrations.vllm.chunk_store import ChunkStore
from kvheap.integrations.vllm.heap_label import HeapReport
from kvheap.integrations.vllm.heap_watch import watch_heaps
from kvheap.integrations.vllm.index_file import IndexFile
from kvheap.integrations.vllm.index_format import IndexRefusedError, SavedIndex, decode, encode

__all__ = ["RestartIndex"]

logger = logging.getLogger(__name__)

SHOWN = 80
"""Characters of a value that a message shows."""


class RestartIndex:
    """The index of one scheduler.

    Args:
        path: its file.
        identity: by name, what must be the same for chunks to be of use: model, layout, hashes.
        num_workers: how many workers have a heap.

    Raises:
        BlockingIOError, OSError: as for ``IndexFile``.
    """

    def __init__(self, path: str, identity: Mapping[str, str], num_workers: int) -> None:
        self._file = IndexFile(path)
        self._identity = dict(identity)
        self._num_workers = num_workers
        self._heaps: dict[int, str] | None = None
        self._mutex = threading.Lock()
        self._is_saved = False
        starts_over_after_fork(self)

    def start_over_after_fork(self) -> None:
        """Leave the index to the parent: the heaps are the parent's workers'."""
        self._mutex = threading.Lock()
        self._is_saved = True

    def restore(self, store: ChunkStore[Any], reports: Iterable[HeapReport]) -> list[Any]:
        """Find the chunks of the process before. Whatever is wrong, it costs the chunks only.

        Args:
            store: empty.
            reports: of all workers, which have given their heaps new ids.

        Returns:
            The keys of the chunks; none at a second call.
        """
        if self._heaps is not None:
            return []
        found = {report.rank: report for report in reports}
        self._heaps = {}
        if len(found) != self._num_workers:
            logger.warning(
                "index_path is not used: of %d workers, %d have said which heap they have",
                self._num_workers,
                len(found),
            )
            return []
        self._heaps = {rank: report.current for rank, report in sorted(found.items())}
        for rank, report in sorted(found.items()):
            self._identity[f"KV cache of worker {rank}"] = report.layout
        try:
            return self._restored(store, found)
        except Exception as error:  # the engine begins without these chunks
            store.reset()
            logger.warning(
                "the index %s is not used, and the tier begins empty: %s", self._file.path, error
            )
            return []
        finally:
            self._watch(store, found.values())

    def _restored(self, store: ChunkStore[Any], found: Mapping[int, HeapReport]) -> list[Any]:
        index = self._take()
        if index is None:
            logger.info("there is no index %s: the tier begins empty", self._file.path)
            return []
        require_same(self._identity, index.identity)
        require_heaps(index.heaps, found)
        store.restore(index.records)
        keys = index.records.keys
        logger.info("found %d chunks of an earlier process by %s", len(keys), self._file.path)
        return list(keys)

    def _watch(self, store: ChunkStore[Any], reports: Iterable[HeapReport]) -> None:
        """Save as soon as the workers have ended, since nothing changes the bytes then."""
        try:
            watch_heaps([report.path for report in reports], lambda: self.save(store))
        except OSError as error:  # of a worker on another machine
            logger.warning("the index is written when the scheduler is shut down: %s", error)

    def save(self, store: ChunkStore[Any]) -> None:
        """Write what is in the store, once, and let go of the file. Errors are logged.

        The workers must have ended. From any thread: the store may change meanwhile.
        """
        with self._mutex:
            if self._is_saved:
                return
            self._is_saved = True
            try:
                if self._heaps and len(store):
                    index = SavedIndex(self._identity, self._heaps, read_meanwhile(store.records))
                    self._file.write(encode(index))
            except Exception as error:  # the engine ends all the same
                logger.warning("the index %s could not be written: %s", self._file.path, error)
            finally:
                self._file.close()

    def _take(self) -> SavedIndex | None:
        """The contents of the file, which is gone then."""
        try:
            data = self._file.read()
        finally:
            self._file.remove()
        return None if data is None else decode(data)


def require_same(mine: Mapping[str, str], its: Mapping[str, str]) -> None:
    """Raise unless an index has this identity.

    Raises:
        IndexRefusedError: names what differs.
    """
    differences = [
        f"{name} is {_short(mine.get(name))}, was {_short(its.get(name))}"
        for name in dict.fromkeys([*mine, *its])
        if mine.get(name) != its.get(name)
    ]
    if differences:
        raise IndexRefusedError("; ".join(differences))


def require_heaps(heaps: Mapping[int, str], found: Mapping[int, HeapReport]) -> None:
    """Raise unless the workers have found the bytes that an index belongs to.

    Raises:
        IndexRefusedError: names the first worker that has not, and its file.
    """
    for rank, report in found.items():
        if report.previous is None or heaps.get(rank) != report.previous:
            why = report.why or "its bytes were changed after the index was written"
            raise IndexRefusedError(f"the heap {report.path} is not the one it belongs to: {why}")


def _short(value: str | None) -> str:
    if value is None:
        return "nothing"
    return value if len(value) <= SHOWN else f"{value[:SHOWN]}..."

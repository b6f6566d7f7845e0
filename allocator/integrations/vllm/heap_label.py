"""``HeapLabel``: the page before a heap's bytes in its file, which says whose bytes they are.

A label has a random id, and it gets another one before a process changes the first byte of the
heap. So an index that names the id was written by the last process that changed the bytes, however
the index got here, and whatever the processes in between knew of it.

Bytes of a file that a process wrote outlive it, but not a restart of the machine, unless they were
flushed. A label is therefore valid in the boot in which it was written, or if it was sealed.

Needs no vLLM.
"""

from __future__ import annotations

import logging
import struct
import uuid
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvheap.memory.boots import boot_id

__all__ = ["LABEL_BYTES", "HeapLabel", "HeapReport"]

logger = logging.getLogger(__name__)

LABEL_BYTES = 4096
"""Bytes of the label at the start of the file: a page, so that the heap begins at one."""

MAGIC = b"kvheap heap file"
VERSION = 1

LABEL = struct.Struct("<16sIIQ32s36s")
"""Magic, version, whether it is sealed, bytes of the heap, id, and boot; then its CRC-32."""

CRC = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class HeapReport:
    """What a worker tells the scheduler about its heap's file.

    Attributes:
        rank: of the worker.
        path: of the file.
        previous: the id of the bytes that it found; None: they are of no use.
        why: why they are of no use.
        current: the id of what is stored from now on.
        layout: how a page of the worker's KV cache is laid out.
    """

    rank: int
    path: str
    previous: str | None
    why: str
    current: str
    layout: str


class HeapLabel:
    """The label of a file that this process has locked.

    Args:
        page: the first bytes of the file, mapped and writable, uint8 ``[LABEL_BYTES]``.
        heap_bytes: bytes of the heap behind it.
        flush: writes the file to its medium.
        boot: names the boot of the machine.

    Attributes:
        previous: the id of the bytes as they were found; None: they are of no use.
        why: why they are of no use.
        current: the id of the bytes from :meth:`renew` on.
    """

    def __init__(
        self,
        page: npt.NDArray[np.uint8],
        heap_bytes: int,
        flush: Callable[[], None],
        boot: str | None = None,
    ) -> None:
        self._page = page
        self._heap_bytes = heap_bytes
        self._flush = flush
        self._boot = boot_id() if boot is None else boot
        self._is_renewed = False
        self.why = ""
        self.previous = self._read()
        self.current = uuid.uuid4().hex

    def renew(self) -> None:
        """Give the bytes another id: an index of what was there is not valid any more.

        Must be called before the first byte of the heap changes. Further calls do nothing.
        """
        if not self._is_renewed:
            self._write(is_sealed=False)
            self._try_to_flush()
            self._is_renewed = True

    def seal(self) -> None:
        """Flush the bytes, and say so, so that they outlive the machine's restart.

        Nothing may change them afterwards. Does nothing if they have not changed.
        """
        if self._is_renewed and self._try_to_flush():
            self._write(is_sealed=True)
            self._try_to_flush()

    def close(self) -> None:
        """Let go of the page, so that it can be unmapped."""
        self._page = np.empty(0, np.uint8)
        self._is_renewed = False

    def _read(self) -> str | None:
        raw = self._page[: LABEL.size + CRC.size].tobytes()
        text, crc = raw[: LABEL.size], raw[LABEL.size :]
        magic, version, is_sealed, heap_bytes, label_id, boot = LABEL.unpack(text)
        if magic != MAGIC:
            self.why = "it is new"
        elif version != VERSION or CRC.unpack(crc)[0] != zlib.crc32(text):
            self.why = "its label is damaged"
        elif heap_bytes != self._heap_bytes:
            self.why = f"it had {heap_bytes} bytes, and has {self._heap_bytes} now"
        elif not is_sealed and (not self._boot or boot.rstrip(b"\0") != self._boot.encode()):
            self.why = "the machine has restarted before it was flushed"
        else:
            return str(label_id.decode("latin-1"))
        return None

    def _write(self, *, is_sealed: bool) -> None:
        text = LABEL.pack(
            MAGIC,
            VERSION,
            is_sealed,
            self._heap_bytes,
            self.current.encode(),
            self._boot.encode(),
        )
        raw = text + CRC.pack(zlib.crc32(text))
        self._page[: len(raw)] = np.frombuffer(raw, np.uint8)

    def _try_to_flush(self) -> bool:
        try:
            self._flush()
        except OSError as error:
            logger.warning("heap_path could not be flushed: %s", error)
            return False
        return True

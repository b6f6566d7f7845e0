"""``opened``: the bytes of a file, decompressed if it is compressed, whatever its name says.

Python reads gzip, bzip2 and xz. Other kinds are recognised, so that the error can say how to
decompress them. A file of a few bytes that decompresses to many must not fill the memory: bytes are
decompressed as they are read, a buffer at a time; a file of xz may want ``DICTIONARY_BYTES`` at
most; and a file that grows more than ``MAX_GROWTH`` times is refused once it is large.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

__all__ = ["opened"]

DICTIONARY_BYTES = 256 << 20
"""``xz -9`` needs 65 MiB."""

MAX_GROWTH = 200
"""JSON lines of requests grow 3 to 20 times."""

SMALL_BYTES = 256 << 20
"""Up to this many bytes, any growth is fine."""

READ_BYTES = 1 << 16


class Decompressor(Protocol):
    """What those of ``bz2`` and ``lzma`` have."""

    @property
    def eof(self) -> bool:
        """Whether the stream has ended."""

    @property
    def needs_input(self) -> bool:
        """Whether there is nothing more to decompress in what it was given."""

    @property
    def unused_data(self) -> bytes:
        """What follows the end of the stream."""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """At most so many decompressed bytes."""


class Kind(NamedTuple):
    """A kind of compressed files that Python reads: its name, module, and a new decompressor."""

    name: str
    module: str
    make: Callable[[Any], Decompressor]


KINDS = {
    b"\x1f\x8b": Kind("gzip", "zlib", lambda zlib: _Gzip(zlib.decompressobj(wbits=31))),
    b"BZh": Kind("bzip2", "bz2", lambda bz2: bz2.BZ2Decompressor()),
    b"\xfd7zXZ\x00": Kind(
        "xz",
        "lzma",
        lambda lzma: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=DICTIONARY_BYTES),
    ),
}
"""By how their files begin."""

OTHERS = {
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -d"),
    b"\x04\x22\x4d\x18": ("lz4", "lz4 -d"),
    b"LZIP": ("lzip", "lzip -d"),
    b"\x1f\x9d": ("compress", "uncompress"),
    b"\x5d\x00\x00": ("lzma", "xz -d --format=lzma"),
    b"\xff\x06\x00\x00sNaP": ("snappy", "snzip -d"),
    b"PK\x03\x04": ("zip", "unzip"),
    b"7z\xbc\xaf\x27\x1c": ("7z", "7z x"),
    b"Rar!\x1a\x07": ("rar", "unrar x"),
}
"""Kinds that Python cannot read as a stream, and what decompresses them."""

ZSTD_SKIPPABLE = range(0x184D2A50, 0x184D2A60)
"""A frame of zstd may begin with one of these numbers instead, little-endian."""

PEEKED_BYTES = max(map(len, (*KINDS, *OTHERS)))


def opened(path: Path) -> io.BufferedReader:
    """Open a file for reading, decompressed.

    Raises:
        ValueError: it is compressed in a way that cannot be read here; or, as it is read, it is
            damaged, or grows too much. The message says so.
        OSError: it cannot be read.
    """
    file = path.open("rb")  # once: a pipe cannot be read again
    try:
        head = file.peek(PEEKED_BYTES)[:PEEKED_BYTES]
        for magic, kind in KINDS.items():
            if head.startswith(magic):
                return io.BufferedReader(_Decompressed(file, kind), READ_BYTES)
        _refuse_others(head, path)
        return file
    except BaseException:
        file.close()
        raise


def _refuse_others(head: bytes, path: Path) -> None:
    is_zstd = len(head) >= 4 and int.from_bytes(head[:4], "little") in ZSTD_SKIPPABLE
    for magic, (name, tool) in OTHERS.items():
        if head.startswith(magic) or (is_zstd and name == "zstd"):
            raise ValueError(
                f"a file compressed by {name}: decompress it first, with {tool} {path.name}. "
                f"Traces are JSON lines, as they are or compressed by gzip, bzip2 or xz"
            )


class _Gzip:
    """zlib's decompressor of a stream of gzip, with the attributes of the other two."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.needs_input = True

    @property
    def eof(self) -> bool:
        """Whether the stream has ended."""
        return bool(self._inner.eof)

    @property
    def unused_data(self) -> bytes:
        """What follows the end of the stream."""
        return bytes(self._inner.unused_data)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """At most so many decompressed bytes."""
        found: bytes = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        self.needs_input = not self._inner.unconsumed_tail and len(found) < max_length
        return found


class _Decompressed(io.RawIOBase):
    """The contents of a compressed file, which may have several streams one after another.

    Args:
        file: the compressed bytes; closed with this.
        kind: how they are compressed.

    Raises:
        ValueError: Python was built without what reads them.
    """

    def __init__(self, file: io.BufferedReader, kind: Kind) -> None:
        self._file = file
        self._kind = kind
        self._decompressor: Decompressor | None = None
        self._bytes_in = self._bytes_out = 0
        try:
            self._library = import_module(kind.module)
        except ImportError:
            raise ValueError(
                f"a file compressed by {kind.name}, which this Python was built without: "
                f"decompress it first"
            ) from None

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Decompress into a buffer; returns how many bytes, 0 at the end.

        Raises:
            ValueError: the file is damaged, or grows too much.
        """
        found = b""
        while not found:
            decompressor, data = self._decompressor, b""
            if decompressor is None or decompressor.eof:
                data = self._next_stream(b"" if decompressor is None else decompressor.unused_data)
                if not data:
                    return 0
                self._decompressor = decompressor = self._kind.make(self._library)
            elif decompressor.needs_input:
                data = self._read()
                if not data:
                    raise self._damaged("it ends too early")
            try:
                found = decompressor.decompress(data, len(buffer))
            except MemoryError:
                raise
            except Exception as error:  # zlib.error, OSError or LZMAError
                raise self._damaged(str(error)) from None
        buffer[: len(found)] = found
        self._bytes_out += len(found)
        if self._bytes_out > max(SMALL_BYTES, MAX_GROWTH * self._bytes_in):
            raise ValueError(
                f"{self._bytes_in} bytes of {self._kind.name} decompress to more than "
                f"{self._bytes_out}, which no trace does: if it is one, decompress it first"
            )
        return len(found)

    def _read(self) -> bytes:
        data = self._file.read1(READ_BYTES)
        self._bytes_in += len(data)
        return data

    def _next_stream(self, unused: bytes) -> bytes:
        """The beginning of the next stream, which zeros may precede; empty at the end."""
        data = unused.lstrip(b"\0")
        while not data:
            read = self._read()
            if not read:
                break
            data = read.lstrip(b"\0")
        return data

    def _damaged(self, reason: str) -> ValueError:
        return ValueError(f"the {self._kind.name} file is damaged: {reason}")

    def close(self) -> None:
        """Close the file too."""
        super().close()
        self._file.close()

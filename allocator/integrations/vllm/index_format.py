"""The bytes of an index: which chunks a process left in its heap, and what they belong to.

A header of fixed size (magic, format, lengths), a JSON object, arrays of little-endian integers,
and a BLAKE2b checksum of all that. No pickle: whoever can write the file can change which bytes are
taken for which chunk, but run nothing.

Needs no vLLM.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from kvheap.integrations.vllm.store_values import ChunkRecords

__all__ = [
    "HEADER_BYTES",
    "MAGIC",
    "IndexRefusedError",
    "SavedIndex",
    "decode",
    "encode",
    "total_bytes",
]

MAGIC = b"kvheapix"
"""What every index begins with."""

FORMAT = 1
"""What this version writes, and the only one that it reads."""

HEADER = struct.Struct("<8sIIQ")
"""Magic, format, bytes of the JSON object, bytes of everything."""

HEADER_BYTES = HEADER.size
CHECKSUM_BYTES = 32

SPAN_NUMBERS = 3


class IndexRefusedError(ValueError):
    """An index cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class SavedIndex:
    """The contents of an index.

    Attributes:
        identity: by name, what must be the same for the chunks to be of use.
        heaps: by rank of a worker, the id of the bytes in its heap.
        records: the chunks.
    """

    identity: Mapping[str, str]
    heaps: Mapping[int, str]
    records: ChunkRecords[bytes]


def encode(index: SavedIndex) -> bytes:
    """The index as bytes. O(N)."""
    records = index.records
    description = {
        "identity": dict(index.identity),
        "heaps": {str(rank): heap for rank, heap in index.heaps.items()},
        "num_chunks": len(records.keys),
        "num_spans": len(records.spans),
    }
    text = json.dumps(description).encode()
    parts = [
        text,
        np.array([len(key) for key in records.keys], "<u4").tobytes(),
        records.groups.astype("<u4").tobytes(),
        records.addresses.astype("<i8").tobytes(),
        records.spans.astype("<i8").tobytes(),
        b"".join(records.keys),
    ]
    total = HEADER_BYTES + sum(map(len, parts)) + CHECKSUM_BYTES
    body = b"".join([HEADER.pack(MAGIC, FORMAT, len(text), total), *parts])
    return body + blake2b(body, digest_size=CHECKSUM_BYTES).digest()


def total_bytes(header: bytes) -> int:
    """How many bytes an index has that begins with these ``HEADER_BYTES``.

    Raises:
        IndexRefusedError: it is no index, or one of another format.
    """
    if len(header) < HEADER_BYTES:
        raise IndexRefusedError(f"it is cut off after {len(header)} bytes")
    magic, number, _, total = HEADER.unpack(header)
    if magic != MAGIC:
        raise IndexRefusedError(f"it is no index of kvheap: it begins with {bytes(magic)!r}")
    if number != FORMAT:
        raise IndexRefusedError(f"it has format {number}; this kvheap reads format {FORMAT}")
    return int(total)


def decode(data: bytes) -> SavedIndex:
    """The contents of an index. O(N).

    Raises:
        IndexRefusedError: the bytes are no index, cut off, damaged, or of another format.
    """
    total = total_bytes(data[:HEADER_BYTES])
    if len(data) != total:
        raise IndexRefusedError(f"it has {len(data)} bytes instead of {total}")
    body, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
    if blake2b(body, digest_size=CHECKSUM_BYTES).digest() != checksum:
        raise IndexRefusedError("it is damaged: its checksum is wrong")
    try:
        return _parsed(body)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IndexRefusedError(f"its contents are wrong: {error!r}") from None


def _parsed(body: bytes) -> SavedIndex:
    start = HEADER_BYTES + HEADER.unpack(body[:HEADER_BYTES])[2]
    description = json.loads(body[HEADER_BYTES:start])
    count, spans = description["num_chunks"], description["num_spans"]

    def array(dtype: str, length: int) -> np.typing.NDArray[np.int64]:
        nonlocal start
        found = np.frombuffer(body, dtype, length, start)
        start += found.nbytes
        return found.astype(np.int64)

    lengths, groups = array("<u4", count), array("<u4", count)
    addresses, numbers = array("<i8", count), array("<i8", SPAN_NUMBERS * spans)
    ends = start + np.cumsum(lengths)
    if len(body) != (ends[-1] if count else start):
        raise ValueError(f"{len(body)} bytes are not those of {count} keys")
    keys = [
        body[end - length : end]
        for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)
    ]
    return SavedIndex(
        {str(name): str(value) for name, value in description["identity"].items()},
        {int(rank): str(heap) for rank, heap in description["heaps"].items()},
        ChunkRecords(keys, addresses, groups, numbers.reshape(-1, SPAN_NUMBERS)),
    )

"""Request traces: one JSON object per line, as published with Mooncake (FAST'25) and Qwen-Bailian.

``input_length`` and ``output_length`` are in tokens; ``hash_ids`` names the chunks of the prompt in
order. Equal ids mean equal KV, because an id stands for the chunk and everything before it. Other
fields are ignored. Where publishers and tools differ:

- ``timestamp`` is in ms (Mooncake), or in seconds: where a row has a ``chat_id`` (Bailian), or a
  timestamp a fraction. A row without one arrives with the row before it;
- ids are signed or unsigned 64-bit integers, but not both in one file;
- a chunk has 512 tokens (Mooncake), 16 (Bailian), or another number, which
  :func:`infer_chunk_tokens` finds from the lengths;
- the file may be compressed by gzip, bzip2 or xz, and have blank lines.
"""

from __future__ import annotations

import json
import math
import random
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

from kvheap.addresses.arguments import require_count
from kvheap.addresses.integers import as_integer
from kvheap.replay.compression import opened

__all__ = [
    "CHUNK_TOKENS",
    "Request",
    "TraceError",
    "infer_chunk_tokens",
    "read_trace",
    "synthetic_trace",
]

CHUNK_TOKENS = 512
"""Tokens of the chunk that a hash id names, where the lengths do not say otherwise."""

INT64_END = 1 << 63
"""Ids and counts must fit int64, because they are put into int64 tensors and arrays."""

MAX_LINE_BYTES = 16 << 20
"""A prompt of a million chunks has shorter lines."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a trace.

    Attributes:
        timestamp_ms: when it arrives, rounded.
        input_length, output_length: tokens of its prompt and of its answer.
        hash_ids: ids of the prompt's chunks, in order, int64; unsigned ones are wrapped around.
    """

    timestamp_ms: int
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


class TraceError(ValueError):
    """A line of a trace is not a request.

    Attributes:
        path: the file.
        line_number: the line, counted from 1.
        reason: what is wrong with the line.
    """

    def __init__(self, path: Path, line_number: int, reason: str) -> None:
        super().__init__(f"{path}, line {line_number}: {reason}")
        self.path = path
        self.line_number = line_number
        self.reason = reason

    def __reduce__(self) -> tuple[type[TraceError], tuple[Path, int, str]]:
        return type(self), (self.path, self.line_number, self.reason)


def read_trace(path: Path | str, limit: int | None = None) -> list[Request]:
    """Read the first ``limit`` requests of a file; None: all.

    Raises:
        TypeError: ``path`` is not a path, or ``limit`` not an integer.
        ValueError: ``limit`` is negative.
        TraceError: a line is malformed, or the file is compressed in another way than by gzip,
            bzip2 or xz, or damaged; the message says which and why.
        OSError: the file cannot be read.
    """
    if not isinstance(path, (str, Path)):
        raise TypeError(f"path must be a path, got {path!r}")
    path = Path(path)
    if limit is not None:
        limit = require_count("limit", limit)
    rows: list[_Row] = []
    line_number = 1
    try:
        with opened(path) as lines:
            line_number = 0
            while limit is None or len(rows) < limit:
                line_number += 1
                line = lines.readline(MAX_LINE_BYTES + 1)
                if not line:
                    break
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(f"longer than {MAX_LINE_BYTES} bytes")
                if line.strip():
                    rows.append(_parse(line, line_number))
        if not rows and line_number > 1:
            line_number = 1
            raise ValueError("not JSON: the line is blank, and so are all others")
        seconds = any(row.is_of_seconds for row in rows)
        signs = _Signs()
        requests: list[Request] = []
        for row in rows:
            line_number = row.line_number
            before_ms = requests[-1].timestamp_ms if requests else 0
            requests.append(
                Request(
                    before_ms if row.timestamp is None else _milliseconds(row.timestamp, seconds),
                    row.input_length,
                    row.output_length,
                    signs.as_int64(row.hash_ids),
                )
            )
    except ValueError as error:
        raise TraceError(path, line_number, str(error)) from None
    return requests


def infer_chunk_tokens(requests: Sequence[Request]) -> int:
    """How many tokens a chunk of a trace has, by the lengths of its prompts and of its ids.

    A prompt of T tokens has ``ceil(T / n)`` ids; where only full chunks have ids, ``T // n``.

    Returns:
        512 if that fits all requests; else the largest power of two that does; 512 if none does.

    Raises:
        TypeError: ``requests`` is not a list of requests.

    >>> infer_chunk_tokens([Request(0, 521, 132, tuple(range(33)))])
    16
    """
    if not isinstance(requests, Sequence) or not all(isinstance(r, Request) for r in requests):
        raise TypeError(f"requests must be a list of requests, got {reprlib.repr(requests)}")
    shapes = {(r.input_length, len(r.hash_ids)) for r in requests if r.input_length and r.hash_ids}
    candidates = (CHUNK_TOKENS, *(1 << power for power in range(20, -1, -1)))
    for tokens in candidates:
        if all(-(-length // tokens) == ids for length, ids in shapes):
            return tokens
    for tokens in candidates:
        if all(length // tokens == ids for length, ids in shapes):
            return tokens
    return CHUNK_TOKENS


@dataclass(frozen=True, slots=True)
class _Row:
    """A line of a trace, before the unit of its timestamps is known."""

    line_number: int
    timestamp: float | None
    is_of_seconds: bool
    input_length: int
    output_length: int
    hash_ids: list[int]


class _Signs:
    """Whether a trace's ids are signed or unsigned; it cannot have both."""

    def __init__(self) -> None:
        self._negative: int | None = None
        self._unsigned: int | None = None

    def as_int64(self, hash_ids: list[int]) -> tuple[int, ...]:
        """The ids as signed numbers with the same 64 bits.

        Raises:
            ValueError: an id has another sign than an id before it allows.
        """
        if not hash_ids:
            return ()
        lowest, highest = min(hash_ids), max(hash_ids)
        if lowest < 0:
            self._negative = lowest
        if highest >= INT64_END:
            self._unsigned = highest
        if self._negative is not None and self._unsigned is not None:
            raise ValueError(
                f"hash_ids must be signed or unsigned, not both: {self._negative} and "
                f"{self._unsigned} are in one file"
            )
        if highest < INT64_END:
            return tuple(hash_ids)
        return tuple(each - 2 * INT64_END if each >= INT64_END else each for each in hash_ids)


def _parse(line: bytes, line_number: int) -> _Row:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f"not an object but {_shown(record)}")
    hash_ids = _field(record, "hash_ids")
    if not isinstance(hash_ids, list):
        raise ValueError(f"hash_ids must be a list, got {_shown(hash_ids)}")
    for hash_id in hash_ids:
        if type(hash_id) is not int or not -INT64_END <= hash_id < 2 * INT64_END:
            raise ValueError(f"hash_ids must be 64-bit integers, got {_shown(hash_id)}")
    timestamp = _timestamp(record)
    return _Row(
        line_number,
        timestamp,
        "chat_id" in record or (type(timestamp) is float and not timestamp.is_integer()),
        _non_negative(record, "input_length"),
        _non_negative(record, "output_length"),
        hash_ids,
    )


def _timestamp(record: dict[str, Any]) -> float | None:
    """The timestamp as it is; None if there is none."""
    if "timestamp" not in record:
        return None
    value = record["timestamp"]
    if type(value) is int:
        return _non_negative(record, "timestamp")
    if type(value) is not float or not math.isfinite(value):
        raise ValueError(f"timestamp must be a number, got {_shown(value)}")
    if value < 0:
        raise ValueError(f"timestamp must be non-negative, got {_shown(value)}")
    return value


def _milliseconds(timestamp: float, is_seconds: bool) -> int:
    found = timestamp * 1000 if is_seconds else timestamp
    if found >= INT64_END:  # also if it has become infinite
        raise ValueError(f"timestamp must be a 64-bit number of ms, got {_shown(timestamp)}")
    return round(found)


def _field(record: dict[str, Any], key: str) -> Any:
    if key not in record:
        raise ValueError(f"{key} is missing")
    return record[key]


def _non_negative(record: dict[str, Any], key: str) -> int:
    value = _field(record, key)
    if type(value) is not int:
        raise ValueError(f"{key} must be an integer, got {_shown(value)}")
    if value < 0:
        raise ValueError(f"{key} must be non-negative, got {_shown(value)}")
    if value >= INT64_END:
        raise ValueError(f"{key} must be a 64-bit integer, got {_shown(value)}")
    return value


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def synthetic_trace(num_requests: int, seed: int = 0) -> list[Request]:
    """Made-up chat traffic with shared prefixes; the same seed makes the same traffic.

    A conversation starts with one of 16 system prompts, some more popular than others, and grows by
    1 to 6 chunks in each turn: the prompt of a turn is everything said before, plus a new question.
    One request in four begins a conversation; the others continue one of the last 200.

    Raises:
        TypeError: a number is not an integer.
        ValueError: ``num_requests`` is negative, or 2**31 or more.

    >>> synthetic_trace(3) == synthetic_trace(3), len(synthetic_trace(3))
    (True, 3)
    """
    num_requests = require_count("num_requests", num_requests)
    if num_requests >= 1 << 31:
        raise ValueError(f"num_requests must be below 2**31, got {num_requests}")
    random_source = random.Random(as_integer("seed", seed))
    new_id = count()
    prompts = [[next(new_id) for _ in range(random_source.randint(1, 4))] for _ in range(16)]
    popularity = [1 / (rank + 1) for rank in range(len(prompts))]
    conversations: list[list[int]] = []

    def turns() -> Iterator[Request]:
        timestamp_ms = 0
        while True:
            timestamp_ms += round(random_source.expovariate(1 / 300))
            if not conversations or random_source.random() < 0.25:
                chunks = list(random_source.choices(prompts, popularity)[0])
            else:
                chunks = conversations.pop(random_source.randrange(len(conversations)))
            chunks = chunks + [next(new_id) for _ in range(random_source.randint(1, 6))]
            conversations.append(chunks)
            del conversations[:-200]
            if len(chunks) > 64:
                conversations.pop()
            input_length = len(chunks) * CHUNK_TOKENS
            output_length = random_source.randint(1, CHUNK_TOKENS)
            yield Request(timestamp_ms, input_length, output_length, tuple(chunks))

    return list(islice(turns(), num_requests))

"""Request traces: one JSON object per line, as published with Mooncake (FAST'25).

``timestamp`` is in ms; ``input_length`` and ``output_length`` are in tokens; ``hash_ids`` names the
512-token chunks of the prompt in order. Equal ids mean equal KV, because an id stands for the
chunk and everything before it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

__all__ = ["CHUNK_TOKENS", "Request", "TraceError", "read_trace", "synthetic_trace"]

CHUNK_TOKENS = 512
"""Tokens of the chunk that a hash id names."""

INT64_END = 1 << 63
"""Ids and counts must fit int64, because they are put into int64 tensors and arrays."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a trace.

    Attributes:
        timestamp_ms: when it arrives.
        input_length, output_length: tokens of its prompt and of its answer.
        hash_ids: ids of the prompt's chunks, in order.
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


def read_trace(path: Path, limit: int | None = None) -> list[Request]:
    """Read the first ``limit`` requests of a file; None: all.

    Raises:
        TraceError: a line is malformed.
        OSError: the file cannot be read.
    """
    line_number = 0

    def requests() -> Iterator[Request]:
        nonlocal line_number
        with path.open("rb") as lines:
            for line in islice(lines, limit):
                line_number += 1
                yield _parse(line)

    try:
        return list(requests())
    except ValueError as error:
        raise TraceError(path, line_number, str(error)) from None


def _parse(line: bytes) -> Request:
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
        if type(hash_id) is not int or not -INT64_END <= hash_id < INT64_END:
            raise ValueError(f"hash_ids must be 64-bit integers, got {_shown(hash_id)}")
    return Request(
        _non_negative(record, "timestamp"),
        _non_negative(record, "input_length"),
        _non_negative(record, "output_length"),
        tuple(hash_ids),
    )


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

    >>> synthetic_trace(3) == synthetic_trace(3), len(synthetic_trace(3))
    (True, 3)
    """
    random_source = random.Random(seed)
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

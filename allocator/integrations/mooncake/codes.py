"""Mooncake Store's error codes, and ``MooncakeError``, which names the keys that they are of.

Source: ``mooncake-store/include/types.h``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from kvheap.errors import TransferError

__all__ = ["Code", "MooncakeError", "have_settled", "meaning"]

NAMED_KEYS = 3
"""How many keys a message names."""

SETTLED_S = 30.0
"""Seconds within which a transfer that fails has ended. Later, the client may have given it up (it
does after 60 s) without stopping it: of a frozen machine that woke, 195 MiB were still written into
200 MiB of blocks."""


class Code(IntEnum):
    """The codes that have a meaning here."""

    OK = 0
    NO_SPACE = -200
    INVALID = -600
    INVALID_REPLICA = -702
    NOT_READY = -703
    NOT_FOUND = -704
    EXISTS = -705
    LEASED = -706
    LEASE_EXPIRED = -707
    TRANSFER_FAILED = -800
    MASTER_LOST = -900
    MASTER_SILENT = -901
    QUOTA_EXCEEDED = -1700


MEANINGS = {
    Code.NO_SPACE: "the store has no space",
    Code.INVALID: "the value is larger than a block, or the memory is not registered",
    Code.NOT_READY: "another client is storing it",
    Code.LEASED: "it was read or looked up a moment ago",
    Code.LEASE_EXPIRED: "its lease ended before its bytes arrived: raise default_kv_lease_ttl of "
    "the master",
    Code.TRANSFER_FAILED: "the machine that holds it has failed, or does not answer",
    Code.MASTER_LOST: "the master cannot be reached",
    Code.MASTER_SILENT: "the master does not answer",
}

SETTLED_PUT = frozenset(
    {
        Code.NO_SPACE,
        Code.NOT_READY,
        Code.NOT_FOUND,
        Code.EXISTS,
        Code.MASTER_LOST,
        Code.MASTER_SILENT,
        Code.QUOTA_EXCEEDED,
    }
)
"""After these the client does not read the block any more: they come before a transfer, or after
it. vLLM's connector trusts the same."""

SETTLED_GET = SETTLED_PUT | {Code.INVALID, Code.INVALID_REPLICA, Code.LEASE_EXPIRED}
"""After these it does not write the block any more: sizes are checked before, leases after it."""


def have_settled(codes: Iterable[int], *, is_get: bool, took_s: float) -> bool:
    """Whether the client has let go of all blocks of a call.

    Args:
        codes: what it answered; results of 0 and more are successes.
        is_get: whether the call fills blocks.
        took_s: how long it took, in seconds.
    """
    settled: frozenset[int] = SETTLED_GET if is_get else SETTLED_PUT
    if took_s < SETTLED_S:
        settled = settled | {Code.TRANSFER_FAILED}
    return all(code >= 0 or code in settled for code in codes)


def meaning(code: int) -> str:
    """What a code says of a key; of 0 and more, that the value has so many bytes."""
    if code >= 0:
        return f"its value has {code} bytes"
    try:
        name = Code(code)
    except ValueError:
        return f"error {code}"
    said = MEANINGS.get(name)
    return f"error {code}, {name.name}" if said is None else f"{said} ({code})"


class MooncakeError(TransferError):
    """Something failed for some of the keys of a call, other than that they are missing.

    Attributes:
        action: what failed.
        codes: the code of each key that failed; 0 or more is the size of a value in bytes, where
            that is wrong.
        untried: the keys that were not tried any more.
        succeeded: whether each chunk was moved, bool ``[N]``.
    """

    def __init__(
        self,
        action: str,
        codes: Mapping[bytes, int],
        untried: Sequence[bytes],
        succeeded: npt.NDArray[np.bool_],
    ) -> None:
        keys_of: dict[int, list[bytes]] = {}
        for key, code in codes.items():
            keys_of.setdefault(code, []).append(key)
        parts = [f"{_named(keys)}: {meaning(code)}" for code, keys in keys_of.items()]
        if untried:
            parts.append(f"{_named(untried)}: not tried after that")
        super().__init__(f"Mooncake Store could not {action} chunks: {'; '.join(parts)}")
        self.action = action
        self.codes = dict(codes)
        self.untried = tuple(untried)
        self.succeeded = succeeded

    def __reduce__(self) -> tuple[type[MooncakeError], tuple[Any, ...]]:
        return type(self), (self.action, self.codes, self.untried, self.succeeded)


def _named(keys: Sequence[bytes]) -> str:
    names = ", ".join([repr(key) for key in keys[:NAMED_KEYS]])
    more = len(keys) - NAMED_KEYS
    return f"{names} and {more} more" if more > 0 else names

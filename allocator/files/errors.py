"""What goes wrong with a tier of files, beside ``OSError`` and the errors of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvheap.errors import TransferError

__all__ = ["MissingChunksError", "TierInUseError", "TierMismatchError"]

NAMED_KEYS = 3
"""How many keys a message names."""


class TierInUseError(RuntimeError):
    """Another ``FileTier``, of this process or another one, has the folder open.

    Attributes:
        path: the folder.
        owner_pid: the process that has it; None if it is not known.
    """

    def __init__(self, path: str, owner_pid: int | None) -> None:
        owner = "another process" if owner_pid is None else f"process {owner_pid}"
        super().__init__(
            f"{path} is in use by {owner}: a folder has one FileTier at a time; close that one, "
            f"or give this one another folder"
        )
        self.path = path
        self.owner_pid = owner_pid

    def __reduce__(self) -> tuple[type[TierInUseError], tuple[Any, ...]]:
        return type(self), (self.path, self.owner_pid)


class TierMismatchError(ValueError):
    """The folder holds another tier's chunks: of another model, layout or version of the format.

    Attributes:
        path: the file that says so.
        field: what differs.
        found: what the folder has; None if it cannot be read.
        wanted: what the tier was opened with.
    """

    def __init__(self, path: str, field: str, found: object, wanted: object) -> None:
        super().__init__(
            f"{path}: {field} is {found!r}, but the tier was opened with {wanted!r}: its chunks "
            f"cannot be used; give the tier another folder, or delete this one"
        )
        self.path = path
        self.field = field
        self.found = found
        self.wanted = wanted

    def __reduce__(self) -> tuple[type[TierMismatchError], tuple[Any, ...]]:
        return type(self), (self.path, self.field, self.found, self.wanted)


class MissingChunksError(TransferError):
    """A load did not fill all of its blocks; the bytes of the others have arrived.

    Attributes:
        missing: the keys that have no chunk, in the order given.
        damaged: the keys whose chunks were damaged or could not be read. They have been removed.
        failed: the keys whose chunks could not be read this time; they are still there.
    """

    def __init__(
        self, missing: Sequence[bytes], damaged: Sequence[bytes], failed: Sequence[bytes]
    ) -> None:
        parts = [
            f"{what}: {_named(keys)}"
            for what, keys in (
                ("not in the tier", missing),
                ("damaged, and removed", damaged),
                ("could not be read", failed),
            )
            if keys
        ]
        super().__init__(f"chunks were not loaded: {'; '.join(parts)}")
        self.missing = tuple(missing)
        self.damaged = tuple(damaged)
        self.failed = tuple(failed)

    def __reduce__(self) -> tuple[type[MissingChunksError], tuple[Any, ...]]:
        return type(self), (self.missing, self.damaged, self.failed)


def _named(keys: Sequence[bytes]) -> str:
    names = ", ".join([repr(key) for key in keys[:NAMED_KEYS]])
    more = len(keys) - NAMED_KEYS
    return f"{names} and {more} more" if more > 0 else names

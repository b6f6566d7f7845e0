"""What goes wrong with a tier of files, beside ``OSError`` and the errors of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvheap.errors import InUseError, MismatchError, TransferError
from kvheap.prefix.keys import shown_keys

__all__ = ["MissingChunksError", "TierInUseError", "TierMismatchError"]


class TierInUseError(InUseError):
    """Another ``FileTier``, of this process or another one, has the folder open.

    Attributes:
        path: the folder.
        owner_pid: the process that has it; None if it is not known.
    """

    def __init__(self, path: str, owner_pid: int | None) -> None:
        advice = (
            "a folder has one FileTier at a time; close that one, or give this one another folder"
        )
        super().__init__(path, owner_pid, advice=advice)


class TierMismatchError(MismatchError):
    """The folder holds another tier's chunks: of another model, layout or version of the format.

    Attributes:
        path: the file that says so.
        field: what differs.
        found: what the folder has; None if it cannot be read.
        wanted: what the tier was opened with.
    """

    def __init__(self, path: str, field: str, found: object, wanted: object) -> None:
        advice = "give the tier another folder, or delete this one to begin empty"
        super().__init__(path, field, found, wanted, "the tier", advice)


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
            f"{what}: {shown_keys(keys)}"
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

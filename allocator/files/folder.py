"""``TierFolder``: who has a tier's folder, whose chunks are in it, and whether they can be trusted.

::

    lock       held by flock while a FileTier has the folder; the process is written into it
    tier.json  identity and state: whether the tier was closed, and since which boot it is open
    chunks     the bytes: places of one size
    index      LMDB: which key is at which place, with its checksum

After ``kill -9`` the kernel still has what the process wrote, and writes it in its own time. After
a loss of power, only what was synchronized is there. LMDB is not synchronized at each commit unless
the tier is durable, and may then be torn. So ``tier.json`` names the boot: if the machine has been
started anew since a tier was opened, which was neither closed nor durable, its index is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from errno import EDQUOT, ENOSPC, ESTALE
from pathlib import Path
from typing import Any

from kvheap.files.errors import TierInUseError, TierMismatchError
from kvheap.interrupts import is_interrupt
from kvheap.memory.boots import boot_id
from kvheap.memory.descriptors import Descriptor
from kvheap.memory.file_locks import FileLock

__all__ = ["FORMAT_VERSION", "TierFolder"]

FORMAT_VERSION = 1

NO_ROOM = (ENOSPC, EDQUOT)


class TierFolder:
    """The folder of one tier, locked for this object.

    Args:
        path: the folder; made if it is missing, for this user only.
        identity: what must be equal for the chunks to be of use, by name.

    Raises:
        TierInUseError: another object, here or in another process, has the folder.
        TierMismatchError: the folder holds chunks of another identity.
        OSError: the folder cannot be made, read or written.
    """

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, object]) -> None:
        self.path = Path(path).absolute()  # the working directory may change
        self._identity = {"format_version": FORMAT_VERSION, **identity}
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = self._locked()
        try:
            state = self._read()
            self.is_trusted = state is not None and (
                state["is_closed"] or state["is_durable"] or (state["boot_id"] == boot_id() != "")
            )
            """Whether the index is as its last owner left it; false too if there is none."""
            if not self.is_trusted:
                for name in ("index", "index-lock"):
                    with suppress(FileNotFoundError):
                        os.unlink(self.path / name)
        except BaseException:
            self.unlock()
            raise

    @property
    def data_path(self) -> Path:
        """The file of the chunks' bytes."""
        return self.path / "chunks"

    @property
    def index_path(self) -> Path:
        """The file of the index."""
        return self.path / "index"

    def write_state(self, *, is_closed: bool, is_durable: bool) -> None:
        """Note whether the tier is open, in one step that also outlives a loss of power.

        Where the file system is full, the step is one write of less than a sector.

        Raises:
            OSError: it cannot be written, or the folder is another tier's by now.
        """
        self._require_same()
        state = {
            "identity": self._identity,
            "is_closed": is_closed,
            "is_durable": is_durable,
            "boot_id": boot_id(),
        }
        text = json.dumps(state, indent=1)
        try:
            self._replace_state(text)
        except OSError as error:
            if error.errno not in NO_ROOM or not self._overwrite_state(text):
                raise

    def _replace_state(self, text: str) -> None:
        new = self.path / "tier.json.new"
        try:
            file = Descriptor(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            try:
                with open(file.fd, "w", closefd=False) as stream:
                    stream.write(text)
                os.fsync(file.fd)
            finally:
                file.close()
            os.replace(new, self.path / "tier.json")
        except OSError as error:
            error.filename = str(new)  # as where the file system is full
            with suppress(OSError):
                os.unlink(new)
            raise
        folder = Descriptor(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder.fd)
        finally:
            folder.close()

    def _overwrite_state(self, text: str) -> bool:
        """Write the state into its old place, which needs no room; returns whether there is one.

        One write, within one sector: a tier that has filled its file system can be opened again.
        """
        try:
            file = Descriptor(self.path / "tier.json", os.O_WRONLY)
        except FileNotFoundError:
            return False
        try:
            os.pwrite(file.fd, text.ljust(os.fstat(file.fd).st_size).encode(), 0)
            os.fsync(file.fd)
        finally:
            file.close()
        return True

    def _require_same(self) -> None:
        """Raise if the folder was removed, and perhaps made anew, since it was locked."""
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self.path / "lock"), os.fstat(self._lock.fd)):
                return
        raise OSError(ESTALE, "somebody has removed the folder of an open FileTier", str(self.path))

    def unlock(self) -> None:
        """Let others have the folder. In a forked child, the parent keeps it."""
        self._lock.release()

    def _locked(self) -> FileLock:
        file = Descriptor(self.path / "lock", os.O_RDWR | os.O_CREAT)
        try:
            lock = FileLock(file)
        except BlockingIOError as error:
            if is_interrupt(error):
                file.close()
                raise
            pid = os.pread(file.fd, 32, 0).decode("ascii", "replace").strip()
            owner = int(pid) if pid.isdigit() else None
            file.close()
            raise TierInUseError(str(self.path), owner) from None
        except BaseException:
            file.close()
            raise
        try:
            os.ftruncate(lock.fd, 0)
            os.pwrite(lock.fd, str(os.getpid()).encode(), 0)
        except BaseException:
            lock.release()
            raise
        return lock

    def _read(self) -> dict[str, Any] | None:
        """The state that the last owner has left; None if there was none."""
        file = self.path / "tier.json"
        try:
            raw = file.read_bytes()
        except FileNotFoundError:
            return None
        try:
            state = json.loads(raw)
            found = dict(state["identity"])
            flags = [state["is_closed"], state["is_durable"]]
            is_read = all(isinstance(flag, bool) for flag in flags)
            is_read &= isinstance(state["boot_id"], str)
        except (ValueError, KeyError, TypeError):
            is_read = False
        if not is_read:
            raise TierMismatchError(str(file), "the content", None, "a FileTier's tier.json")
        for name, wanted in self._identity.items():
            if found.get(name) != wanted:
                raise TierMismatchError(str(file), name, found.get(name), wanted)
        return dict(state)

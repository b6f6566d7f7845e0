"""``IndexFile``: the file of an index, which one engine at a time may have.

Needs no vLLM.
"""

from __future__ import annotations

import os
import weakref
from contextlib import suppress

from kvheap.integrations.vllm.file_locks import LockedFile
from kvheap.integrations.vllm.index_format import (
    HEADER_BYTES,
    MAGIC,
    IndexRefusedError,
    total_bytes,
)

__all__ = ["IndexFile"]

KEY = "kv_connector_extra_config['index_path']"


class IndexFile:
    """The file of an index. Beside it lies ``PATH.lock`` as long as an engine has it.

    Args:
        path: the file, which need not exist.

    Raises:
        BlockingIOError: another engine has it.
        OSError: the path is a folder, or its folder does not exist or cannot be written to. The
            messages name the key of the settings.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._folder = os.path.dirname(os.path.abspath(path))
        if os.path.isdir(path):
            raise IsADirectoryError(f"{KEY} must be the path of a file, {path} is a folder")
        try:
            lock = _locked(f"{path}.lock", f"{KEY} is used by another engine: {path}")
        except BlockingIOError:
            raise
        except OSError as error:
            raise OSError(
                error.errno, f"{KEY}: cannot write to {self._folder}: {error.strerror}"
            ) from None
        self._release = weakref.finalize(self, _unlock, lock, f"{path}.lock", os.getpid())
        with suppress(OSError):
            os.unlink(self._new_path)  # of a process that was killed while it wrote

    @property
    def path(self) -> str:
        """The file."""
        return self._path

    @property
    def _new_path(self) -> str:
        return f"{self._path}.new"

    def read(self) -> bytes | None:
        """All bytes of the file; None: there is none.

        Raises:
            IndexRefusedError: it does not begin as an index, or has another length than it says.
            OSError: it cannot be read.
        """
        try:
            file = open(self._path, "rb")  # noqa: SIM115  # closed below
        except FileNotFoundError:
            return None
        with file:
            total, size = total_bytes(file.read(HEADER_BYTES)), os.fstat(file.fileno()).st_size
            if size != total:
                raise IndexRefusedError(f"it has {size} bytes instead of {total}")
            file.seek(0)
            return file.read(total)

    def remove(self) -> None:
        """Remove the file, if it is there, so that it stays removed if the power fails.

        A file that does not begin as an index may be anything: it stays as ``PATH.refused``.

        Raises:
            OSError: it cannot be removed.
        """
        with suppress(FileNotFoundError):
            with open(self._path, "rb") as file:
                is_index = MAGIC.startswith(file.read(len(MAGIC)))
            if is_index:
                os.unlink(self._path)
            else:
                os.replace(self._path, f"{self._path}.refused")
        self._sync_folder()

    def write(self, data: bytes) -> None:
        """Write the file, as a whole or not at all.

        Raises:
            OSError: it cannot be written; whatever was there is unchanged.
        """
        new = self._new_path
        try:
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(fd)
            os.replace(new, self._path)
        except BaseException:
            with suppress(OSError):
                os.unlink(new)
            raise
        self._sync_folder()

    def close(self) -> None:
        """Let another engine have the file. Further calls do nothing."""
        self._release()

    def _sync_folder(self) -> None:
        fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with suppress(OSError):  # some file systems cannot
                os.fsync(fd)
        finally:
            os.close(fd)


def _locked(path: str, message: str) -> LockedFile:
    """The locked file; whoever had it before has removed it while it was locked."""
    while True:
        lock = LockedFile(path, message)
        with suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(lock.fd).st_ino:
                return lock
        lock.release()


def _unlock(lock: LockedFile, path: str, pid: int) -> None:
    if os.getpid() == pid:  # in a forked child, the file is still the parent's
        with suppress(OSError):
            os.unlink(path)
    lock.release()

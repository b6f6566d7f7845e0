"""``Segment``: the file that a shared heap is in: made, locked, checked and mapped.

One process owns a segment. It has the ``flock`` of the file itself, not of a file beside it, so
links, other mounts and other names of the file lead to the same lock. The lock is on an open file
of its own, which no mapping and no forked child keeps: it ends with the owner's process.

A new file gets its name once it is complete (``O_TMPFILE``), and all its memory is taken at once,
so that no process is killed later because a tmpfs is full.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from kvheap.addresses.integers import as_integer
from kvheap.interrupts import is_interrupt, suppress_own
from kvheap.memory.descriptors import Descriptor
from kvheap.memory.file_locks import FileLock
from kvheap.memory.host_memory import HostBuffer
from kvheap.shared.errors import SegmentDamagedError, SegmentInUseError, SegmentMismatchError
from kvheap.shared.geometry import HEADER_BYTES, PAGE_BYTES, STATE_BYTES, Geometry
from kvheap.shared.header import OwnerState, decode_header, encode_header, require_identity

__all__ = ["SHM_FOLDER", "Segment", "as_target"]

SHM_FOLDER = "/dev/shm"
"""Where a segment is that is given by a name."""

FIRST_BYTES = 8
"""Of a header, what is written last."""

PATIENCE_S = 0.2
"""An owner that was killed may take a moment to end."""


def as_target(file: Any) -> int | str:
    """A descriptor, or a path; a name without a folder is one in ``/dev/shm``.

    Raises:
        TypeError: it is none of them.
        ValueError: the name is empty or names a folder.
    """
    if not isinstance(file, (str, os.PathLike)):
        try:
            fd = as_integer("path", file)
        except TypeError:
            raise TypeError(
                f"path must be a path, a name or a file descriptor, got {file!r}"
            ) from None
        if fd < 0:
            raise ValueError(f"path must not be a negative descriptor, got {fd}")
        return fd
    path = os.fspath(file)
    if not isinstance(path, str):
        raise TypeError(f"path must be a path, a name or a file descriptor, got {file!r}")
    if path in ("", ".", "..") or path.endswith("/") or "\0" in path:
        raise ValueError(f"path must be the path of a file, got {path!r}")
    if isinstance(file, str) and "/" not in path:
        return f"{SHM_FOLDER}/{path}"
    return os.path.abspath(path)


class Segment:
    """A segment that is mapped here. Made by :meth:`own` and :meth:`attach`.

    Attributes:
        path: its path, for messages.
        geometry: where its parts are.
        identity: what it is for.
        buffer: the mapping of the whole file.
        state: who owns it.
    """

    def __init__(
        self, target: int | str, fd: int, identity: Mapping[str, Any], geometry: Geometry
    ) -> None:
        self._target = target
        self.path = _shown(target)
        self.geometry = geometry
        self.identity = dict(identity)
        found = os.fstat(fd)
        self._file = found.st_dev, found.st_ino
        self.buffer = HostBuffer(geometry.file_bytes, fd=fd)
        self.state = OwnerState(self.array(geometry.state_at, STATE_BYTES))
        self.lock: FileLock | None = None
        """The lock of the owner; None if this is not the owner."""

    @property
    def is_locked(self) -> bool:
        """Whether this process owns the segment now."""
        return self.lock is not None and self.lock.is_held

    @classmethod
    def own(
        cls,
        target: int | str,
        identity: Mapping[str, object],
        num_places: int,
        chunk_bytes: int,
        place_bytes: int,
    ) -> Segment:
        """Open a segment as its owner; make it if there is none.

        Raises:
            SegmentInUseError: it has an owner.
            SegmentMismatchError: it is another model's, layout's, size's or version's.
            SegmentDamagedError: the file is no segment, or not a whole one.
            OSError: it cannot be made or mapped, as where the file system has no room for it.
        """
        try:
            return cls._own(target, identity, (num_places, chunk_bytes, place_bytes))
        except OSError as error:
            raise _named(error, target) from error.__cause__

    @classmethod
    def _own(
        cls, target: int | str, identity: Mapping[str, object], sizes: tuple[int, int, int]
    ) -> Segment:
        while True:
            file = _opened(target)
            if file is None:
                file = _made(str(target), identity, sizes)
                if file is None:
                    continue  # somebody else was faster
            fd = file.fd
            try:
                lock = _locked(target, fd)
                try:
                    if not _leads_to(target, os.fstat(fd)):
                        lock.release()
                        continue  # it was removed or replaced before it was locked
                    segment = cls._owned(target, fd, identity, sizes)
                except BaseException:
                    lock.release()
                    raise
                segment.lock = lock
                return segment
            finally:
                file.close()

    @classmethod
    def _owned(
        cls,
        target: int | str,
        fd: int,
        identity: Mapping[str, object],
        sizes: tuple[int, int, int],
    ) -> Segment:
        path = _shown(target)
        wanted = Geometry.of(*sizes, _unit_bytes(fd))
        file_bytes = os.fstat(fd).st_size
        raw = _header(fd, file_bytes)
        # Or whoever made it was killed before it had written the header.
        is_bare = file_bytes == wanted.file_bytes and not any(raw[:FIRST_BYTES])
        if is_bare or not file_bytes:
            _fill(fd, identity, wanted)
            raw = _header(fd, wanted.file_bytes)
            file_bytes = wanted.file_bytes
        found, geometry = decode_header(path, raw, file_bytes)
        require_identity(path, found, identity)
        for name in ("chunk_bytes", "place_bytes", "num_places", "file_bytes"):
            if getattr(geometry, name) != getattr(wanted, name):
                raise SegmentMismatchError(
                    path, name, getattr(geometry, name), getattr(wanted, name)
                )
        _commit(fd, file_bytes)
        return cls(target, fd, found, geometry)

    @classmethod
    def attach(cls, target: int | str, identity: Mapping[str, object]) -> Segment:
        """Open a segment that somebody has made.

        Raises:
            FileNotFoundError: there is none.
            SegmentMismatchError, SegmentDamagedError, OSError: as for :meth:`own`.
        """
        try:
            return cls._attach(target, identity)
        except OSError as error:
            raise _named(error, target) from error.__cause__

    @classmethod
    def _attach(cls, target: int | str, identity: Mapping[str, object]) -> Segment:
        file = _opened(target)
        path = _shown(target)
        if file is None:
            raise FileNotFoundError(
                errno.ENOENT, "there is no segment, and its owner makes it", path
            )
        fd = file.fd
        try:
            file_bytes = os.fstat(fd).st_size
            found, geometry = decode_header(path, _header(fd, file_bytes), file_bytes)
            require_identity(path, found, identity)
            return cls(target, fd, found, geometry)
        finally:
            file.close()

    def array(self, offset: int, num_bytes: int) -> np.typing.NDArray[np.uint8]:
        """A part of the file, mapped: uint8 ``[num_bytes]``."""
        part: np.typing.NDArray[np.uint8] = self.buffer.tensor[offset : offset + num_bytes].numpy()
        return part

    def open_file(self) -> Descriptor:
        """The file with an open file of its own, for locks.

        Raises:
            OSError: it cannot be opened.
        """
        fd = self.buffer.fd
        assert fd is not None
        return Descriptor(f"/proc/self/fd/{fd}", os.O_RDWR)

    @property
    def is_linked(self) -> bool:
        """Whether the path leads to this file."""
        if isinstance(self._target, int):
            return True
        try:
            found = os.stat(self._target)
        except OSError as error:
            if is_interrupt(error):
                raise
            return False
        return (found.st_dev, found.st_ino) == self._file

    def unlink(self) -> None:
        """Remove the name, unless it leads to another file by now."""
        if isinstance(self._target, str) and self.is_linked:
            with suppress_own(FileNotFoundError):
                os.unlink(os.path.realpath(self._target))  # not a link that leads to the file

    def leave(self) -> None:
        """Let go of the lock; in a forked child, of this process's part in it."""
        if self.lock is not None:
            self.lock.release()


def _named(error: OSError, target: int | str) -> OSError:
    """The same error, with the segment's path if it names none."""
    if error.filename is None and error.errno is not None:
        error.filename = _shown(target)
    return error


def _shown(target: int | str) -> str:
    return f"/proc/{os.getpid()}/fd/{target}" if isinstance(target, int) else target


def _opened(target: int | str) -> Descriptor | None:
    """A new open file; None: there is none."""
    try:
        if isinstance(target, int):
            file = Descriptor(f"/proc/self/fd/{target}", os.O_RDWR)
        else:
            file = Descriptor(target, os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        if isinstance(target, int):
            raise OSError(
                errno.EBADF, f"path must be an open file descriptor, got {target}"
            ) from None
        return None
    if not stat.S_ISREG(os.fstat(file.fd).st_mode):
        file.close()
        raise SegmentDamagedError(_shown(target), "is not a regular file")
    return file


def _made(
    path: str, identity: Mapping[str, object], sizes: tuple[int, int, int]
) -> Descriptor | None:
    """A new file under its name, complete; None: there is one by now."""
    path = os.path.realpath(path)  # a link may lead to a file that is not there yet
    folder = os.path.dirname(path)
    try:
        file = Descriptor(folder, os.O_TMPFILE | os.O_RDWR)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
        with suppress(FileExistsError):  # filled once it is locked
            return Descriptor(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        return None
    fd = file.fd
    try:
        _fill(fd, identity, Geometry.of(*sizes, _unit_bytes(fd)))
        # With src_dir_fd, which has no influence, Python calls linkat, which follows the link.
        os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd, follow_symlinks=True)
    except FileExistsError:
        file.close()
        return None
    except BaseException:
        file.close()
        raise
    return file


def _fill(fd: int, identity: Mapping[str, object], geometry: Geometry) -> None:
    """Give a new file its size, its memory and its header."""
    header = np.frombuffer(encode_header(identity, geometry), np.uint8)
    was_empty = not os.fstat(fd).st_size
    try:
        try:
            os.ftruncate(fd, geometry.file_bytes)
        except OSError as error:
            if is_interrupt(error):
                raise
            reason = f"{error.strerror}, {geometry.file_bytes} bytes are needed"
            raise OSError(error.errno, reason) from None
        _commit(fd, geometry.file_bytes)
    except BaseException:
        if was_empty:
            with suppress_own(OSError):
                os.ftruncate(fd, 0)
        raise
    with HostBuffer(geometry.file_bytes, fd=fd) as buffer:  # hugetlbfs knows no write
        at = geometry.header_at
        target = buffer.tensor[at : at + len(header)].numpy()
        target[FIRST_BYTES:] = header[FIRST_BYTES:]
        target[:FIRST_BYTES] = header[:FIRST_BYTES]  # last: without them, there is no segment
        del target


def _commit(fd: int, file_bytes: int) -> None:
    """Take all memory of a file, so that no later access is killed for the lack of it."""
    if os.fstat(fd).st_blocks * 512 >= file_bytes:
        return
    try:
        os.posix_fallocate(fd, 0, file_bytes)
    except OSError as error:
        if is_interrupt(error):
            raise
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV):
            return
        raise OSError(
            error.errno, f"the file system has no room for {file_bytes} bytes: {error.strerror}"
        ) from error


def _header(fd: int, file_bytes: int) -> bytes:
    return os.pread(fd, HEADER_BYTES, max(file_bytes - HEADER_BYTES, 0))


def _unit_bytes(fd: int) -> int:
    return max(PAGE_BYTES, os.fstatvfs(fd).f_bsize)


def _leads_to(target: int | str, found: os.stat_result) -> bool:
    if isinstance(target, int):
        return True
    try:
        return os.path.samestat(os.stat(target), found)
    except FileNotFoundError:
        return False


def _locked(target: int | str, fd: int) -> FileLock:
    try:
        return FileLock.reopened(fd, PATIENCE_S)
    except BlockingIOError:
        raise SegmentInUseError(_shown(target), _owner_of(fd)) from None


def _owner_of(fd: int) -> int | None:
    """The process that owns a file, as its header says."""
    file_bytes = os.fstat(fd).st_size
    raw = _header(fd, file_bytes)
    try:
        decode_header("", raw, file_bytes)
    except ValueError:
        return None
    return OwnerState(np.frombuffer(raw[HEADER_BYTES - STATE_BYTES :], np.uint8)).pid

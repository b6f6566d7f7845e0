"""Opens the file of shared memory by its path or its POSIX name.

A POSIX name, as ``shm_open`` and ``multiprocessing.shared_memory`` take it, is a file in
``/dev/shm``, a folder in which everybody may make files and links. So links are not followed, as
``shm_open`` does not, and what is not a regular file is refused before anything is mapped.
"""

from __future__ import annotations

import errno
import os
import stat

__all__ = ["open_shared_file"]

SHM_FOLDER = "/dev/shm"

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def open_shared_file(file: str | os.PathLike[str]) -> int:
    """A new descriptor of a regular file, for reading and writing.

    Args:
        file: a path; or the POSIX name of shared memory, with or without its leading ``/``.

    Raises:
        FileNotFoundError: there is no such file; the message has every path that was tried.
        ValueError: it is a symbolic link or no regular file, or a text that is both a name and a
            path.
        OSError: it cannot be opened.
    """
    path = _path_of(file)
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe or a device must not make this wait
    if not _is_of_a_process(path):
        flags |= os.O_NOFOLLOW
    try:
        fd = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP and os.path.islink(path):
            raise ValueError(
                f"{path} is a symbolic link to {os.readlink(path)}, which is not followed: pass "
                f"the path of the file itself"
            ) from None
        if error.errno in (errno.EISDIR, errno.ENXIO):
            raise _no_file(path, os.stat(path).st_mode) from None
        raise
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise _no_file(path, mode)
    return fd


def _path_of(file: str | os.PathLike[str]) -> str:
    """The path of a file that is given by its path or name.

    Raises:
        FileNotFoundError, ValueError, TypeError: as :func:`open_shared_file`.
    """
    path = os.fspath(file)
    if not isinstance(path, str):
        raise TypeError(f"file must be a text or a path, got {file!r}")
    if not path or "\0" in path:
        raise ValueError(f"file must be a path or the name of shared memory, got {file!r}")
    name = path.removeprefix("/")
    if not isinstance(file, str) or not name or "/" in name or name in (".", ".."):
        return path
    named = f"{SHM_FOLDER}/{name}"
    found = [each for each in (path, named) if os.path.lexists(each)]
    if not found:
        raise FileNotFoundError(
            errno.ENOENT,
            f"there is neither a file of this path nor shared memory {named}",
            path,
        )
    if len(found) > 1 and not os.path.samefile(*found):
        raise ValueError(
            f"{path!r} is both a file and the name of shared memory: pass {named!r}, or a "
            f"pathlib.Path for the file"
        )
    return found[0]


def _is_of_a_process(path: str) -> bool:
    """Whether a path names a descriptor of a process, such as ``/proc/PID/fd/FD``."""
    folder = os.path.realpath(os.path.dirname(path) or ".")
    return folder.startswith("/proc/")


def _no_file(path: str, mode: int) -> ValueError:
    kind = KINDS.get(stat.S_IFMT(mode), "something else")
    return ValueError(f"{path} is {kind}: a heap is attached to a regular file of shared memory")

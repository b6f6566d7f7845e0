"""``Agent``: NIXL, as far as a node needs it. Methods are called by one thread at a time.

What NIXL 1.5.1 does, measured over loopback, and what follows:

- neither an error nor a release ends a transfer: the bytes go on arriving. So a request is released
  only once nothing can arrive any more (:mod:`kvheap.remote.moves`);
- ``remove_remote_agent`` does not end them either, so no peer is removed before that;
- reading memory that its owner has unmapped ends the owner's process, over TCP. So an agent keeps
  the buffers that it has registered until they are deregistered;
- a second agent of the same name is refused. So each has a name of its own;
- ``invalidate_remote_md`` leaves a socket open on both sides, and loading the metadata again opens
  another one. So the agents of peers that are alive are kept.
"""

from __future__ import annotations

import ctypes
import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from itertools import starmap
from typing import Any, Literal

import numpy as np
import torch

from kvheap.addresses.extents import Int64Array
from kvheap.interrupts import is_interrupt
from kvheap.memory.descriptors import Descriptor
from kvheap.remote.errors import PeerError
from kvheap.remote.packages import need_nixl
from kvheap.remote.pairs import Part

__all__ = ["Agent", "State"]

BACKEND = "UCX"

PROGRESS_PAUSE_US = 100_000
"""Longest sleep of NIXL's progress thread between events; 0, as in ``nixl_agent``, takes 85 % of a
core."""

FREE_DESCRIPTORS = 64
"""UCX opens 27 for an agent over TCP and shared memory, more with RDMA; where it gets 4 or 16, it
ends the process by an assertion."""

State = Literal["created", "running", "done", "failed"]


class Agent:
    """One NIXL agent, with the buffers of one heap registered.

    Args:
        name: of the node; the agent's name has a number of its own behind it.
        segments: the heap's buffers; kept alive until :meth:`close`.

    Raises:
        ImportError: NIXL is not installed.
        OSError: this process has too few descriptors left.
        RuntimeError: NIXL has no UCX backend, or refuses the memory.
    """

    def __init__(self, name: str, segments: Sequence[tuple[int, torch.Tensor]]) -> None:
        self._nixl = nixl = need_nixl()
        self.name = f"{name}-{uuid.uuid4().hex}"
        self._kinds = {"cpu": nixl.DRAM_SEG, "cuda": nixl.VRAM_SEG}
        self._kind = self._kinds[segments[0][1].device.type]
        self._make_list = nixl.nixlXferDList
        _require_descriptors()
        config = nixl.nixlAgentConfig()
        config.useProgThread = True
        config.useListenThread = False
        config.syncMode = nixl.NIXL_THREAD_SYNC_STRICT
        config.pthrDelay = PROGRESS_PAUSE_US
        self._agent = nixl.nixlAgent(self.name, config)
        if BACKEND not in self._agent.getAvailPlugins():
            raise RuntimeError(
                f"this NIXL has no {BACKEND} backend: {self._agent.getAvailPlugins()}"
            )
        self._agent.createBackend(BACKEND, {})
        self._memory = [buffer for _, buffer in segments]
        self._number = self.device_of(self._memory[0])
        self._registered: Any = nixl.nixlRegDList(
            self._kind,
            [(each.data_ptr(), each.nbytes, self.device_of(each), "") for each in self._memory],
        )
        self._agent.registerMem(self._registered, [])
        self.metadata: bytes = self._agent.getLocalMD()

    @staticmethod
    def device_of(buffer: torch.Tensor) -> int:
        """The number of a buffer's GPU; 0 for host memory."""
        return buffer.device.index or 0

    def add(self, metadata: bytes) -> str:
        """Learn of another agent; returns its name.

        The metadata must come from a peer that has proved to know the secret: of 160 damaged ones,
        NIXL accepted 28, and one ended the process.
        """
        name = self._agent.loadRemoteMD(metadata)
        return name.decode() if isinstance(name, bytes) else str(name)

    def connect(self, name: str) -> None:
        """Begin to connect to another agent, which the first read would do otherwise."""
        with suppress(Exception):  # the first read tells
            self._agent.makeConnection(name, [])

    def remove(self, name: str) -> None:
        """Forget another agent, with which nothing is in flight."""
        with suppress(self._nixl.nixlNotFoundError, RuntimeError):
            self._agent.invalidateRemoteMD(name)

    def read(
        self,
        name: str,
        pieces: Part,
        device: tuple[str, int],
        requests: list[int] | None = None,
        known: dict[tuple[int, int], Any] | None = None,
    ) -> int:
        """Prepare to read pieces of another agent's memory.

        Args:
            name: the other agent.
            pieces: absolute addresses there (source) and here (target), and bytes.
            device: where the other memory is: ``cpu`` or ``cuda``, and the number of the GPU.
            requests: gets the request too; no exception of a signal handler strikes in between.
            known: what NIXL is told of single runs there, by address and bytes, from reads before.

        Returns:
            The request, for :meth:`post`, :meth:`state` and :meth:`release`.

        Raises:
            PeerError: NIXL refuses the request: nothing has begun.
        """
        requests = [] if requests is None else requests
        nixl, make = self._nixl, self._make_list
        kind, number = self._kinds[device[0]], device[1]
        try:
            if isinstance(pieces, tuple):
                source, target, size = pieces
                here = make(self._kind, [(target, size, self._number)])
                there = None if known is None else known.get((source, size))
                if there is None:
                    there = make(kind, [(source, size, number)])
                    if known is not None:
                        known[source, size] = there
            else:
                here = make(self._kind, _rows(pieces.targets, pieces.sizes, self._number))
                there = make(kind, _rows(pieces.sources, pieces.sizes, number))
            arguments: tuple[Any, ...] = (nixl.NIXL_READ, here, there, name, "", [])
            requests.extend(starmap(self._agent.createXferReq, [arguments]))
        except Exception as error:
            if is_interrupt(error):
                raise
            raise PeerError(
                f"NIXL refuses to read from {name!r}: {error!r}; memory that joined a heap after "
                f"its node was made is not known to it: make the node anew"
            ) from error
        return requests[-1]

    def post(self, request: int) -> tuple[State, BaseException | None]:
        """Start a request; NIXL may move all bytes in this call."""
        return self._state(self._agent.postXferReq, request, "")

    def state(self, request: int) -> tuple[State, BaseException | None]:
        """The state of a request, and the error if it has one. It also makes progress.

        ``created``: it was not posted.
        """
        return self._state(self._agent.getXferStatus, request)

    def _state(self, call: Any, *arguments: Any) -> tuple[State, BaseException | None]:
        try:
            found = call(*arguments)
        except self._nixl.nixlNotPostedError:
            return "created", None
        except Exception as error:
            if is_interrupt(error):
                raise
            return "failed", error.with_traceback(None)
        if found == self._nixl.NIXL_SUCCESS:
            return "done", None
        if found == self._nixl.NIXL_IN_PROG:
            return "running", None
        return "failed", RuntimeError(f"NIXL reports {found}")

    def release(self, request: int) -> None:
        """Give a request up that has ended."""
        try:
            self._agent.releaseXferReq(request)
        except Exception as error:
            if is_interrupt(error):
                raise

    def close(self) -> None:
        """Deregister the memory, and end the agent; nothing may be in flight."""
        agent, self._agent = self._agent, None
        if agent is None:
            return
        with suppress(Exception):
            agent.deregisterMem(self._registered, [])
        del agent  # ends its thread
        self._registered, self._memory = None, []

    def leak(self) -> None:
        """Never end the agent: in a forked child, its thread does not exist."""
        if self._agent is not None:
            # One reference that nobody gives back: the interpreter's end clears lists as well.
            ctypes.pythonapi.Py_IncRef(
                ctypes.py_object((self._agent, self._registered, self._memory))
            )


def _require_descriptors() -> None:
    """Raise if UCX may run out of descriptors while it starts: some of its assertions would fail.

    Raises:
        OSError: this process, or the system, has too few left.
    """
    taken: list[Descriptor] = []
    try:
        while len(taken) < FREE_DESCRIPTORS:
            taken.append(Descriptor("/", os.O_RDONLY))
    except OSError as error:
        if is_interrupt(error):
            raise
        raise OSError(
            error.errno,
            f"{error.strerror}: NIXL needs {FREE_DESCRIPTORS} more, and there are {len(taken)}; "
            f"raise the limit (ulimit -n)",
        ) from error
    finally:
        for file in taken:
            file.close()


def _rows(starts: Int64Array, sizes: Int64Array | int, device: int) -> Any:
    """Address, bytes and device of each, uint64 ``[N, 3]``."""
    table = np.empty((len(starts), 3), np.uint64)
    table[:, 0], table[:, 1], table[:, 2] = starts, sizes, device
    return table

"""``Driver``: what the copy engines need of the CUDA driver, through ctypes.

``cuMemcpyBatchAsync`` takes any number of copies in one call: three arrays of addresses and sizes,
which are NumPy's own here, so that a transfer of 10,000 pieces costs Python as much as one of 10.
What the driver spends on a piece stays: 0.5 us each on an H100 (vLLM #48434). What is known of the
call, and where from:

* CUDA 12.8 has it with nine arguments, the eighth being where the index of the piece that failed
  goes; 13.0 has it without that one, as ``cuMemcpyBatchAsync_v2``, and still exports the first
  under the plain name (``cuda.h`` 13.1, both prototypes).
* The legacy default stream is refused (``cuda.h``: "Must not be legacy NULL stream"), the
  per-thread one is not (cuda-python #2636, vLLM #46379).
* It cannot be captured: it fails without ending the capture, so that a caller who misses the error
  gets a graph that lacks the copy (rmm #2518).
* Copies of one batch run in any order, the batch as a whole in stream order.
* A piece must be inside one registration of host memory: one that spans two is an invalid argument
  (sglang #36798). Pieces of no bytes are refused (rmm #2509).
* Nothing says when the arrays are read. That it is before the call returns is assumed here, and by
  callers that pass arrays on their stack (rmm #2511).
* One call of 51,828 pieces crashed in driver 580 (vLLM #49276): callers group.

A call needs the device's context to be current on the thread that makes it, else it fails with
CUDA_ERROR_INVALID_CONTEXT. Binding it is the caller's part: torch does so on a thread's first use
of a device. The driver keeps no last error, unlike the runtime: a refused call leaves nothing
behind that a later launch would report; but any call may report the failure of earlier work.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from kvheap.kernels.pieces import Pieces

__all__ = ["CopyEngineError", "Direction", "Driver", "Location", "driver"]

Int64Array = npt.NDArray[np.int64]

Direction: TypeAlias = Literal["h2d", "d2h", "d2d", "p2p"]
"""From where to where a batch goes: host to device, device to host, within one device, between."""

MemoryKind: TypeAlias = Literal["device", "pinned", "aliased", "managed"]

BATCH_VERSION = 12080
"""The first CUDA with ``cuMemcpyBatchAsync``, in its form of nine arguments."""

BATCH_V2_VERSION = 13000
"""The first with ``cuMemcpyBatchAsync_v2``, of eight."""

LEGACY_STREAMS = (0, 1)
"""The handles of the legacy default stream: NULL and ``CU_STREAM_LEGACY``. 2 is the per-thread
default stream, which is a stream as any other."""

NO_INDEX = ctypes.c_size_t(-1).value
"""``SIZE_MAX``: where no particular piece failed."""

SRC_ACCESS_ORDER_STREAM = 1
"""Sources are read when the stream comes to the copy. ``ANY`` lets them be read before work that
the stream waits for has written them: wrong KV in vLLM #39306 and #45704."""

FLAG_DEFAULT = 0
FLAG_PREFER_OVERLAP_WITH_COMPUTE = 1

DIRECTION_FLAGS: dict[str, int] = {
    "h2d": FLAG_PREFER_OVERLAP_WITH_COMPUTE,
    "d2h": FLAG_PREFER_OVERLAP_WITH_COMPUTE,
    "d2d": FLAG_DEFAULT,
    "p2p": FLAG_DEFAULT,
}
"""The hint to stay off the SMs, on host links only: one device's copy engine moved 87 GiB/s where
its SMs move 1,627 (nccl #2177)."""

MEMORY_TYPE_HOST = 1
MEMORY_TYPE_DEVICE = 2


class MemLocation(ctypes.Structure):
    """``CUmemLocation``."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class MemcpyAttributes(ctypes.Structure):
    """``CUmemcpyAttributes``.

    The location hints stay 0, ``CU_MEM_LOCATION_TYPE_INVALID``: they count for managed and for
    pageable memory only, and are ignored for all that is copied here (``cuda.h``).
    """

    _fields_ = (
        ("src_access_order", ctypes.c_int),
        ("src_loc_hint", MemLocation),
        ("dst_loc_hint", MemLocation),
        ("flags", ctypes.c_uint),
    )


class _PointerFacts(ctypes.Structure):
    """What ``cuPointerGetAttributes`` is asked, each of the type that it writes."""

    _fields_ = (
        ("memory_type", ctypes.c_uint),
        ("is_managed", ctypes.c_uint),
        ("device", ctypes.c_int),
        ("device_pointer", ctypes.c_uint64),
        ("range_start", ctypes.c_uint64),
        ("range_bytes", ctypes.c_size_t),
    )


POINTER_ATTRIBUTES = {
    "memory_type": 2,
    "is_managed": 8,
    "device": 9,
    "device_pointer": 3,
    "range_start": 11,
    "range_bytes": 12,
}
"""``CUpointer_attribute`` of each field of :class:`_PointerFacts`, in its order."""

_STATUS = ctypes.c_int
_POINTER = ctypes.c_void_p
_ADDRESS = ctypes.c_uint64
_SIZE = ctypes.c_size_t
_BATCH_ARGUMENTS = (_POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _POINTER, _SIZE)

PROTOTYPES = {
    "cuDriverGetVersion": (_POINTER,),
    "cuGetErrorName": (_STATUS, _POINTER),
    "cuGetErrorString": (_STATUS, _POINTER),
    "cuMemcpyAsync": (_ADDRESS, _ADDRESS, _SIZE, _POINTER),
    "cuMemcpyBatchAsync": (*_BATCH_ARGUMENTS, _POINTER, _POINTER),
    "cuMemcpyBatchAsync_v2": (*_BATCH_ARGUMENTS, _POINTER),
    "cuPointerGetAttributes": (ctypes.c_uint, _POINTER, _POINTER, _ADDRESS),
    "cuStreamIsCapturing": (_POINTER, _POINTER),
}
"""The arguments of the functions used. All return a status, and ctypes calls all without the GIL.
Of those that have a variant for the per-thread default stream (``_ptsz``) it is never used."""


class CopyEngineError(RuntimeError):
    """The driver refused a call.

    Attributes:
        call: the driver's function.
        code: what it returned.
        name: the name of that code, ``CUDA_ERROR_...``.
        details: the driver's text, and what was to be copied.
        piece: index of the piece that failed, where that is known.

    >>> print(CopyEngineError("cuMemcpyAsync", 1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"))
    cuMemcpyAsync: CUDA_ERROR_INVALID_VALUE (1): invalid argument
    """

    def __init__(
        self, call: str, code: int, name: str, details: str, piece: int | None = None
    ) -> None:
        super().__init__(f"{call}: {name} ({code}): {details}")
        self.call = call
        self.code = code
        self.name = name
        self.details = details
        self.piece = piece

    def __reduce__(self) -> tuple[type[CopyEngineError], tuple[object, ...]]:
        return type(self), (self.call, self.code, self.name, self.details, self.piece)


@dataclass(frozen=True, slots=True)
class Location:
    """What the driver knows of an address.

    Attributes:
        kind: ``"device"``, ``"managed"``, or of host memory ``"pinned"`` and ``"aliased"``: pinned
            too, but devices have it at another address, and a batch that is given this one faults
            later (WSL2; sglang #40232).
        device: ordinal of the device that has it, or for which it was registered.
        start: first address of the allocation or registration.
        end: behind its last.
    """

    kind: MemoryKind
    device: int
    start: int
    end: int


class Driver:
    """The driver's copies, and what it knows of memory. Thread-safe.

    Args:
        library: has the driver's functions as attributes: a ``ctypes.CDLL``, or a stand-in.

    Attributes:
        version: the CUDA version that the driver supports, 1000 * major + 10 * minor.
        batch_form: how many arguments its batched copy takes; None where it has none.

    Raises:
        CopyEngineError: the driver does not tell its version.
        AttributeError: the library lacks a function that every driver has.
    """

    def __init__(self, library: object) -> None:
        self._get_error_name = _function(library, "cuGetErrorName")
        self._get_error_string = _function(library, "cuGetErrorString")
        self._memcpy_async = _function(library, "cuMemcpyAsync")
        self._pointer_get_attributes = _function(library, "cuPointerGetAttributes")
        self._stream_is_capturing = _function(library, "cuStreamIsCapturing")
        version = ctypes.c_int(0)
        get_version = _function(library, "cuDriverGetVersion")
        self._require("cuDriverGetVersion", get_version(ctypes.byref(version)))
        self.version = version.value
        self.batch_form: Literal[8, 9] | None = None
        self._batch: Callable[..., int] | None = None
        if self.version >= BATCH_V2_VERSION and hasattr(library, "cuMemcpyBatchAsync_v2"):
            self.batch_form = 8
            self._batch = _function(library, "cuMemcpyBatchAsync_v2")
        elif self.version >= BATCH_VERSION and hasattr(library, "cuMemcpyBatchAsync"):
            self.batch_form = 9
            self._batch = _function(library, "cuMemcpyBatchAsync")

    @classmethod
    def load(cls) -> Driver:
        """The driver of this machine. :func:`driver` keeps one for the process.

        Raises:
            RuntimeError: there is none.
        """
        try:
            library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise RuntimeError(f"no CUDA driver on this machine: {error}") from error
        return cls(library)

    @property
    def has_batch(self) -> bool:
        """Whether there is a batched copy: since CUDA 12.8."""
        return self._batch is not None

    def copy_batch(self, pieces: Pieces, stream: int, direction: Direction) -> None:
        """Enqueue all pieces in one call of ``cuMemcpyBatchAsync``; no pieces, no call.

        Sources are read, and targets written, when ``stream`` comes to it; pieces in any order.
        Pieces and their arrays may go when the call returns, the memory must stay.
        Python's share is O(1), besides writing out a size that all have in common.

        Args:
            pieces: none of them across the end of a registration or allocation, on either side.
            stream: handle of a stream, not of the legacy default one.
            direction: of all pieces; a hint, which the addresses need not bear out.

        Raises:
            ValueError: the stream is the legacy default one, the direction is none, or the arrays
                of ``pieces`` differ in length; nothing was called.
            RuntimeError: the driver has no batched copy, or the stream is being captured; nothing
                was enqueued.
            CopyEngineError: the driver refused. What it enqueued before is not documented: the
                targets hold anything once the stream has run.
        """
        flags = DIRECTION_FLAGS.get(direction)
        if flags is None:
            raise ValueError(f"direction must be one of {[*DIRECTION_FLAGS]}, got {direction!r}")
        if stream in LEGACY_STREAMS:
            raise ValueError(
                f"cuMemcpyBatchAsync refuses the legacy default stream, got handle {stream}; "
                "use another stream, or copy each piece by itself"
            )
        if self._batch is None:
            raise RuntimeError(
                "the driver has no batched copy, which came with CUDA 12.8: it supports CUDA "
                f"{self.version // 1000}.{self.version % 1000 // 10}"
            )
        _require_same_lengths(pieces)
        if not len(pieces):
            return
        if self.is_capturing(stream):
            raise RuntimeError(
                "cuMemcpyBatchAsync cannot be captured in a CUDA graph, which would lack the "
                "copies; copy before or after the capture, or each piece by itself"
            )
        # Held here until the call has returned; most are the pieces' own arrays.
        targets = np.ascontiguousarray(pieces.targets, np.int64)
        sources = np.ascontiguousarray(pieces.sources, np.int64)
        sizes = np.ascontiguousarray(pieces.size_array(), np.int64)
        attributes = MemcpyAttributes(src_access_order=SRC_ACCESS_ORDER_STREAM, flags=flags)
        # One entry for each of the attributes, not for each piece: the first piece that it is for.
        first_piece = ctypes.c_size_t(0)
        failed_piece = ctypes.c_size_t(NO_INDEX)
        code = self._batch(
            targets.ctypes.data,
            sources.ctypes.data,
            sizes.ctypes.data,
            len(pieces),
            ctypes.byref(attributes),
            ctypes.byref(first_piece),
            1,
            *((ctypes.byref(failed_piece),) if self.batch_form == 9 else ()),
            stream,
        )
        if code:
            raise self._batch_error(code, pieces, failed_piece.value, stream)

    def copy_each(self, pieces: Pieces, stream: int) -> None:
        """Enqueue the pieces by one ``cuMemcpyAsync`` each, in their order.

        For drivers without a batched copy, for the legacy default stream, for captures, and for
        few pieces.

        Args:
            pieces: as for :meth:`copy_batch`.
            stream: handle of any stream; of one that is captured, the copies become nodes of the
                graph, and a replay copies from and to the same addresses.

        Raises:
            ValueError: the arrays of ``pieces`` differ in length; nothing was called.
            CopyEngineError: the driver refused a piece; those before it are enqueued.
        """
        _require_same_lengths(pieces)
        sizes = repeat(pieces.sizes) if isinstance(pieces.sizes, int) else pieces.sizes.tolist()
        copies = zip(pieces.targets.tolist(), pieces.sources.tolist(), sizes, strict=False)
        for index, (target, source, size) in enumerate(copies):
            code = self._memcpy_async(target, source, size, stream)
            if code:
                what = f"{_describe(pieces, index)}, on stream {stream:#x}"
                raise self._error("cuMemcpyAsync", code, what, index)

    def is_capturing(self, stream: int) -> bool:
        """Whether what is enqueued on ``stream`` goes into a graph, or a broken capture.

        Raises:
            CopyEngineError: the driver refused; for the legacy default stream, as long as another
                stream that waits for it is being captured.
        """
        status = ctypes.c_int(0)
        code = self._stream_is_capturing(stream, ctypes.byref(status))
        self._require("cuStreamIsCapturing", code)
        return status.value != 0

    def locate(self, address: int) -> Location | None:
        """What the driver knows of ``address``; None of memory that it does not know: pageable.

        Raises:
            CopyEngineError: the driver refused.
        """
        facts = _PointerFacts()
        start = ctypes.addressof(facts)
        fields = [start + getattr(_PointerFacts, name).offset for name in POINTER_ATTRIBUTES]
        count = len(fields)
        code = self._pointer_get_attributes(
            count,
            (ctypes.c_int * count)(*POINTER_ATTRIBUTES.values()),
            (ctypes.c_void_p * count)(*fields),
            address,
        )
        self._require("cuPointerGetAttributes", code, f"address {address:#x}")
        kind: MemoryKind
        if facts.memory_type not in (MEMORY_TYPE_HOST, MEMORY_TYPE_DEVICE):
            return None
        if facts.is_managed:
            kind = "managed"
        elif facts.memory_type == MEMORY_TYPE_DEVICE:
            kind = "device"
        else:
            kind = "pinned" if facts.device_pointer in (0, address) else "aliased"
        end = facts.range_start + facts.range_bytes
        return Location(kind, facts.device, facts.range_start, end)

    def _require(self, call: str, code: int, what: str = "") -> None:
        if code:
            raise self._error(call, code, what)

    def _batch_error(
        self, code: int, pieces: Pieces, failed_piece: int, stream: int
    ) -> CopyEngineError:
        call = "cuMemcpyBatchAsync" if self.batch_form == 9 else "cuMemcpyBatchAsync_v2"
        if failed_piece < len(pieces):
            what = f"{_describe(pieces, failed_piece)}, on stream {stream:#x}"
            return self._error(call, code, what, failed_piece)
        what = f"some of {pieces!r}, on stream {stream:#x}; the driver does not say which"
        return self._error(call, code, what)

    def _error(self, call: str, code: int, what: str, piece: int | None = None) -> CopyEngineError:
        name = _text(self._get_error_name, code) or "an unknown CUDA error"
        parts = (_text(self._get_error_string, code), what)
        return CopyEngineError(call, code, name, "; ".join(filter(None, parts)), piece)


@functools.lru_cache(maxsize=1)
def driver() -> Driver:
    """:meth:`Driver.load`, once for the process.

    Raises:
        RuntimeError: there is no CUDA driver; the next call looks again.
    """
    return Driver.load()


def _function(library: object, name: str) -> Callable[..., int]:
    """The function under its prototype; a cast, as the library may be shared with others."""
    prototype = ctypes.CFUNCTYPE(_STATUS, *PROTOTYPES[name])
    return ctypes.cast(getattr(library, name), prototype)


def _text(get_text: Callable[..., int], code: int) -> str:
    """The driver's name or description of a code; empty where it knows none."""
    text = ctypes.c_char_p()
    get_text(code, ctypes.byref(text))
    return (text.value or b"").decode(errors="replace")


def _require_same_lengths(pieces: Pieces) -> None:
    # The driver would read behind the shorter one.
    count = len(pieces.sources)
    num_sizes = count if isinstance(pieces.sizes, int) else len(pieces.sizes)
    if not count == len(pieces.targets) == num_sizes:
        raise ValueError(
            f"got {count} sources, {len(pieces.targets)} targets and {num_sizes} sizes"
        )


def _describe(pieces: Pieces, index: int) -> str:
    size = pieces.sizes if isinstance(pieces.sizes, int) else int(pieces.sizes[index])
    return (
        f"piece {index} of {len(pieces)}: {size} bytes from {int(pieces.sources[index]):#x} to "
        f"{int(pieces.targets[index]):#x}"
    )

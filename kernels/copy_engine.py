"""``Driver``: the CUDA driver's asynchronous copies and its knowledge of memory, through ctypes.

``cuMemcpyBatchAsync`` takes any number of copies in one call, as three arrays of addresses and
sizes. NumPy's own arrays are passed, so a transfer of 10,000 pieces costs Python as much as one of
10. The driver itself spends 0.5 us on each piece on an H100 (vLLM #48434). Known facts about the
call, with sources:

* CUDA 12.8 has it with nine arguments; the eighth receives the index of the piece that failed. CUDA
  13.0 has it without that argument, as ``cuMemcpyBatchAsync_v2``, and still exports the first under
  the plain name (``cuda.h`` 13.1, both prototypes).
* It refuses the legacy default stream (``cuda.h``: "Must not be legacy NULL stream") but accepts
  the per-thread one (cuda-python #2636, vLLM #46379).
* It cannot be captured. It fails without ending the capture, so a caller that ignores the error
  gets a graph without the copy (rmm #2518).
* The copies of one batch run in any order; the batch as a whole runs in stream order.
* A piece must lie within one registration of host memory. A piece that crosses into a second one is
  an invalid argument (sglang #36798). Pieces of no bytes are refused (rmm #2509).
* The documentation does not say when the driver reads the arrays. This module assumes that it has
  read them when the call returns, as do callers that pass arrays on their stack (rmm #2511).
* One call of 51,828 pieces crashed in driver 580 (vLLM #49276); callers must split such batches.

The device's context must be current on the calling thread, else a call fails with
CUDA_ERROR_INVALID_CONTEXT. The caller must bind the context; torch does so when a thread first uses
a device. Unlike the runtime, the driver keeps no last error, so a later launch does not report a
refused call. But any call may report the failure of earlier work.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from typing import Literal, TypeAlias

import numpy as np

from kvheap.kernels.arrays import Int64Array
from kvheap.kernels.cuda_declarations import (
    FLAG_DEFAULT,
    FLAG_PREFER_OVERLAP_WITH_COMPUTE,
    MEMORY_TYPE_DEVICE,
    MEMORY_TYPE_HOST,
    POINTER_ATTRIBUTES,
    SRC_ACCESS_ORDER_STREAM,
    MemcpyAttributes,
    PointerFacts,
    bind,
)
from kvheap.kernels.pieces import Pieces

__all__ = ["CopyEngineError", "Driver", "Location", "driver"]

MemoryKind: TypeAlias = Literal["device", "pinned", "aliased", "managed"]

BATCH_VERSION = 12080
"""The first CUDA version with ``cuMemcpyBatchAsync``, which has nine arguments."""

BATCH_V2_VERSION = 13000
"""The first CUDA version with ``cuMemcpyBatchAsync_v2``, which has eight arguments."""

LEGACY_STREAMS = (0, 1)
"""The handles of the legacy default stream: NULL and ``CU_STREAM_LEGACY``. The per-thread default
stream, 2, is a stream like any other."""

NO_INDEX = ctypes.c_size_t(-1).value
"""``SIZE_MAX``: the index if the driver does not name the piece that failed."""

MAX_KEPT_SIZES = 32_768
"""Arrays of equal sizes are kept for the next call up to this length, 16 of them: 4 MiB."""


class CopyEngineError(RuntimeError):
    """The driver refused a call.

    Attributes:
        call: name of the driver's function.
        code: the status that it returned.
        name: name of that status, ``CUDA_ERROR_...``.
        details: the driver's description of the status, and the copy that failed.
        piece: index of the piece that failed, or None if it is not known.

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
    """What the driver knows about an address.

    Attributes:
        kind: ``"device"`` or ``"managed"``; for host memory ``"pinned"``, or ``"aliased"`` if it is
            pinned but devices reach it at another address. A batched copy with an aliased address
            faults later (WSL2; sglang #40232).
        device: ordinal of the device that has the memory, or for which it was registered.
        start: first address of the allocation or registration.
        end: address after its last byte.
    """

    kind: MemoryKind
    device: int
    start: int
    end: int


class Driver:
    """The CUDA driver's copies and its knowledge of memory. Thread-safe.

    Copy pieces: :meth:`copy_batch`, :meth:`copy_each`. Ask: :attr:`has_batch`,
    :meth:`is_capturing`, :meth:`locate`.

    Args:
        library: an object with the driver's functions as attributes: a ``ctypes.CDLL`` or a
            stand-in.

    Attributes:
        version: the CUDA version that the driver supports, 1000 * major + 10 * minor.
        batch_form: the number of arguments of its batched copy; None if it has no batched copy.
        exchange_capture_mode: ``cuThreadExchangeStreamCaptureMode``, as it is.

    Raises:
        CopyEngineError: the driver refuses to tell its version.
        AttributeError: the library lacks a function that every driver has.
    """

    def __init__(self, library: object) -> None:
        self._get_error_name = bind(library, "cuGetErrorName")
        self._get_error_string = bind(library, "cuGetErrorString")
        self._memcpy_async = bind(library, "cuMemcpyAsync")
        self._pointer_get_attributes = bind(library, "cuPointerGetAttributes")
        self._stream_is_capturing = bind(library, "cuStreamIsCapturing")
        self.exchange_capture_mode = bind(library, "cuThreadExchangeStreamCaptureMode")
        version = ctypes.c_int(0)
        get_version = bind(library, "cuDriverGetVersion")
        self._require("cuDriverGetVersion", get_version(ctypes.byref(version)))
        self.version = version.value
        self.batch_form: Literal[8, 9] | None = None
        self._batch: Callable[..., int] | None = None
        if self.version >= BATCH_V2_VERSION and hasattr(library, "cuMemcpyBatchAsync_v2"):
            self.batch_form = 8
            self._batch = bind(library, "cuMemcpyBatchAsync_v2")
        elif self.version >= BATCH_VERSION and hasattr(library, "cuMemcpyBatchAsync"):
            self.batch_form = 9
            self._batch = bind(library, "cuMemcpyBatchAsync")

    @classmethod
    def load(cls) -> Driver:
        """The driver of this machine; :func:`driver` keeps one for the process.

        Raises:
            RuntimeError: the machine has no CUDA driver.
        """
        try:
            library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise RuntimeError(f"no CUDA driver on this machine: {error}") from error
        return cls(library)

    @property
    def has_batch(self) -> bool:
        """Whether the driver has a batched copy, which came with CUDA 12.8."""
        return self._batch is not None

    def copy_batch(self, pieces: Pieces, stream: int, *, over_link: bool) -> None:
        """Enqueue all pieces with one call of ``cuMemcpyBatchAsync``; with no pieces, do nothing.

        The batch as a whole reads and writes in stream order; its pieces are copied in any order.
        The pieces and their arrays may be dropped when the call returns, but the memory that they
        refer to must stay. Costs Python O(1), plus O(N) array work if all pieces have one size,
        which must be repeated for each.

        Args:
            pieces: none may cross the end of a registration or allocation, on either side.
            stream: handle of a stream other than the legacy default one.
            over_link: whether one side is host memory, so that the bytes cross the host link. It
                only gives the driver a hint to stay off the SMs, so it need not be right.

        Raises:
            ValueError: the stream is the legacy default one, or the arrays of ``pieces`` differ in
                length; nothing was called.
            RuntimeError: the driver has no batched copy, or the stream is being captured; nothing
                was enqueued.
            CopyEngineError: the driver refused. It may have enqueued some pieces before that, so
                the targets are undefined once the stream has run.
        """
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
                "cuMemcpyBatchAsync cannot be captured in a CUDA graph: the graph would lack the "
                "copies; copy before or after the capture, or copy each piece by itself"
            )
        # These must live until the call has returned; most are the pieces' own arrays.
        targets = np.ascontiguousarray(pieces.targets, np.int64)
        sources = np.ascontiguousarray(pieces.sources, np.int64)
        if isinstance(pieces.sizes, int):
            sizes, sizes_address = _equal_sizes(pieces.sizes, len(pieces))
        else:
            sizes = np.ascontiguousarray(pieces.sizes, np.int64)
            sizes_address = _address_of(sizes)
        # One set of attributes, with the index of the first piece that it applies to.
        attributes = _OVER_LINK if over_link else _WITHIN_DEVICE
        failed_piece = ctypes.c_size_t(NO_INDEX)
        code = self._batch(
            _address_of(targets),
            _address_of(sources),
            sizes_address,
            len(pieces),
            ctypes.byref(attributes),
            ctypes.byref(_FIRST_PIECE),
            1,
            *((ctypes.byref(failed_piece),) if self.batch_form == 9 else ()),
            stream,
        )
        if code:
            raise self._batch_error(code, pieces, failed_piece.value, stream)

    def copy_each(self, pieces: Pieces, stream: int) -> None:
        """Enqueue the pieces in order, with one ``cuMemcpyAsync`` each.

        For drivers without a batched copy, for the legacy default stream, for captures, and for
        few pieces.

        Args:
            pieces: as for :meth:`copy_batch`.
            stream: handle of any stream. If it is being captured, the copies become nodes of the
                graph, and a replay copies from and to the same addresses.

        Raises:
            ValueError: the arrays of ``pieces`` differ in length; nothing was called.
            CopyEngineError: the driver refused a piece; the pieces before it are enqueued.
        """
        _require_same_lengths(pieces)
        sizes = repeat(pieces.sizes) if isinstance(pieces.sizes, int) else pieces.sizes.tolist()
        copies = zip(pieces.targets.tolist(), pieces.sources.tolist(), sizes, strict=False)
        for index, (target, source, size) in enumerate(copies):
            code = self._memcpy_async(target, source, size, stream)
            if code:
                what = f"{_describe(pieces, index)}, on stream {stream:#x}"
                raise self._error("cuMemcpyAsync", code, what, index)

    def copy_one(self, source: int, target: int, num_bytes: int, stream: int) -> None:
        """Enqueue one copy by ``cuMemcpyAsync``; the addresses are as those of pieces.

        Raises:
            CopyEngineError: the driver refused.
        """
        code = self._memcpy_async(target, source, num_bytes, stream)
        if code:
            what = f"{num_bytes} bytes from {source:#x} to {target:#x}, on stream {stream:#x}"
            raise self._error("cuMemcpyAsync", code, what)

    def is_capturing(self, stream: int) -> bool:
        """Whether ``stream`` is being captured in a CUDA graph, even if the capture has failed.

        Raises:
            CopyEngineError: the driver refused. It refuses for the legacy default stream while a
                stream that waits for the default stream is being captured.
        """
        status = ctypes.c_int(0)
        code = self._stream_is_capturing(stream, ctypes.byref(status))
        self._require("cuStreamIsCapturing", code)
        return status.value != 0

    def locate(self, address: int) -> Location | None:
        """What the driver knows about ``address``; None for pageable memory, unknown to the driver.

        Raises:
            CopyEngineError: the driver refused.
        """
        facts = PointerFacts()
        start = ctypes.addressof(facts)
        fields = [start + getattr(PointerFacts, name).offset for name in POINTER_ATTRIBUTES]
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
    """The driver of this machine, loaded once for the process.

    Raises:
        RuntimeError: there is no CUDA driver; the next call tries again.
    """
    return Driver.load()


def _text(get_text: Callable[..., int], code: int) -> str:
    """The driver's name or description of a status; empty if it has none."""
    text = ctypes.c_char_p()
    get_text(code, ctypes.byref(text))
    return (text.value or b"").decode(errors="replace")


_OVER_LINK, _WITHIN_DEVICE = (
    MemcpyAttributes(src_access_order=SRC_ACCESS_ORDER_STREAM, flags=flags)
    for flags in (FLAG_PREFER_OVERLAP_WITH_COMPUTE, FLAG_DEFAULT)
)
_FIRST_PIECE = ctypes.c_size_t(0)
"""What a batch call only reads: how its pieces are copied, and from which piece on."""


def _equal_sizes(size_bytes: int, count: int) -> tuple[Int64Array, int]:
    """At least ``count`` equal sizes, int64, to be read only; and their address."""
    if count > MAX_KEPT_SIZES:
        return _new_sizes(size_bytes, count)
    return _kept_sizes(size_bytes, 1 << (count - 1).bit_length())


def _new_sizes(size_bytes: int, count: int) -> tuple[Int64Array, int]:
    sizes = np.full(count, size_bytes, np.int64)
    return sizes, _address_of(sizes)


_kept_sizes = functools.lru_cache(maxsize=16)(_new_sizes)


def _address_of(array: Int64Array) -> int:
    """The address of the first byte; a third of the time of ``array.ctypes.data``."""
    if array.flags.writeable and len(array):
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]
    address: int = array.ctypes.data
    return address


def _require_same_lengths(pieces: Pieces) -> None:
    # The driver would read beyond the end of the shorter array.
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

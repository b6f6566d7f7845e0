"""A stand-in for libcuda: C functions that read their arguments as bytes, and copy by memmove.

``Driver(FakeDriver())`` calls real function pointers through ctypes, so that arguments cross the
same boundary as on the way to the driver. Addresses are this process's own, whatever they stand
for: "device" memory is host memory that was declared by :meth:`FakeDriver.register`.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

INVALID_VALUE = 1
OUT_OF_MEMORY = 2
INVALID_CONTEXT = 201
ILLEGAL_ADDRESS = 700
CAPTURE_UNSUPPORTED = 900
UNKNOWN = 999

ERRORS = {
    INVALID_VALUE: ("CUDA_ERROR_INVALID_VALUE", "invalid argument"),
    OUT_OF_MEMORY: ("CUDA_ERROR_OUT_OF_MEMORY", "out of memory"),
    INVALID_CONTEXT: ("CUDA_ERROR_INVALID_CONTEXT", "invalid device context"),
    ILLEGAL_ADDRESS: ("CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"),
    CAPTURE_UNSUPPORTED: (
        "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
        "operation not permitted when stream is capturing",
    ),
    UNKNOWN: ("CUDA_ERROR_UNKNOWN", "unknown error"),
}

SIZE_MAX = ctypes.c_size_t(-1).value
ATTRIBUTES_BYTES = 24

_int, _uint, _pointer = ctypes.c_int, ctypes.c_uint, ctypes.c_void_p
_address, _size = ctypes.c_uint64, ctypes.c_size_t
_BATCH = (_pointer, _pointer, _pointer, _size, _pointer, _pointer, _size)
# Written down a second time, from cuda.h, instead of taken from the module under test.
PROTOTYPES = {
    "cuDriverGetVersion": (_pointer,),
    "cuGetErrorName": (_int, _pointer),
    "cuGetErrorString": (_int, _pointer),
    "cuMemcpyAsync": (_address, _address, _size, _pointer),
    "cuMemcpyBatchAsync": (*_BATCH, _pointer, _pointer),
    "cuMemcpyBatchAsync_v2": (*_BATCH, _pointer),
    "cuPointerGetAttributes": (_uint, _pointer, _pointer, _address),
    "cuStreamIsCapturing": (_pointer, _pointer),
    "cuThreadExchangeStreamCaptureMode": (_pointer,),
}

KIND_TYPES = {"pinned": 1, "device": 2, "managed": 2}

Copy = tuple[int, int, int]
"""Target, source, bytes."""


@dataclass(frozen=True)
class BatchCall:
    """One ``cuMemcpyBatchAsync``, each argument as the bytes that lay at its address."""

    name: str
    dsts: bytes
    srcs: bytes
    sizes: bytes
    count: int
    attributes: bytes
    attribute_indices: bytes
    num_attributes: int
    fail_index_address: int | None
    stream: int

    @property
    def copies(self) -> list[Copy]:
        """The pieces, in the order of the arrays."""
        columns = (np.frombuffer(raw, "<u8").tolist() for raw in (self.dsts, self.srcs, self.sizes))
        return list(zip(*columns, strict=True))


@dataclass(frozen=True)
class CopyCall:
    """One ``cuMemcpyAsync``."""

    dst: int
    src: int
    size: int
    stream: int


@dataclass(frozen=True)
class OtherCall:
    """A call that copies nothing."""

    name: str
    arguments: tuple[int, ...]


@dataclass(frozen=True)
class Range:
    """Memory that the driver knows."""

    start: int
    end: int
    kind: str
    device: int
    device_address: int


@dataclass
class Fault:
    """What :meth:`FakeDriver.fail` was told."""

    nth: int
    code: int
    fail_index: int | None
    after: int


@dataclass
class FakeDriver:
    """The driver, as far as kvheap calls it.

    Args:
        version: 12060 has no batched copy; 12080 the one of nine arguments; 13000 also the one of
            eight.
        deferred: copies wait for :meth:`run`; else they are done before the call returns.

    Attributes:
        calls: all calls but those for version, error names and texts.
        capturing: handles of the streams that count as being captured.
        modes: the capture mode of each thread that is not in mode global, 0, by its number.
        broken: what went wrong in here; a test should find it empty.
    """

    version: int = 13010
    deferred: bool = False
    calls: list[BatchCall | CopyCall | OtherCall] = field(default_factory=list)
    capturing: dict[int, int] = field(default_factory=dict)
    modes: dict[int, int] = field(default_factory=dict)
    ranges: list[Range] = field(default_factory=list)
    broken: list[BaseException] = field(default_factory=list)
    _faults: dict[str, list[Fault]] = field(default_factory=dict)
    _queues: dict[int, list[list[Copy]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._texts = {
            code: [ctypes.create_string_buffer(text.encode()) for text in texts]
            for code, texts in ERRORS.items()
        }
        bodies: dict[str, Callable[..., int]] = {
            "cuDriverGetVersion": self._get_version,
            "cuGetErrorName": lambda code, out: self._get_text(0, code, out),
            "cuGetErrorString": lambda code, out: self._get_text(1, code, out),
            "cuMemcpyAsync": self._memcpy,
            "cuPointerGetAttributes": self._pointer_attributes,
            "cuStreamIsCapturing": self._is_capturing,
            "cuThreadExchangeStreamCaptureMode": self._exchange_mode,
        }
        if self.version >= 12080:
            bodies["cuMemcpyBatchAsync"] = partial(self._batch, "cuMemcpyBatchAsync")
        if self.version >= 13000:
            bodies["cuMemcpyBatchAsync_v2"] = partial(self._batch, "cuMemcpyBatchAsync_v2")
        for name, body in bodies.items():
            setattr(self, name, self.as_function(name, body))

    def as_function(self, name: str, body: Callable[..., int]) -> Callable[..., int]:
        """``body`` as a C function; also for a test that replaces one of them."""

        def guarded(*arguments: int | None) -> int:
            try:  # ctypes would print it, and return 0
                return body(*arguments)
            except BaseException as error:
                self.broken.append(error)
                return UNKNOWN

        return ctypes.CFUNCTYPE(ctypes.c_int, *PROTOTYPES[name])(guarded)

    def register(
        self,
        start: int,
        num_bytes: int,
        kind: str = "pinned",
        device: int = 0,
        device_address: int | None = None,
    ) -> None:
        """Let the driver know some memory: "pinned", "device" or "managed".

        Args:
            device_address: where devices have it, if elsewhere.
        """
        known = start if device_address is None else device_address
        self.ranges.append(Range(start, start + num_bytes, kind, device, known))

    def unregister(self, start: int) -> None:
        """Forget it."""
        self.ranges = [known for known in self.ranges if known.start != start]

    def fail(
        self, call: str, nth: int, code: int, fail_index: int | None = None, after: int = 0
    ) -> None:
        """Let a call fail.

        Args:
            call: a function's name.
            nth: which of its calls from now on, from 0.
            code: what it returns.
            fail_index: the piece that a batch names, where its form can.
            after: how many pieces of the batch are copied all the same.
        """
        self._faults.setdefault(call, []).append(Fault(nth, code, fail_index, after))

    def run(self, stream: int | None = None) -> int:
        """Do the copies that wait on ``stream``, or on all; sources are read now.

        Returns:
            How many there were.
        """
        streams = [*self._queues] if stream is None else [stream]
        done = 0
        for handle in streams:
            for copies in self._queues.pop(handle, []):
                # Within a batch no order is promised: not the order of the arrays, then.
                for dst, src, size in reversed(copies):
                    ctypes.memmove(dst, src, size)
                done += len(copies)
        return done

    def batches(self) -> list[BatchCall]:
        """The batched calls."""
        return [call for call in self.calls if isinstance(call, BatchCall)]

    def copies(self) -> list[CopyCall]:
        """The calls of single copies."""
        return [call for call in self.calls if isinstance(call, CopyCall)]

    def _fault(self, call: str) -> Fault | None:
        due = None
        for fault in self._faults.get(call, []):
            if fault.nth == 0:
                due = fault
            fault.nth -= 1
        return due

    def _enqueue(self, copies: list[Copy], stream: int) -> None:
        self._queues.setdefault(stream, []).append(copies)
        if not self.deferred:
            self.run(stream)

    def _is_refused(self, copy: Copy) -> bool:
        """Null or empty, or with a side that leaves the range that it starts in."""
        *sides, size = copy
        return (
            size == 0
            or 0 in sides
            or any(
                known.start <= side < known.end < side + size
                for side in sides
                for known in self.ranges
            )
        )

    def _get_version(self, out: int) -> int:
        fault = self._fault("cuDriverGetVersion")
        ctypes.c_int.from_address(out).value = self.version
        return fault.code if fault else 0

    def _get_text(self, which: int, code: int, out: int) -> int:
        texts = self._texts.get(code)
        address = ctypes.addressof(texts[which]) if texts else 0
        ctypes.c_size_t.from_address(out).value = address
        return 0 if texts else INVALID_VALUE

    def _memcpy(self, dst: int, src: int, size: int, stream: int | None) -> int:
        handle = stream or 0
        self.calls.append(CopyCall(dst, src, size, handle))
        fault = self._fault("cuMemcpyAsync")
        if fault is not None:
            return fault.code
        if self._is_refused((dst, src, size)):
            return INVALID_VALUE
        self._enqueue([(dst, src, size)], handle)
        return 0

    def _batch(
        self,
        name: str,
        dsts: int,
        srcs: int,
        sizes: int,
        count: int,
        attributes: int,
        attribute_indices: int,
        num_attributes: int,
        *fail_index_and_stream: int | None,
    ) -> int:
        """Of either form: the one of eight arguments has no place for an index."""
        *place, stream = fail_index_and_stream
        fail_index = place[0] if place else None
        call = BatchCall(
            name,
            ctypes.string_at(dsts, 8 * count),
            ctypes.string_at(srcs, 8 * count),
            ctypes.string_at(sizes, 8 * count),
            count,
            ctypes.string_at(attributes, ATTRIBUTES_BYTES * num_attributes),
            ctypes.string_at(attribute_indices, 8 * num_attributes),
            num_attributes,
            fail_index,
            stream or 0,
        )
        self.calls.append(call)
        code, index, done = self._judge(call)
        if done:
            self._enqueue(done, call.stream)
        if code and fail_index is not None:
            known = SIZE_MAX if index is None else index
            ctypes.c_size_t.from_address(fail_index).value = known
        return code

    def _judge(self, call: BatchCall) -> tuple[int, int | None, list[Copy]]:
        """The status, the piece that fails, and the copies that are made."""
        copies = call.copies
        fault = self._fault(call.name)
        if fault is not None:
            return fault.code, fault.fail_index, copies[: fault.after]
        first_indices = np.frombuffer(call.attribute_indices, "<u8").tolist()
        access_orders = np.frombuffer(call.attributes, "<i4")[:: ATTRIBUTES_BYTES // 4].tolist()
        if call.stream in self.capturing:
            return CAPTURE_UNSUPPORTED, None, []
        if (
            call.stream in (0, 1)
            or not 0 < call.num_attributes <= call.count
            or first_indices[0] != 0
            or not set(access_orders) <= {1, 2, 3}
        ):
            return INVALID_VALUE, None, []
        for index, copy in enumerate(copies):
            if self._is_refused(copy):
                return INVALID_VALUE, index, []
        return 0, None, copies

    def _is_capturing(self, stream: int | None, out: int) -> int:
        handle = stream or 0
        self.calls.append(OtherCall("cuStreamIsCapturing", (handle,)))
        fault = self._fault("cuStreamIsCapturing")
        ctypes.c_int.from_address(out).value = self.capturing.get(handle, 0)
        return fault.code if fault else 0

    def _exchange_mode(self, pointer: int) -> int:
        mode, thread = ctypes.c_int.from_address(pointer), threading.get_ident()
        mode.value, self.modes[thread] = self.modes.get(thread, 0), mode.value
        return 0

    def _pointer_attributes(self, count: int, attributes: int, out: int, address: int) -> int:
        self.calls.append(OtherCall("cuPointerGetAttributes", (address,)))
        fault = self._fault("cuPointerGetAttributes")
        if fault is not None:
            return fault.code
        found = next((r for r in self.ranges if r.start <= address < r.end), None)
        names = (ctypes.c_int * count).from_address(attributes)
        places = (ctypes.c_size_t * count).from_address(out)
        for attribute, place in zip(names, places, strict=True):
            kind, value = self._attribute(attribute, found, address)
            kind.from_address(place).value = value
        return 0

    def _attribute(
        self, attribute: int, found: Range | None, address: int
    ) -> tuple[type[ctypes._SimpleCData[int]], int]:
        """An attribute of ``CUpointer_attribute``, by number: its type there, and its value."""
        if attribute == 2:
            return ctypes.c_uint, KIND_TYPES[found.kind] if found else 0
        if attribute == 3:
            return ctypes.c_uint64, found.device_address + address - found.start if found else 0
        if attribute == 8:
            return ctypes.c_uint, int(found is not None and found.kind == "managed")
        if attribute == 9:
            return ctypes.c_int, found.device if found else -2
        if attribute == 11:
            return ctypes.c_uint64, found.start if found else 0
        if attribute == 12:
            return ctypes.c_size_t, found.end - found.start if found else 0
        raise AssertionError(f"attribute {attribute} is not known here")

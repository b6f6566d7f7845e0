"""Declarations of ``cuda.h``: the structures, constants and prototypes that kvheap uses.

Tests compare them with the header that Triton ships, by means of a C compiler.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

__all__ = [
    "FLAG_DEFAULT",
    "FLAG_PREFER_OVERLAP_WITH_COMPUTE",
    "KEEP_GIL",
    "MEMORY_TYPE_DEVICE",
    "MEMORY_TYPE_HOST",
    "POINTER_ATTRIBUTES",
    "PROTOTYPES",
    "SRC_ACCESS_ORDER_STREAM",
    "MemLocation",
    "MemcpyAttributes",
    "PointerFacts",
    "bind",
]

SRC_ACCESS_ORDER_STREAM = 1
"""Sources are read in stream order. With ``ANY``, they may be read before work that the stream
waits for has written them, which gave wrong KV in vLLM #39306 and #45704."""

FLAG_DEFAULT = 0

FLAG_PREFER_OVERLAP_WITH_COMPUTE = 1
"""The hint to stay off the SMs, given only for host links: within a device, a copy engine moved
87 GiB/s and the SMs 1,627 GiB/s (nccl #2177)."""

MEMORY_TYPE_HOST = 1
MEMORY_TYPE_DEVICE = 2


class MemLocation(ctypes.Structure):
    """``CUmemLocation``."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class MemcpyAttributes(ctypes.Structure):
    """``CUmemcpyAttributes``.

    The location hints stay 0, ``CU_MEM_LOCATION_TYPE_INVALID``. They matter for managed and
    pageable memory only; the driver ignores them for the memory that is copied here (``cuda.h``).
    """

    _fields_ = (
        ("src_access_order", ctypes.c_int),
        ("src_loc_hint", MemLocation),
        ("dst_loc_hint", MemLocation),
        ("flags", ctypes.c_uint),
    )


class PointerFacts(ctypes.Structure):
    """The attributes requested from ``cuPointerGetAttributes``, with the types that it writes."""

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
"""The ``CUpointer_attribute`` of each field of :class:`PointerFacts`, in their order."""

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
    "cuThreadExchangeStreamCaptureMode": (_POINTER,),
}
"""The arguments of the driver functions used here. All return a status; ctypes releases the GIL for
all but those of ``KEEP_GIL``. The variants for the per-thread default stream (``_ptsz``) are never
used."""

KEEP_GIL = frozenset({"cuThreadExchangeStreamCaptureMode"})
"""Functions that never wait. For each of the others, a thread that is busy in Python may keep the
GIL for 5 ms."""


def bind(library: object, name: str) -> Callable[..., int]:
    """A function of the driver's library, with its prototype.

    The library's own attribute is left as it is, because other code may share the library.

    Raises:
        AttributeError: the library has no such function.
    """
    make = ctypes.PYFUNCTYPE if name in KEEP_GIL else ctypes.CFUNCTYPE
    prototype = make(_STATUS, *PROTOTYPES[name])
    return ctypes.cast(getattr(library, name), prototype)

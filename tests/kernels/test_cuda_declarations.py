"""Structures, constants and prototypes, against the CUDA header of Triton and a C compiler."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import fake_driver
import pytest

from kvheap.device.captures import CAPTURE_IMPLICIT
from kvheap.kernels import cuda_declarations as cuda
from kvheap.kernels.capture_mode import RELAXED
from kvheap.kernels.launch import triton

HEADER = Path(triton.__file__).parent / "backends/nvidia/include/cuda.h" if triton else Path()
needs_header = pytest.mark.skipif(
    not (triton and HEADER.is_file()), reason="needs the CUDA header that comes with Triton"
)
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")

# What the module holds true of the header: C expressions and their values.
FACTS = {
    "sizeof(CUmemLocation)": ctypes.sizeof(cuda.MemLocation),
    "offsetof(CUmemLocation, type)": cuda.MemLocation.type.offset,
    "offsetof(CUmemLocation, id)": cuda.MemLocation.id.offset,
    "sizeof(CUmemcpyAttributes)": ctypes.sizeof(cuda.MemcpyAttributes),
    "offsetof(CUmemcpyAttributes, srcAccessOrder)": (cuda.MemcpyAttributes.src_access_order.offset),
    "offsetof(CUmemcpyAttributes, srcLocHint)": cuda.MemcpyAttributes.src_loc_hint.offset,
    "offsetof(CUmemcpyAttributes, dstLocHint)": cuda.MemcpyAttributes.dst_loc_hint.offset,
    "offsetof(CUmemcpyAttributes, flags)": cuda.MemcpyAttributes.flags.offset,
    "CU_MEMCPY_SRC_ACCESS_ORDER_STREAM": cuda.SRC_ACCESS_ORDER_STREAM,
    "CU_MEMCPY_FLAG_DEFAULT": cuda.FLAG_DEFAULT,
    "CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE": cuda.FLAG_PREFER_OVERLAP_WITH_COMPUTE,
    "CU_MEM_LOCATION_TYPE_INVALID": 0,
    "CU_MEMORYTYPE_HOST": cuda.MEMORY_TYPE_HOST,
    "CU_MEMORYTYPE_DEVICE": cuda.MEMORY_TYPE_DEVICE,
    "CU_POINTER_ATTRIBUTE_MEMORY_TYPE": cuda.POINTER_ATTRIBUTES["memory_type"],
    "CU_POINTER_ATTRIBUTE_IS_MANAGED": cuda.POINTER_ATTRIBUTES["is_managed"],
    "CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL": cuda.POINTER_ATTRIBUTES["device"],
    "CU_POINTER_ATTRIBUTE_DEVICE_POINTER": cuda.POINTER_ATTRIBUTES["device_pointer"],
    "CU_POINTER_ATTRIBUTE_RANGE_START_ADDR": cuda.POINTER_ATTRIBUTES["range_start"],
    "CU_POINTER_ATTRIBUTE_RANGE_SIZE": cuda.POINTER_ATTRIBUTES["range_bytes"],
    "CU_STREAM_CAPTURE_STATUS_NONE": 0,
    "CU_STREAM_CAPTURE_MODE_RELAXED": RELAXED,
    "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT": CAPTURE_IMPLICIT,
    "sizeof(CUstreamCaptureMode)": ctypes.sizeof(ctypes.c_int),
    "CUDA_SUCCESS": 0,
    "sizeof(CUresult)": ctypes.sizeof(ctypes.c_int),
    "sizeof(CUstreamCaptureStatus)": ctypes.sizeof(ctypes.c_int),
    "sizeof(CUpointer_attribute)": ctypes.sizeof(ctypes.c_int),
}

# The same written out, for machines that have neither header nor compiler.
KNOWN = dict(
    zip(
        FACTS,
        [8, 0, 4, 24, 0, 4, 12, 20, 1, 0, 1, 0, 1, 2, 2, 8, 9, 3, 11, 12]
        + [0, 2, 906, 4, 0, 4, 4, 4],
        strict=True,
    )
)

# The arguments of each function in C, for CUDA 12.8 and for 13.
C_ARGUMENTS = {
    "cuDriverGetVersion": "int *",
    "cuGetErrorName": "CUresult, const char **",
    "cuGetErrorString": "CUresult, const char **",
    "cuMemcpyAsync": "CUdeviceptr, CUdeviceptr, size_t, CUstream",
    "cuMemcpyBatchAsync": (
        "CUdeviceptr *, CUdeviceptr *, size_t *, size_t, CUmemcpyAttributes *, size_t *, size_t, "
        "size_t *, CUstream"
    ),
    "cuMemcpyBatchAsync_v2": (
        "CUdeviceptr *, CUdeviceptr *, size_t *, size_t, CUmemcpyAttributes *, size_t *, size_t, "
        "CUstream"
    ),
    "cuPointerGetAttributes": "unsigned int, CUpointer_attribute *, void **, CUdeviceptr",
    "cuStreamIsCapturing": "CUstream, CUstreamCaptureStatus *",
    "cuThreadExchangeStreamCaptureMode": "CUstreamCaptureMode *",
}

CTYPES_OF_C = {
    "CUresult": ctypes.c_int,
    "CUdeviceptr": ctypes.c_uint64,
    "size_t": ctypes.c_size_t,
    "unsigned int": ctypes.c_uint,
    "CUstream": ctypes.c_void_p,
}


def test_the_layout_is_the_known_one() -> None:
    assert FACTS == KNOWN


def test_prototypes_are_those_of_the_driver() -> None:
    assert set(cuda.PROTOTYPES) == set(C_ARGUMENTS) == set(fake_driver.PROTOTYPES)
    for name, arguments in C_ARGUMENTS.items():
        expected = tuple(
            ctypes.c_void_p if argument.endswith("*") else CTYPES_OF_C[argument]
            for argument in arguments.split(", ")
        )
        assert cuda.PROTOTYPES[name] == expected, name
        assert fake_driver.PROTOTYPES[name] == expected, name


@needs_header
def test_the_header_says_the_same() -> None:
    text = HEADER.read_text()

    def fields(struct_name: str) -> list[str]:
        body = re.search(rf"typedef struct {struct_name} \{{(.*?)\}}", text, re.DOTALL)
        assert body is not None, struct_name
        return re.findall(r"^\s*([\w ]+?\s+\w+);", body[1], re.MULTILINE)

    assert [" ".join(field.split()) for field in fields("CUmemLocation_st")] == [
        "CUmemLocationType type",
        "int id",
    ]
    assert [" ".join(field.split()) for field in fields("CUmemcpyAttributes_st")] == [
        "CUmemcpySrcAccessOrder srcAccessOrder",
        "CUmemLocation srcLocHint",
        "CUmemLocation dstLocHint",
        "unsigned int flags",
    ]
    for name, value in KNOWN.items():
        if name.startswith("CU"):
            found = re.search(rf"^\s*{name}\s*=\s*(\w+)", text, re.MULTILINE)
            assert found is not None, name
            assert int(found[1], 0) == value, name
    for name, arguments in C_ARGUMENTS.items():
        declared = [
            ", ".join(
                # Without the argument's own name.
                re.sub(r"\s*\w+$", "", argument.strip()).replace("**", " **").replace("*", "*")
                for argument in found.split(",")
            )
            for found in re.findall(rf"CUDAAPI {name}\(([^)]*)\)", text)
        ]
        plain = [re.sub(r"\s+", " ", one).replace("* *", "**") for one in declared]
        assert arguments in plain, (name, plain)
    assert re.search(r"CU_STREAM_LEGACY\s+\(\(CUstream\)0x1\)", text)
    assert re.search(r"CU_STREAM_PER_THREAD\s+\(\(CUstream\)0x2\)", text)


@needs_header
@needs_compiler
def test_a_compiler_says_the_same(tmp_path: Path) -> None:
    lines = [f'  printf("%llu\\n", (unsigned long long)({name}));' for name in FACTS]
    source = ["#include <cuda.h>", "#include <stddef.h>", "#include <stdio.h>", "int main(void) {"]
    (tmp_path / "facts.c").write_text("\n".join([*source, *lines, "  return 0;", "}", ""]))
    command = [str(COMPILER), f"-I{HEADER.parent}", "-Wall", "-Werror"]
    program = tmp_path / "facts"
    subprocess.run([*command, str(tmp_path / "facts.c"), "-o", str(program)], check=True)
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    assert dict(zip(FACTS, map(int, printed), strict=True)) == FACTS


@needs_header
@needs_compiler
def test_a_compiler_takes_the_functions_for_what_they_are_called_as(tmp_path: Path) -> None:
    """Of both versions: the header declares all symbols that a library may have."""
    lines = ["#define __CUDA_API_VERSION_INTERNAL", "#include <cuda.h>"]
    lines += [
        f"CUresult (*const pointer_{name})({arguments}) = {name};"
        for name, arguments in C_ARGUMENTS.items()
    ]
    source = tmp_path / "prototypes.c"
    source.write_text("\n".join([*lines, ""]))
    command = [str(COMPILER), f"-I{HEADER.parent}", "-Wall", "-Werror", "-c", str(source)]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "prototypes.o")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr

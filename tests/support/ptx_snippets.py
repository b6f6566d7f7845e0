"""Kernels of a few instructions for the PTX machine."""

from __future__ import annotations

import numpy as np
import torch
from ptx_machine.machine import Grid, execute
from ptx_machine.memory import GlobalMemory
from ptx_machine.program import read_program

KERNEL = """
.version 8.7
.target sm_90a
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 in,
    .param .u64 .ptr .global .align 1 out,
    .param .u32 number
)
.reqntid {threads}
{{
    .reg .pred %p<8>;
    .reg .b16 %rs<16>;
    .reg .b32 %r<32>;
    .reg .b64 %rd<32>;
    ld.param.b64 %rd1, [in];
    ld.param.b64 %rd2, [out];
    ld.param.b32 %r1, [number];
    mov.u32 %r2, %tid.x;
    mov.u32 %r3, %ctaid.x;
    mov.u32 %r4, %ntid.x;
    mad.lo.s32 %r5, %r3, %r4, %r2;
    mul.wide.s32 %rd3, %r5, 8;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
{body}
    ret;
}}
"""
"""A kernel in which ``%rd4`` and ``%rd5`` are where each thread reads and writes 8 bytes, and
``%r2`` is its number in its block."""


def run_snippet(
    body: str,
    inputs: torch.Tensor | None = None,
    num_threads: int = 32,
    num_blocks: int = 1,
    shared_bytes: int = 256,
    writable: slice = slice(None),
) -> np.ndarray:
    """Run a kernel; return what each thread has written, uint64 ``[threads]``."""
    total = num_threads * num_blocks
    given = torch.zeros(total, dtype=torch.int64) if inputs is None else inputs.view(torch.int64)
    out = torch.zeros(total, dtype=torch.int64)
    program = read_program(KERNEL.format(threads=num_threads, body=body))
    memory = GlobalMemory(reads=[given], writes=[out[writable]])
    arguments = [given.data_ptr(), out.data_ptr(), 7]
    execute(program, Grid(num_blocks, shared_bytes), arguments, memory)
    return out.numpy().view(np.uint64)

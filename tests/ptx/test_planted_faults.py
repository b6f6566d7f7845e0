"""Faults planted in the compiled kernels: the machine, or the comparison of bytes, sees each."""

from __future__ import annotations

from compiled import needs_compiler

pytestmark = needs_compiler

"""``examine``: everything that is looked at, and what kvheap will do with it."""

from __future__ import annotations

from collections.abc import Sequence

from kvheap.doctor.finding import Finding
from kvheap.doctor.machine import machine_findings
from kvheap.doctor.packages import engine_findings, package_findings

__all__ = ["conclusions", "examine"]


def examine() -> list[Finding]:
    """Look at packages, the machine, GPUs and engines. Changes nothing.

    Creates a CUDA context on each GPU; imports torch, but none of the engines.
    """
    found = package_findings()
    if any(each.name == "torch" and each.state == "ok" for each in found):
        found += _gpus()
    return [*found, *machine_findings(), *engine_findings()]


def conclusions(findings: Sequence[Finding]) -> list[str]:
    """What kvheap will use, a sentence each."""
    by_name = {finding.name: finding for finding in findings}
    said = []
    kernels = [each for each in findings if each.name.endswith(" kernels")]
    if any(each.state == "ok" for each in kernels):
        said.append("Heaps on a GPU are copied by Triton kernels, and to and from pinned memory.")
    elif kernels:
        said.append("Heaps on a GPU can be allocated, but not filled: Triton is missing.")
    else:
        said.append("Heaps are in host memory, and are copied on the CPU by torch and NumPy.")
    if any(each.name.endswith(" costs of copies") and each.state != "ok" for each in findings):
        said.append("Paths of copies follow figures that were not measured on this GPU.")
    compiler = by_name.get("C compiler")
    if kernels and compiler is not None and compiler.state != "ok":
        said.append("Kernels cannot start: Triton finds no C compiler.")
    return said


def _gpus() -> list[Finding]:
    try:
        # A torch that is installed but broken fails in many ways; each is worth a line here.
        from kvheap.doctor.gpus import gpu_findings
    except Exception as error:
        remedy = "pip install --force-reinstall torch"
        return [Finding("GPU", "CUDA", "wrong", f"torch cannot be imported: {error!r}", remedy)]
    return gpu_findings()

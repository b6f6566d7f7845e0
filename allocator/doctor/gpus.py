"""What torch and the CUDA driver provide: GPUs, how they can be copied to, and known costs."""

from __future__ import annotations

from typing import Any

import torch

from kvheap.device import cuda
from kvheap.doctor.finding import Finding, State
from kvheap.memory.numa import numa_node_of_gpu
from kvheap.planning.planner import table_for
from kvheap.sizes import size_text

__all__ = ["MIN_CAPABILITY", "gpu_findings"]

MIN_CAPABILITY = (8, 0)
"""The oldest compute capability that the kernels are compiled for in tests."""

TABLES = {
    "measured": "measured here",
    "built in": "derived from published figures",
    "cautious": "nothing is known about this GPU",
}


def gpu_findings() -> list[Finding]:
    """Look at CUDA and at each GPU. Creates a CUDA context on each."""
    if not torch.cuda.is_available():
        return [_no_cuda()]
    found = [Finding("GPU", "CUDA of torch", "ok", str(torch.version.cuda))]
    for index in range(torch.cuda.device_count()):
        found += _gpu(index)
    return found


def _no_cuda() -> Finding:
    if torch.version.cuda is None:
        words = f"this torch ({torch.__version__}) is built without CUDA: everything is on the CPU"
        return Finding("GPU", "CUDA", "absent", words)
    words = f"torch is built for CUDA {torch.version.cuda}, and finds no GPU"
    return Finding("GPU", "CUDA", "absent", words, "nvidia-smi shows whether a driver is loaded")


def _gpu(index: int) -> list[Finding]:
    try:
        return _working_gpu(index)
    except (RuntimeError, OSError) as error:
        remedy = "nvidia-smi shows the state of the GPU and its driver"
        return [Finding("GPU", f"cuda:{index}", "wrong", str(error), remedy)]


def _working_gpu(index: int) -> list[Finding]:
    properties: Any = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    label = f"cuda:{index}"
    size = size_text(properties.total_memory)
    words = f"{properties.name}, {size}, sm_{capability[0]}{capability[1]}"
    node = numa_node_of_gpu(index)
    if node is not None:
        words += f", NUMA node {node}"
    if capability < MIN_CAPABILITY:
        remedy = "kernels are compiled and tested from sm_80 on"
        return [Finding("GPU", label, "wrong", words, remedy)]
    device = cuda.find_device(torch.device("cuda", index))
    assert device is not None
    found = [Finding("GPU", label, "ok", f"{words}, driver {device.driver_version}")]
    batch = (
        "cuMemcpyBatchAsync" if device.has_batch else "a call for each run: CUDA 12.8 has better"
    )
    found.append(Finding("GPU", f"{label} copy engine", "ok", batch))
    if device.has_kernel:
        found.append(Finding("GPU", f"{label} kernels", "ok", "by Triton"))
    else:
        found.append(Finding("GPU", f"{label} kernels", "wrong", "no Triton", "pip install triton"))
    table = table_for(device.name, device.driver_version)
    state: State = "ok" if table.source == "measured" else "absent"
    remedy = "" if state == "ok" else f"kvheap calibrate --device {label}"
    found.append(Finding("GPU", f"{label} costs of copies", state, TABLES[table.source], remedy))
    return found

"""What launches share: uploads, captures, and machines without Triton."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from kvheap.kernels import launch

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from kvheap.kernels import block_copy
buffer = torch.zeros(32, dtype=torch.uint8)
block_copy.scatter_blocks(torch.ones(1, 8, dtype=torch.uint8), buffer, [16])
assert buffer.nonzero().flatten().tolist() == list(range(16, 24))
import kvheap
cache = kvheap.PagedKVCache.of("mla", [torch.arange(64).reshape(4, 4, 4).half()])
heap = kvheap.TensorMemoryAllocator(torch.zeros(8192, dtype=torch.uint8))
for convert in (False, True):
    batch = heap.batched_store(cache, [7, 2], 2, convert=convert)
    assert batch is not None
from kvheap.kernels.pieces import Pieces
from kvheap.kernels.pointer_copy import PointerCopy
ready = PointerCopy.prepare(Pieces.of([4096], [8192], 64), torch.device("cpu"))
for launch in (lambda: block_copy._copy_blocks_kernel[(1,)](), lambda: ready.run(max_sms=1)):
    try:
        launch()
    except RuntimeError as error:
        print(error)
"""


def test_an_upload_is_a_copy_of_a_read_only_array() -> None:
    array = np.arange(4)
    array.flags.writeable = False
    uploaded = launch.upload(array, torch.device("cpu"))
    uploaded[0] = 9
    assert array[0] == 0


def test_without_triton_cpu_tensors_work_and_a_launch_says_what_is_missing() -> None:
    command = [sys.executable, "-c", WITHOUT_TRITON]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{kernel} needs the triton package, which is missing"
        for kernel in ("_copy_blocks_kernel", "_copy_pieces_kernel")
    ]


def test_host_addresses_are_refused_in_a_graph_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot be captured"):
        launch.upload(np.zeros(3, np.int64), torch.device("cuda"))
    assert len(launch.upload(np.zeros(3, np.int64), torch.device("cpu"))) == 3

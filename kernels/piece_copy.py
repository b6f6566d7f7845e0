"""Which kernel copies pieces: :mod:`~kvheap.kernels.pointer_copy` or, on sm_90, bulk copies.

Both take the same pieces, have the same budget, and do the same within one launch or a few. Bulk
copies need 16-byte alignment; the pointer kernel copies everything else, and everything on older
GPUs.
"""

from __future__ import annotations

import torch

from kvheap.kernels.bulk_copy import BulkCopy
from kvheap.kernels.pieces import Pieces
from kvheap.kernels.pointer_copy import PointerCopy

__all__ = ["prepare_pieces"]

BULK_OVER_LINK = False
"""Whether bulk copies are preferred between a device and the host. On an H200 (PCIe 5, 2026-11-26)
they reached 25 GB/s to the device and 34 from it, the pointer kernel 50 and 52. They have been
aligned to 128 bytes in shared memory since, which has not been measured yet."""

BULK_WITHIN_DEVICE = False
"""Whether they are within a device. In the same run, 4 KiB to 1 MiB pieces moved at 2,830 to 2,860
GB/s (read and written), and by the pointer kernel at 3,030 to 3,200."""


def prepare_pieces(
    pieces: Pieces, device: torch.device, *, over_link: bool
) -> PointerCopy | BulkCopy:
    """Plan a copy for the kernel that suits it, and upload the descriptors.

    Args:
        pieces: as for :meth:`PointerCopy.prepare`.
        device: a CUDA device.
        over_link: whether one side is host memory.

    Raises:
        ValueError: there are too many pieces for one launch; nothing is uploaded.
        RuntimeError: the current stream is being captured in a CUDA graph.
    """
    if BULK_OVER_LINK if over_link else BULK_WITHIN_DEVICE:
        found = BulkCopy.prepare_if_suited(pieces, device)
        if found is not None:
            return found
    return PointerCopy.prepare(pieces, device)

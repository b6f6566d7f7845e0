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
"""Whether bulk copies are preferred between a device and the host. On an H200 (PCIe 5) they
saturate the link too, but with 6 to 8 programs instead of 2 or 3, and lose where pieces are small
or few. See benchmarks/NOTES.md."""

BULK_WITHIN_DEVICE = False
"""Whether they are within a device: level with the pointer kernel from 1 KiB, slower below."""


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

"""The two sides of a block copy: a dense tensor of blocks, and addresses in a flat buffer.

Both sides have the same methods. They tell the kernels where each block begins on the device, and
give the CPU path a view of the memory as rows of words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from kvheap.kernels.arguments import as_whole, require_memory, require_tensor
from kvheap.kernels.arrays import Int64Array, alignment_of, combined_bits
from kvheap.kernels.block_addresses import Addresses, host_addresses
from kvheap.kernels.words import view_words

__all__ = ["Dense", "Scattered", "Side", "require_buffer"]


@dataclass(frozen=True, slots=True)
class Dense:
    """The blocks ``tensor[i]``: a base and a stride."""

    tensor: torch.Tensor

    @property
    def stride_bytes(self) -> int:
        """Bytes from one block to the next."""
        return self.tensor.stride(0) * self.tensor.element_size()

    @property
    def alignment(self) -> int:
        """The largest power of two up to 16 that divides the address of each block."""
        # The stride of a single block is never used, and may be anything.
        stride_bytes = self.stride_bytes if len(self.tensor) > 1 else 0
        return alignment_of(self.tensor.data_ptr(), stride_bytes)

    @property
    def num_words(self) -> int:
        """0: kernels need no addresses, and find the blocks by the stride."""
        return 0

    @property
    def on_device(self) -> torch.Tensor | None:
        """None: kernels find the blocks by the stride."""
        return None

    @property
    def offset_bytes(self) -> int:
        """Bytes from the start of the storage to the first block."""
        return int(self.tensor.storage_offset()) * self.tensor.element_size()

    def starts(self) -> Int64Array:
        """Where each block starts in :meth:`flat`, int64 ``[N]``."""
        return self.offset_bytes + np.arange(len(self.tensor), dtype=np.int64) * self.stride_bytes

    def flat(self) -> torch.Tensor:
        """All bytes of the tensor's storage, on a CPU."""
        return torch.empty(0, dtype=torch.uint8, device="cpu").set_(self.tensor.untyped_storage())

    def rows(self, block_bytes: int, word: torch.dtype) -> torch.Tensor:
        """The blocks as words, ``[N, words of a block]``, on a CPU."""
        size = (len(self.tensor), block_bytes // word.itemsize)
        stride = (self.stride_bytes // word.itemsize, 1)
        return view_words(self.tensor, word, self.offset_bytes, size, stride)


@dataclass(frozen=True, slots=True)
class Scattered:
    """Blocks at addresses of a buffer.

    Attributes:
        tensor: the buffer, contiguous.
        on_host: the checked addresses, if the host has them; else None.
        on_device: the addresses on the buffer's device, if only the device has them; else None.
        address_alignment: a power of two up to 16 that divides all addresses.
    """

    tensor: torch.Tensor
    on_host: Int64Array | None
    on_device: torch.Tensor | None
    address_alignment: int

    @classmethod
    def of(
        cls,
        buffer: torch.Tensor,
        addresses: Addresses,
        block_bytes: int,
        address_alignment: int,
    ) -> Scattered:
        """Blocks of a caller's buffer, at a caller's addresses.

        Raises:
            ValueError: the buffer, an address or the promised alignment does not fit.
            TypeError: the addresses are not integers.
        """
        require_buffer(buffer)
        address_alignment = as_whole("address_alignment", address_alignment)
        if address_alignment <= 0 or address_alignment & (address_alignment - 1):
            raise ValueError(
                f"address_alignment must be a positive power of two, got {address_alignment}"
            )
        if isinstance(addresses, torch.Tensor) and addresses.device.type != "cpu":
            if addresses.device != buffer.device or addresses.dtype != torch.int64:
                raise ValueError(
                    f"addresses must be int64 on {buffer.device} or on the host, got "
                    f"{addresses.dtype} on {addresses.device}"
                )
            if addresses.dim() != 1:
                raise ValueError(
                    f"addresses must be one-dimensional, got shape {tuple(addresses.shape)}"
                )
            return cls(buffer, None, addresses.contiguous(), alignment_of(address_alignment))
        buffer_bytes = buffer.numel() * buffer.element_size()
        return cls.checked(
            buffer, host_addresses("addresses", addresses, buffer_bytes, block_bytes)
        )

    @classmethod
    def checked(cls, buffer: torch.Tensor, addresses: Int64Array) -> Scattered:
        """Blocks at host addresses that are known to be in the buffer."""
        return cls(buffer, addresses, None, alignment_of(combined_bits(addresses)))

    @property
    def length(self) -> int:
        """How many blocks there are."""
        if self.on_host is not None:
            return len(self.on_host)
        assert self.on_device is not None
        return len(self.on_device)

    @property
    def stride_bytes(self) -> int:
        """0: blocks are found by their addresses."""
        return 0

    @property
    def alignment(self) -> int:
        """The largest power of two up to 16 that is known to divide the address of each block."""
        return alignment_of(self.tensor.data_ptr(), self.address_alignment)

    @property
    def num_words(self) -> int:
        """How many addresses only the host has."""
        return 0 if self.on_host is None else len(self.on_host)

    def starts(self) -> Int64Array:
        """Where each block starts in :meth:`flat`: the host addresses, int64 ``[N]``."""
        assert self.on_host is not None
        return self.on_host

    @property
    def offset_bytes(self) -> int:
        """Bytes from the start of the storage to the buffer."""
        return int(self.tensor.storage_offset()) * self.tensor.element_size()

    def flat(self) -> torch.Tensor:
        """All bytes of a CPU buffer."""
        num_bytes = self.tensor.numel() * self.tensor.element_size()
        return view_words(self.tensor, torch.uint8, self.offset_bytes, (num_bytes,), (1,))

    def rows(self, block_bytes: int, word: torch.dtype) -> torch.Tensor:
        """All blocks that a CPU buffer can hold, one starting at each word: they overlap."""
        words = self.tensor.numel() * self.tensor.element_size() // word.itemsize
        block_words = block_bytes // word.itemsize
        size = (words - block_words + 1, block_words)
        return view_words(self.tensor, word, self.offset_bytes, size, (1, 1))

    def row_numbers(self, word: torch.dtype) -> torch.Tensor:
        """The index of each block in :meth:`rows`, int64 ``[N]``."""
        return torch.from_numpy(self.starts() // word.itemsize)


Side: TypeAlias = Dense | Scattered


def require_buffer(buffer: torch.Tensor) -> None:
    """Refuse a buffer that cannot be addressed as one range of bytes.

    Raises:
        TypeError: it is not a tensor.
        ValueError: it is not contiguous, on neither a CPU nor a CUDA device, or its memory was
            taken away.
    """
    require_tensor("buffer", buffer)
    if not buffer.is_contiguous():
        raise ValueError(f"buffer must be contiguous, got strides {buffer.stride()}")
    if buffer.device.type not in ("cpu", "cuda"):
        raise ValueError(f"buffer must be on a CPU or a CUDA device, got {buffer.device}")
    require_memory("buffer", buffer)

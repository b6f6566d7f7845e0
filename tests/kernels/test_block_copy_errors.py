"""Wrong calls of the block copies: each says what is wrong and writes nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from kvheap.kernels import fill_blocks, gather_blocks, move_blocks, scatter_blocks

POISON = 0xA5


def scatter(addresses: object, blocks: torch.Tensor | None = None) -> Callable[..., None]:
    dense = torch.zeros(2, 8, dtype=torch.uint8) if blocks is None else blocks
    return lambda buffer: scatter_blocks(dense, buffer, addresses)  # type: ignore[arg-type]


def move(sources: object, targets: object) -> Callable[..., None]:
    return lambda buffer: move_blocks(buffer, sources, targets, 8)  # type: ignore[arg-type]


def with_storage_of(size_bytes: int, step: int = 1) -> torch.Tensor:
    """Blocks ``[2, 8]`` of bytes, or every so many of them, whose storage has been resized."""
    blocks = torch.ones(2, 8, dtype=torch.uint8)[:, ::step]
    blocks.untyped_storage().resize_(size_bytes)
    return blocks


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (scatter([0, 8], with_storage_of(0)), ValueError, r"16 of its storage, .* to 0 bytes"),
        (scatter([8, 0], with_storage_of(0)), ValueError, "blocks ends at byte 16"),
        (scatter([0] * 2, with_storage_of(9, step=2)), ValueError, r"ends at byte 15 .* 9 bytes"),
        (
            lambda buffer: gather_blocks(buffer, [0, 16], with_storage_of(0)),
            ValueError,
            "out ends at byte 16",
        ),
        (scatter([0, 8], with_storage_of(9)), ValueError, r"ends at byte 16 .* 9 bytes"),
        (scatter([0, 8], torch.zeros(2, 8).to_sparse()), ValueError, "contiguous"),
        (scatter([0, 57]), ValueError, r"addresses\[1\] is 57"),
        (scatter([-1, 8]), ValueError, r"addresses\[0\] is -1"),
        (scatter([0]), ValueError, "1 addresses for 2 blocks"),
        (scatter([0, 7]), ValueError, r"addresses\[0\] is 0, addresses\[1\] is 7"),
        (scatter([9, 2]), ValueError, r"addresses\[1\] is 2, addresses\[0\] is 9"),
        (scatter([0.0, 8.0]), TypeError, "must be integers, got float64"),
        (scatter([[0, 8]]), ValueError, "one-dimensional"),
        (scatter([True, False]), TypeError, "must be integers, got bool"),
        (scatter(torch.tensor([0.0, 8.0])), TypeError, "must be integers, got float32"),
        (scatter([0, 1 << 70]), TypeError, "must be integers, got object"),
        (scatter([0, 8], torch.zeros(2, dtype=torch.complex64).conj()), ValueError, "lazy conj"),
        (scatter([0, 8], torch.zeros(8, 2).T), ValueError, "must be contiguous"),
        (scatter([0], torch.tensor(1.0)), ValueError, "scalar"),
        (scatter([0, 8], torch.zeros(2, 8, device="meta")), ValueError, "is on meta"),
        (move([0], [4]), ValueError, "target block at 4 overlaps the source block at 0"),
        (move([0, 16], [8, 0]), ValueError, "target block at 0 overlaps the source block at 0"),
        (move([0, 0], [16, 20]), ValueError, r"target_addresses\[1\] is 20, and blocks"),
        (move([16, 0], [16, 12]), ValueError, r"\[1\] is 12, target_addresses\[0\] is 16"),
        (move([0], [57]), ValueError, r"target_addresses\[0\] is 57"),
        (move([0, 8], [16]), ValueError, "2 source addresses but 1 target"),
        (lambda buffer: fill_blocks(buffer, [0], 8, 256), ValueError, "got 256"),
        (lambda buffer: fill_blocks(buffer, [0], 8, -1), ValueError, "got -1"),
        (lambda buffer: fill_blocks(buffer, [0], -8, 1), ValueError, "got -8"),
        (lambda buffer: fill_blocks(buffer, [0], 8, 1.5), TypeError, "integer"),
        (lambda buffer: fill_blocks(buffer, [0], 8.0, 1), TypeError, "integer"),
        (lambda buffer: fill_blocks(buffer, [4, 0], 8, 1), ValueError, r"addresses\[1\] is 0"),
        (
            lambda buffer: fill_blocks(buffer, [0], 8, 1, address_alignment=12),
            ValueError,
            "power of two, got 12",
        ),
        (lambda _: fill_blocks(torch.empty(8, device="meta"), [0], 8, 1), ValueError, "got meta"),
        (
            lambda buffer: gather_blocks(buffer, [0, 8], torch.zeros(1, 8).expand(2, 8)),
            ValueError,
            "overlap",
        ),
        (lambda buffer: fill_blocks(buffer[::2], [0], 8, 1), ValueError, "contiguous"),
    ],
)
def test_a_wrong_call_says_why_and_writes_nothing(
    call: Callable[..., None], error: type[Exception], message: str
) -> None:
    buffer = torch.full((64,), POISON, dtype=torch.uint8)
    with pytest.raises(error, match=message):
        call(buffer)
    assert (buffer == POISON).all()


@pytest.mark.parametrize("size_bytes", [0, 9])
@pytest.mark.parametrize("count", [2, 100])
def test_a_buffer_or_addresses_without_memory_are_refused(size_bytes: int, count: int) -> None:
    blocks, addresses = torch.zeros(count, 8, dtype=torch.uint8), torch.arange(count) * 16
    buffer = torch.zeros(2 * count, 8, dtype=torch.uint8)
    lost, lost_addresses = buffer.clone(), addresses.clone()
    for each in (lost, lost_addresses):
        each.untyped_storage().resize_(size_bytes)
    places = addresses.tolist()
    for call in (
        lambda: scatter_blocks(blocks, lost, places),
        lambda: gather_blocks(lost, addresses.numpy(), blocks),
        lambda: fill_blocks(lost, places, 8, 1),
        lambda: move_blocks(lost, places, addresses + 8, 8),
    ):
        with pytest.raises(ValueError, match=rf"buffer ends at byte .* to {size_bytes} bytes"):
            call()
        assert lost.untyped_storage().nbytes() == size_bytes
    with pytest.raises(ValueError, match="addresses ends at byte"):
        scatter_blocks(blocks, buffer, lost_addresses)


@pytest.mark.parametrize("count", [1, 3, 100])
@pytest.mark.parametrize("step", [1, 2])
def test_the_stride_of_one_element_does_not_matter(count: int, step: int) -> None:
    values = torch.rand(count, 3, 1).half()
    blocks = values.clone().as_strided((count, 3, 1), (3, 1, 5))
    buffer = torch.zeros(count * step * 3).half()
    addresses = np.arange(count) * step * 6
    scatter_blocks(blocks, buffer, addresses)
    assert torch.equal(buffer.view(count, step, 3)[:, 0], values[..., 0])
    out = torch.zeros(count, 3).half().as_strided((count, 3, 1), (3, 1, 7))
    assert torch.equal(gather_blocks(buffer, addresses, out), values)

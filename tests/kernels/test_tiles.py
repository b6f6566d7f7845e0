"""How accesses are numbered and cut into tiles, and how a kernel divides."""

from __future__ import annotations

import numpy as np
import pytest

from kvheap.kernels.tiles import ACCESS_BYTES, Divisor, TileShape, num_tiles, variant_of

MOST = (1 << 31) - 1


def quotient(numbers: np.ndarray, divisor: Divisor) -> np.ndarray:
    """What the kernels compute: a high half of 32 bits, and a shift."""
    high = (2 * numbers.astype(np.uint64) * np.uint64(divisor.magic % 2**32)) >> np.uint64(32)
    assert (2 * numbers < 2**32).all()
    return (high >> np.uint64(divisor.shift)).astype(np.int64)


@pytest.mark.parametrize("seed", range(20))
def test_a_divisor_gives_every_quotient(seed: int) -> None:
    random = np.random.default_rng(seed)
    for bits in range(31):
        value = int(random.integers(1 << bits, 2 << bits)) if seed > 2 else (1 << bits) + seed - 1
        divisor = Divisor.of(max(value, 1))
        assert -(2**31) <= divisor.magic < 0  # so every magic has one type
        multiples = random.integers(0, MOST // divisor.value + 1, 1000) * divisor.value
        near = np.concatenate([multiples - 1, multiples, multiples + 1, [0, MOST - 1, MOST]])
        near = near[(near >= 0) & (near <= MOST)]
        np.testing.assert_array_equal(quotient(near, divisor), near // divisor.value)


@pytest.mark.parametrize("value", [0, -1, 1 << 31])
def test_other_divisors_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match=f"divides by 1 to 2.*31 - 1, got {value}"):
        Divisor.of(value)


@pytest.mark.parametrize("access_bytes", ACCESS_BYTES)
def test_a_variant_is_an_access_of_whole_words(access_bytes: int) -> None:
    shape = TileShape(512, 4)
    variant = variant_of(access_bytes, shape)
    assert variant is variant_of(access_bytes, shape)
    assert 1 << variant.constants["SHIFT"] == access_bytes
    word_bytes = variant.constants["WORD"].primitive_bitwidth // 8
    assert variant.constants["VECTOR"] * word_bytes == access_bytes
    assert (variant.vectors, variant.num_warps) == shape


@pytest.mark.parametrize("row_vectors", [1, 3, 36, 511, 512, 513, 1 << 30])
def test_tiles_are_as_many_as_the_accesses_fill(row_vectors: int) -> None:
    variant = variant_of(16, TileShape(512, 4))
    for num_rows in (1, 1000, 1 << 20):
        tiles = num_tiles(num_rows, row_vectors, variant)
        assert (tiles - 1) * 512 < num_rows * row_vectors <= tiles * 512

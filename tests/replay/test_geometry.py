"""Geometries: the published shapes, and the help that lists them."""

from __future__ import annotations

import math

import pytest
import torch

from kvheap import MemoryFormat
from kvheap.cli.texts import REPLAY_NOTES
from kvheap.replay.contents import Contents
from kvheap.replay.geometry import GEOMETRIES, Geometry

MIB = 1 << 20


@pytest.mark.parametrize(
    ("name", "shape", "chunk_bytes"),
    [
        ("tiny", (2, 1, 512, 2), 4096),
        ("llama-3-8b", (2, 32, 512, 1024), 64 * MIB),
        ("llama-3-70b", (2, 80, 512, 1024), 160 * MIB),
        ("llama-3-70b-tp4", (2, 80, 512, 256), 40 * MIB),
        ("mistral-7b", (2, 32, 512, 1024), 64 * MIB),
        ("qwen3-8b", (2, 36, 512, 1024), 72 * MIB),
        ("gpt-oss-20b", (2, 24, 512, 512), 24 * MIB),
        ("deepseek-v3", (1, 61, 512, 576), 61 * 512 * 1152),
    ],
)
def test_a_chunk_has_the_published_shape(
    name: str, shape: tuple[int, ...], chunk_bytes: int
) -> None:
    geometry = GEOMETRIES[name]
    assert (geometry.name, geometry.shape) == (name, shape)
    assert geometry.chunk_bytes == chunk_bytes
    assert geometry.dtype == (torch.float16 if name == "tiny" else torch.bfloat16)
    is_latent = name == "deepseek-v3"
    assert geometry.fmt == (MemoryFormat.KV_MLA_FMT if is_latent else MemoryFormat.KV_2LTD)
    layout = geometry.layout
    assert (layout.size_bytes, layout.fmt) == (chunk_bytes, geometry.fmt)
    assert (layout.shapes, layout.dtypes) == ((geometry.shape,), (geometry.dtype,))


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_a_chunk_is_whole_pages_and_the_help_says_how_many_bytes(geometry: Geometry) -> None:
    assert geometry.chunk_bytes % 4096 == 0
    (line,) = (line for line in REPLAY_NOTES.splitlines() if line.split()[:1] == [geometry.name])
    number, unit = line.split()[1:3]
    said_bytes = float(number) * {"KiB": 1024, "MiB": MIB}[unit]
    assert math.isclose(said_bytes, geometry.chunk_bytes, rel_tol=1e-3)


def test_nvfp4_keeps_nine_bytes_for_sixteen_elements() -> None:
    """4 bits of an element, and one byte of scale for each 16: 0.5625 bytes an element."""
    geometry, wide = GEOMETRIES["llama-3-8b-nvfp4"], GEOMETRIES["llama-3-8b"]
    assert geometry.shape == (2, 32, 512, 8 * 72)
    assert (geometry.dtype, geometry.num_heads, geometry.head_dim) == (torch.uint8, 8, 72)
    assert geometry.chunk_bytes == wide.chunk_bytes // 2 * 9 // 16 == 18 * MIB
    assert geometry.fmt == MemoryFormat.KV_2LTD


class TestContents:
    contents = Contents(GEOMETRIES["tiny"], torch.device("cpu"))

    def test_chunks_differ_in_every_word_and_a_chunk_in_all_its_words(self) -> None:
        ids = [0, 1, 2, 46, 182_789, (1 << 63) - 1]
        words = self.contents.of(ids).view(len(ids), -1).view(torch.int64)
        for of_one_id in words:
            assert of_one_id.unique().numel() == 512
        for of_one_place in words.T:
            assert of_one_place.unique().numel() == len(ids)

    def test_they_depend_on_the_id_alone(self) -> None:
        alone, among = self.contents.of([46]), self.contents.of([1, 46, 2])
        assert torch.equal(alone[0].view(torch.int16), among[1].view(torch.int16))

    def test_each_wrong_chunk_is_counted_once_whatever_the_floats_mean(self) -> None:
        ids = list(range(2000))
        chunks = self.contents.of(ids)
        assert chunks.isnan().any(), "compared as floats, a NaN would differ from itself"
        assert self.contents.count_mismatches(ids, chunks) == 0
        bits = chunks.view(torch.int16).view(len(ids), -1)
        bits[7, 0] ^= 1
        bits[7, -1] ^= 1
        bits[1999, 1000] ^= -0x8000
        assert self.contents.count_mismatches(ids, chunks) == 2
        chunks = self.contents.of(ids)
        assert self.contents.count_mismatches(ids, chunks.roll(1, 0)) == len(ids)

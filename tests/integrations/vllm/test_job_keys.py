"""Which chunks of a store job lack blocks, or hold blocks that may be another request's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm_cpu_scenes import need_vllm

need_vllm()

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (  # noqa: E402
    OffloadingConnectorMetadata,
    TransferJob,
)
from vllm.v1.kv_offload.base import GPULoadStoreSpec, make_offload_key  # noqa: E402

from kvheap.integrations.vllm.failures import JobKeys  # noqa: E402

WINDOW, FULL, STATE = range(3)
NEEDS_WHOLE = (True, True, False)


def key(group: int, number: int) -> Any:
    return make_offload_key(bytes([number]) * 8, group)


class Manager:
    """Stores whatever it is offered."""

    lookup = None

    def prepare_store(self, keys: Any, context: Any) -> Any:
        return SimpleNamespace(keys_to_store=list(keys), store_spec=object())


def incomplete_of(
    jobs: JobKeys, keys: list[Any], sizes: list[int], first: list[int], request: str = "a"
) -> list[Any]:
    """What a job of a request lacks, by blocks of each group and the first one's number."""
    spec = jobs.prepare_store(keys, None).store_spec  # type: ignore[arg-type, union-attr]
    source = GPULoadStoreSpec(list(range(1, sum(sizes) + 1)), sizes, first)
    job = TransferJob(req_id=request, src_spec=source, dst_spec=spec)
    jobs.begun(OffloadingConnectorMetadata(load_jobs={}, store_jobs={7: job}))
    found = jobs.incomplete(7)
    jobs.ended({7: 1})
    assert jobs.incomplete(7) == []
    return list(found)


CHUNKS = [key(WINDOW, 1), key(WINDOW, 2), key(FULL, 1), key(STATE, 2)]


@pytest.mark.parametrize(
    ("sizes", "first", "lacking"),
    [
        ([4, 2, 2], [0, 0, 2], []),
        ([3, 2, 2], [1, 0, 2], [CHUNKS[0]]),  # the window has left its first block
        ([3, 2, 2], [0, 0, 2], CHUNKS[:2]),  # one behind is missing: which one is not said
        ([2, 2, 2], [1, 0, 2], CHUNKS[:2]),  # the first of both
        ([4, 2, 1], [0, 0, 3], []),  # a state needs its last block only
        ([4, 2, 3], [0, 0, 2], [CHUNKS[3]]),
        ([4, 0, 2], [0, 0, 2], CHUNKS),  # the groups cannot be told
    ],
)
def test_chunks_that_lack_blocks(sizes: list[int], first: list[int], lacking: list[Any]) -> None:
    jobs = JobKeys(Manager(), 1, 2, NEEDS_WHOLE)  # type: ignore[arg-type]
    assert incomplete_of(jobs, CHUNKS, sizes, first) == lacking


@pytest.mark.parametrize("blocks_per_chunk", [1, 2])
def test_what_ran_while_the_tier_was_reset_stores_nothing(blocks_per_chunk: int) -> None:
    jobs = JobKeys(Manager(), 1, blocks_per_chunk, NEEDS_WHOLE)  # type: ignore[arg-type]
    sizes, first = [2 * blocks_per_chunk, blocks_per_chunk, blocks_per_chunk], [0, 0, 0]
    assert incomplete_of(jobs, CHUNKS, sizes, first) == []
    jobs.ran_at_reset({"a"})
    assert incomplete_of(jobs, CHUNKS, sizes, first) == CHUNKS
    assert incomplete_of(jobs, CHUNKS, sizes, first, "b") == []
    jobs.finished({"a"})
    assert incomplete_of(jobs, CHUNKS, sizes, first) == []

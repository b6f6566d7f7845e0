"""What users write in ``kv_connector_extra_config``. Needs no vLLM."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

from kvheap.integrations.vllm.offers import OfferCounts
from kvheap.integrations.vllm.settings import KEYS, OF_VLLM, REFUSED, TierSettings

BYTES = {"cpu_bytes_to_use": 1 << 30}

GOOD: dict[str, list[Any]] = {
    "cpu_bytes_to_use": [1 << 30, 6.4e10, 1 << 45],
    "blocks_per_chunk": [1, 16],
    "eviction_policy": ["lru"],
    "store_threshold": [0, 1, 2],
    "max_tracker_size": [1, 1000],
    "offload_prompt_only": [True, False],
    "heap_path": ["/dev/hugepages/kv", "heap"],
    "huge_pages": ["none", "transparent", "explicit"],
    "numa_node": [0, 1],
    "index_path": ["/var/kv.index"],
}

WRONG: dict[str, list[Any]] = {
    "cpu_bytes_to_use": [0, -1, "8GiB", "1000", 1.5, True, [1], float("nan"), float("inf")],
    "blocks_per_chunk": [0, -1, 1.5, "2", True],
    "eviction_policy": ["LRU", "fifo", 1, True, ["lru"]],
    "store_threshold": [-1, 0.5, "2", False],
    "max_tracker_size": [0, "many"],
    "offload_prompt_only": ["false", 0, 1, "no"],
    "heap_path": ["", 5, True, "a\0b"],
    "huge_pages": [True, "2M", "", 2],
    "numa_node": [-1, "0", 0.5, True],
    "index_path": ["", 1],
}


def of(**extra: Any) -> TierSettings:
    return TierSettings.of({**BYTES, **extra})


@pytest.mark.parametrize("key", KEYS)
def test_good_values_are_taken(key: str) -> None:
    for value in GOOD[key]:
        extra = {key: value} | ({"heap_path": "h"} if key == "index_path" else {})
        settings = of(**extra)
        if key != "cpu_bytes_to_use":
            assert getattr(settings, key) == value


@pytest.mark.parametrize("key", KEYS)
def test_wrong_values_name_the_key_the_value_and_what_is_allowed(key: str) -> None:
    for value in WRONG[key]:
        with pytest.raises(ValueError, match=re.escape(f"[{key!r}] must be ")) as raised:
            of(**{key: value})
        assert str(raised.value).endswith(f"got {value!r}")


@pytest.mark.parametrize("key", KEYS)
def test_null_is_the_default(key: str) -> None:
    if key == "cpu_bytes_to_use":
        with pytest.raises(ValueError, match="needs the key 'cpu_bytes_to_use'"):
            of(cpu_bytes_to_use=None)
    else:
        assert of(**{key: None}) == of()


def test_defaults_are_those_of_vllm() -> None:
    settings = of()
    assert settings == TierSettings(1 << 30)
    assert (settings.eviction_policy, settings.store_threshold) == ("lru", 0)
    assert (settings.max_tracker_size, settings.offload_prompt_only) == (64_000, True)


def test_keys_that_vllm_reads_are_allowed() -> None:
    assert of(**dict.fromkeys(OF_VLLM, 1)) == of()


@pytest.mark.parametrize(
    ("key", "similar"),
    [
        ("cpu_bytes", "cpu_bytes_to_use"),
        ("evict_policy", "eviction_policy"),
        ("hugepages", "huge_pages"),
        ("zzz", None),
        ("", None),
    ],
)
def test_unknown_keys_are_named_with_those_that_there_are(key: str, similar: str | None) -> None:
    with pytest.raises(ValueError, match=re.escape(f"has no key {key!r}: ")) as raised:
        of(**{key: 1})
    message = str(raised.value)
    assert all(known in message for known in KEYS)
    assert ("did you mean" in message) == (similar is not None)
    if similar is not None:
        assert f"did you mean {similar!r}?" in message


@pytest.mark.parametrize("key", REFUSED)
def test_keys_of_other_tiers_say_what_to_do(key: str) -> None:
    with pytest.raises(ValueError, match=re.escape(REFUSED[key])):
        of(**{key: 1})


def test_the_bytes_are_shared_among_workers() -> None:
    assert TierSettings.of({"cpu_bytes_to_use": 1 << 30}, 4).heap_bytes == 1 << 28
    assert TierSettings.of({"cpu_bytes_to_use": 1000}, 2).heap_bytes == 256
    with pytest.raises(ValueError, match=r"\['cpu_bytes_to_use'\] is 1000: too little for 8"):
        TierSettings.of({"cpu_bytes_to_use": 1000}, 8)


def test_no_bytes_are_an_error() -> None:
    with pytest.raises(ValueError, match="needs the key 'cpu_bytes_to_use'"):
        TierSettings.of({})


def test_an_index_needs_a_heap_that_stays() -> None:
    with pytest.raises(ValueError, match=r"\['index_path'\] is '/i', but there is no 'heap_path'"):
        of(index_path="/i")
    assert of(index_path="/i", heap_path="/h").index_path == "/i"


@pytest.mark.parametrize("index_path", ["/d/h", "/d/h.0", "/d/h.12", "/d/h.dp3.0", "/d/x/../h.1"])
def test_an_index_is_no_heap(index_path: str) -> None:
    with pytest.raises(
        ValueError, match=r"\['index_path'\] is .* a file of 'heap_path' \('/d/h'\)"
    ):
        of(index_path=index_path, heap_path="/d/h")


def test_an_index_may_lie_beside_the_heap() -> None:
    for index_path in ("/d/h.index", "/d/h0", "/h.0", "/d/hx0"):
        assert of(index_path=index_path, heap_path="/d/h").index_path == index_path


def test_the_scheduler_side_imports_without_vllm_and_torch() -> None:
    program = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('vllm', 'torch', 'triton')))\n"
        "from kvheap.integrations.vllm import chunk_store, eviction, groups, offers, settings\n"
        "from kvheap.integrations.vllm import restart\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class TestOffers:
    def test_a_chunk_is_admitted_when_it_was_offered_often_enough(self) -> None:
        counts: OfferCounts[str] = OfferCounts(3, 10)
        assert [counts.admitted(["a", "b"]) for _ in range(4)] == [[], [], ["a", "b"], ["a", "b"]]

    def test_the_key_that_was_offered_longest_ago_is_forgotten(self) -> None:
        counts: OfferCounts[str] = OfferCounts(2, 2)
        for keys in (["a"], ["b"], ["a"], ["c"]):
            counts.admitted(keys)
        assert counts.admitted(["a"]) == ["a"]
        assert counts.admitted(["b"]) == []
        assert len(counts) == 2

    def test_an_offer_does_not_push_out_its_own_keys(self) -> None:
        counts: OfferCounts[str] = OfferCounts(2, 2)
        counts.admitted(["a", "b"])
        assert counts.admitted(["c", "d", "a", "b"]) == ["a", "b"]

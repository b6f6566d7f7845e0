"""What is needed of vLLM: named when it is missing, and all of it implemented."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest
from vllm_cpu_scenes import need_vllm

from kvheap.integrations.vllm import versions

WITHOUT_VLLM = """
import sys
sys.modules["vllm"] = None
import kvheap.integrations.vllm as tier
from kvheap.integrations.vllm import chunk_store, eviction, groups, settings
from kvheap.integrations.vllm import versions
versions.DISTRIBUTIONS = ("no-such-distribution",)
for name in tier.__all__:
    try:
        getattr(tier, name)
    except ImportError as error:
        assert "needs vLLM, which is not installed" in str(error), error
    else:
        raise SystemExit(name)
assert "torch" not in sys.modules
"""


def test_without_vllm_the_error_says_so_and_the_rest_imports() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_VLLM], check=True, timeout=120)


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(ImportError, match="cannot import name 'KVHeapTier'"):
        from kvheap.integrations.vllm import KVHeapTier  # noqa: F401


class TestWithVllm:
    @pytest.fixture(autouse=True)
    def vllm(self) -> None:
        need_vllm()

    def test_nothing_is_missing(self) -> None:
        assert versions.missing_names() == []
        assert versions.require_vllm().startswith(versions.TESTED)

    @pytest.mark.parametrize(
        ("module", "name"),
        [
            ("vllm.v1.kv_offload.base", "OffloadingWorker.hold_still"),
            ("vllm.v1.kv_offload.base", "OffloadingClerk"),
        ],
    )
    def test_what_is_missing_is_named(
        self, monkeypatch: pytest.MonkeyPatch, module: str, name: str
    ) -> None:
        monkeypatch.setitem(versions.NEEDED, module, (*versions.NEEDED[module], name))
        self.require_refused(f"{module}.{name}")

    def test_a_missing_module_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(versions.NEEDED, "vllm.v1.kv_load", ("Anything",))
        self.require_refused("vllm.v1.kv_load")

    def require_refused(self, missing: str) -> None:
        versions.require_vllm.cache_clear()
        try:
            with pytest.raises(ImportError) as caught:
                versions.require_vllm()
        finally:
            versions.require_vllm.cache_clear()
        assert str(caught.value).endswith(f"lacks {missing}")
        assert f"the installed {versions.installed_version()}" in str(caught.value)

    def test_every_abstract_method_of_the_installed_version_is_there(self) -> None:
        import kvheap.integrations.vllm as tier
        from kvheap.integrations.vllm.failures import TolerantWorker

        implemented: dict[Any, set[str]] = {}
        for cls in (
            tier.KVHeapConnector,
            tier.KVHeapManager,
            tier.KVHeapOffloadingSpec,
            tier.KVHeapTieringSpec,
            tier.KVHeapWorker,
            TolerantWorker,
        ):
            assert not inspect.isabstract(cls), f"{cls.__name__}: {cls.__abstractmethods__}"
            implemented[cls.__name__] = set().union(
                *[getattr(base, "__abstractmethods__", ()) for base in cls.__mro__[1:]]
            )
        assert implemented["KVHeapWorker"] == {
            "get_finished",
            "submit_load",
            "submit_store",
            "wait",
        }
        assert implemented["KVHeapManager"] == {
            "lookup",
            "on_new_request",
            "prepare_load",
            "prepare_store",
        }
        assert implemented["KVHeapOffloadingSpec"] == {"get_manager", "get_worker"}

    @pytest.mark.parametrize("cls", ["KVHeapConnector", "KVHeapManager", "KVHeapWorker"])
    def test_overrides_take_what_vllm_passes(self, cls: str) -> None:
        """Every public method of vLLM's that is overridden takes at least the same arguments."""
        import kvheap.integrations.vllm as tier

        ours = getattr(tier, cls)
        theirs = ours.__mro__[1]
        for name, method in vars(ours).items():
            if name.startswith("_") or not inspect.isfunction(method) or not hasattr(theirs, name):
                continue
            needed = inspect.signature(getattr(theirs, name)).parameters
            taken = inspect.signature(method).parameters
            assert list(needed) == list(taken)[: len(needed)] or any(
                parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()
            ), f"{cls}.{name}"

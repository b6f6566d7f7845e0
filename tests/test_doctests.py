"""The examples in the docstrings do what they say."""

from __future__ import annotations

import doctest
import importlib
import os
import pkgutil

import pytest
from optional import NEED_NIXL, NEED_VLLM, need_matplotlib

import kvheap

MODULES = [module.name for module in pkgutil.walk_packages(kvheap.__path__, "kvheap.")]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_doctests(name: str) -> None:
    if name.endswith("_plot"):
        need_matplotlib()
    if name in NEED_VLLM and not os.environ.get("KVHEAP_REQUIRE_VLLM"):
        pytest.importorskip("vllm", reason="needs vLLM", exc_type=ImportError)
    if name in NEED_NIXL and not os.environ.get("KVHEAP_REQUIRE_NIXL"):
        pytest.importorskip("nixl", reason="needs NIXL, see constraints-nixl.txt")
    assert doctest.testmod(importlib.import_module(name)).failed == 0

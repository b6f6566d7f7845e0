"""The examples in the docstrings do what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
from optional import need_matplotlib

import kvheap

MODULES = [module.name for module in pkgutil.walk_packages(kvheap.__path__, "kvheap.")]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_doctests(name: str) -> None:
    if name.endswith("_plot"):
        need_matplotlib()
    assert doctest.testmod(importlib.import_module(name)).failed == 0

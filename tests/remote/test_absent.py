"""Without NIXL or msgpack, the package can be imported, and a node says what to install."""

from __future__ import annotations

import sys

import pytest
from remote_nodes import make_heap

from kvheap.remote import Node


@pytest.mark.parametrize("name", ["nixl", "msgpack"])
def test_a_missing_package_is_named_with_its_command(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    if name == "nixl":
        monkeypatch.setitem(sys.modules, "msgpack", sys)
    with make_heap(1) as heap, pytest.raises(ImportError, match="pip install") as raised:
        Node("x", heap)
    assert f"a Node needs the package {name}" in str(raised.value)
    assert "--no-deps nixl-cu13==1.5.1 nixl==1.5.1" in str(raised.value)

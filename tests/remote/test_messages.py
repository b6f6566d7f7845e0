"""Messages: keys arrive as they were sent, and none that cannot be."""

from __future__ import annotations

from typing import Any

import pytest
from remote_nodes import need_nixl

from kvheap.remote.errors import ProtocolError
from kvheap.remote.messages import as_keys, key_fields, packed, unpacked

WHY_NOT = need_nixl()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


class TestKeys:
    """Keys of one length travel joined, others as a list."""

    @pytest.mark.parametrize(
        "keys",
        [[], [b"a"], [b"ab", b"cd", b"ab"], [b"a", b"bc"], [bytes(511)] * 3, [b"\0\0", b"\1\0"]],
        ids=["none", "one", "equal", "unequal", "long", "zeros"],
    )
    def test_they_arrive_as_they_were(self, keys: list[bytes]) -> None:
        found = unpacked(packed(**key_fields(as_keys(keys)))).keys()
        assert found == keys
        assert {*map(type, found)} <= {bytes}
        assert unpacked(packed(keys=keys)).keys() == keys

    @pytest.mark.parametrize(
        "fields",
        [
            {"keys": b"abc", "key_bytes": 2},
            {"keys": b"abc", "key_bytes": 0},
            {"keys": b"abc", "key_bytes": -1},
            {"keys": b"abc"},
            {"keys": bytes(512), "key_bytes": 512},
            {"keys": bytes(65_537), "key_bytes": 1},
            {"keys": "abc", "key_bytes": 1},
            {"keys": b"abc", "key_bytes": 1.0},
        ],
        ids=str,
    )
    def test_those_that_cannot_be(self, fields: dict[str, Any]) -> None:
        with pytest.raises(ProtocolError):
            unpacked(packed(**fields)).keys()

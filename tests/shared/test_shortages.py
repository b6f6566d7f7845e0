"""What runs out, and numbers without measure: the message must say what it is."""

from __future__ import annotations

from errno import EMFILE
from pathlib import Path

import pytest
from few_descriptors import descriptors_left
from shared_heaps import attach, contents, key_of, own

from kvheap.shared import NoOwnerError, service

KEYS = [key_of(1)]


def test_without_descriptors_there_is_an_owner_still(path: Path) -> None:
    with own(path) as heap, attach(path) as other:
        with descriptors_left(0), pytest.raises(OSError, match="Too many open files") as caught:
            other.store(KEYS, contents(KEYS))
        assert (caught.value.errno, caught.value.filename) == (EMFILE, str(path))
        assert other.store(KEYS, contents(KEYS)).all()
        heap.check(contents=True)


def test_who_cannot_be_served_for_want_of_memory_ends_nobody_else(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with own(path) as heap, attach(path, timeout_s=5) as other:
        assert other.store(KEYS, contents(KEYS)).all()
        with monkeypatch.context() as patched:
            patched.setattr(service, "READ_BYTES", 1 << 60)  # no machine has as much
            with pytest.raises(NoOwnerError):
                other.remove(KEYS)
            assert heap.remove(KEYS) == KEYS
        assert other.store(KEYS, contents(KEYS)).all()
        heap.check(contents=True)


@pytest.mark.parametrize("timeout_s", [1e6, 1e9, 1e10, 1e300, 1 << 64])
def test_a_long_time_out_is_a_time_out(path: Path, timeout_s: float) -> None:
    with own(path), attach(path, timeout_s=timeout_s) as other:
        assert other.store(KEYS, contents(KEYS)).all()
        assert other.remove(KEYS) == KEYS

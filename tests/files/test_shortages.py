"""An index that cannot be opened now is not damaged: nobody should be told to delete it."""

from __future__ import annotations

from errno import EMFILE
from pathlib import Path

import pytest
from few_descriptors import descriptors_left
from file_tiers import make_heap, open_tier, stored

pytest.importorskip("lmdb")
pytest.importorskip("xxhash")


def test_without_descriptors_the_index_is_as_it_was(tmp_path: Path) -> None:
    heap = make_heap()
    with open_tier(tmp_path / "tier") as tier:
        keys = stored(tier, heap, range(3))
    errors: list[OSError] = []
    for count in range(12):
        with descriptors_left(count):
            try:
                open_tier(tmp_path / "tier").close()
            except OSError as error:
                errors.append(error)
            else:
                break
    assert len(errors) > 3
    assert {error.errno for error in errors} == {EMFILE}, errors
    assert not any("delete" in str(error) for error in errors)
    with open_tier(tmp_path / "tier") as tier:
        assert sorted(tier.keys()) == keys
        tier.check()

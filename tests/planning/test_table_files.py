"""Tables in files: where they are, and that a write is complete or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvheap.planning import table_files
from kvheap.planning.planner import table_for
from kvheap.planning.table_files import cache_path, load_table, save_table

H100 = "NVIDIA H100 80GB HBM3"


class TestFiles:
    def test_formulas_are_written_too(self, tmp_path: Path) -> None:
        for name in (H100, "NVIDIA GB10"):
            table = table_for(name, "0.0")
            save_table(table, tmp_path / "table.json")
            assert load_table(tmp_path / "table.json") == table

    def test_a_folder_that_cannot_be_made_is_an_error(self, cache: Path) -> None:
        cache.write_text("a file")
        with pytest.raises(OSError, match="cache"):
            save_table(table_for(H100, "1.0"), cache_path(H100, "1.0"))

    def test_a_failed_write_leaves_the_old_table_and_no_other_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place = tmp_path / "table.json"
        table = table_for(H100, "0.0")
        save_table(table, place)

        def fail(*_: object) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(table_files.os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            save_table(table_for("other", "0.0"), place)
        assert load_table(place) == table
        assert list(tmp_path.iterdir()) == [place]

    def test_where_it_is_stored(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        assert cache_path("a", "1").parent == tmp_path / "cache"
        monkeypatch.setenv("KVHEAP_CACHE_DIR", "")
        monkeypatch.setenv("XDG_CACHE_HOME", "/x")
        assert cache_path("a", "1").parent == Path("/x/kvheap")
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", "/home/somebody")
        assert cache_path("a", "1").parent == Path("/home/somebody/.cache/kvheap")

    @pytest.mark.parametrize("name", ["", "../../etc/passwd", "a/b", "Tesla\0", ".."])
    def test_no_name_leads_out_of_the_folder(self, name: str, cache: Path) -> None:
        assert cache_path(name, name).parent == cache

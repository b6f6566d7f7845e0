"""A tier that is opened again: whose chunks they are, who has the folder, and what is trusted."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lmdb")
pytest.importorskip("xxhash")

from file_tiers import LAYOUT, PLACE, key_of, make_heap, open_tier, stored, wrong_rows
from forked_child import in_a_child

from kvheap import BlockLayout, HostMemoryAllocator, MemoryFormat
from kvheap.files import FileTier, MissingChunksError, TierInUseError, TierMismatchError
from kvheap.files import folder as folder_module
from kvheap.memory import boots

NAMES = [key_of(number) for number in range(20)]


@pytest.fixture
def heap() -> HostMemoryAllocator:
    return make_heap()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "tier"


def loads_all(tier: FileTier, heap: HostMemoryAllocator) -> list[bytes]:
    """The keys of a tier, after a look at all of its chunks."""
    tier.check()
    keys = tier.keys()
    loading = tier.load(keys, heap)
    assert loading is not None
    loading.result(60)
    assert not wrong_rows(keys, loading.batch)
    assert loading.batch is not None
    heap.batched_free(loading.batch)
    return sorted(keys)


class TestRestart:
    def test_a_closed_tier_comes_back(self, folder: Path, heap: HostMemoryAllocator) -> None:
        for first in (0, 4, 8):
            with open_tier(folder) as tier:
                assert loads_all(tier, heap) == NAMES[:first]
                assert tier.stats().restored_chunks == first
                stored(tier, heap, range(first, first + 4))

    def test_a_relative_path_and_another_working_directory(
        self, tmp_path: Path, heap: HostMemoryAllocator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        tier = open_tier("tier")
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        stored(tier, heap, [1])
        tier.close()
        assert json.loads((tmp_path / "tier" / "tier.json").read_text())["is_closed"]

    def test_the_order_of_use_comes_back(self, folder: Path, heap: HostMemoryAllocator) -> None:
        with open_tier(folder, 4) as tier:
            for number in range(1, 5):
                stored(tier, heap, [number])
            tier.touch([NAMES[1]])
        with open_tier(folder, 4) as tier:
            stored(tier, heap, [5, 6])
            assert sorted(tier.keys()) == [NAMES[1], NAMES[4], NAMES[5], NAMES[6]]

    def test_the_head_of_a_prefix_leaves_last_after_a_restart_too(
        self, folder: Path, heap: HostMemoryAllocator
    ) -> None:
        with open_tier(folder, 4) as tier:
            stored(tier, heap, [1, 2, 3, 4])
        with open_tier(folder, 4) as tier:
            stored(tier, heap, [5, 6])
            assert sorted(tier.keys()) == [NAMES[1], NAMES[2], NAMES[5], NAMES[6]]

    def test_a_larger_size_has_more_room(self, folder: Path, heap: HostMemoryAllocator) -> None:
        with open_tier(folder, 4) as tier:
            stored(tier, heap, range(4))
        with open_tier(folder, 8) as tier:
            stored(tier, heap, range(4, 8))
            assert loads_all(tier, heap) == NAMES[:8]

    def test_a_smaller_size_drops_what_is_beyond(
        self, folder: Path, heap: HostMemoryAllocator
    ) -> None:
        with open_tier(folder, 8) as tier:
            stored(tier, heap, range(8))
        with open_tier(folder, 3) as tier:
            assert loads_all(tier, heap) == NAMES[:3]
            assert tier.stats().dropped_chunks == 5
            assert (folder / "chunks").stat().st_size == 3 * PLACE
        with open_tier(folder, 8) as tier:
            assert loads_all(tier, heap) == NAMES[:3]

    def test_strange_entries_are_dropped(self, folder: Path, heap: HostMemoryAllocator) -> None:
        with open_tier(folder) as tier:
            stored(tier, heap, [1])
            with tier._file._index._env.begin(write=True) as transaction:
                transaction.put(b"strange", b"too short")
        with open_tier(folder) as tier:
            assert loads_all(tier, heap) == [NAMES[1]]
            assert tier.stats().dropped_chunks == 1

    def test_other_options_are_no_other_identity(
        self, folder: Path, heap: HostMemoryAllocator
    ) -> None:
        with open_tier(folder, durable=True, policy="arc", threads=1) as tier:
            stored(tier, heap, [1])
        with open_tier(folder, direct=False) as tier:
            assert loads_all(tier, heap) == [NAMES[1]]

    def test_a_program_that_ends_without_closing_loses_nothing(
        self, folder: Path, heap: HostMemoryAllocator
    ) -> None:
        program = f"""
            import sys
            from file_tiers import *
            tier, heap = open_tier({str(folder)!r}), make_heap()
            for number in range(0, 12, 3):
                keys = [key_of(number + i) for i in range(3)]
                tier.store(keys, fill(heap, keys))
        """
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(
                [str(Path(__file__).parent.parent / "support"), *sys.path]
            )
        }
        command = [sys.executable, "-c", textwrap.dedent(program)]
        subprocess.run(command, check=True, timeout=120, env=environment)
        assert json.loads((folder / "tier.json").read_text())["is_closed"]
        with open_tier(folder) as tier:
            assert loads_all(tier, heap) == NAMES[:12]


class TestIdentity:
    @pytest.mark.parametrize(
        ("layout", "namespace", "field"),
        [
            (LAYOUT, "another model", "namespace"),
            (BlockLayout.of([2048], torch.float64, LAYOUT.fmt), "a model", "layout"),
            (BlockLayout.of([1024], torch.int64, LAYOUT.fmt), "a model", "layout"),
            (BlockLayout.of([2048], torch.int64, MemoryFormat.KV_2LTD), "a model", "layout"),
        ],
    )
    def test_another_tiers_chunks_are_refused_by_name(
        self,
        folder: Path,
        heap: HostMemoryAllocator,
        layout: BlockLayout,
        namespace: str,
        field: str,
    ) -> None:
        with open_tier(folder) as tier:
            stored(tier, heap, [1])
        with pytest.raises(TierMismatchError, match=f"{field} is .*, but the tier") as caught:
            FileTier(folder, 1 << 20, layout, namespace=namespace)
        assert caught.value.field == field
        with open_tier(folder) as tier:  # nothing was changed, and the folder is free
            assert loads_all(tier, heap) == [NAMES[1]]

    def test_another_version_of_the_format(
        self, folder: Path, heap: HostMemoryAllocator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with open_tier(folder) as tier:
            stored(tier, heap, [1])
        monkeypatch.setattr(folder_module, "FORMAT_VERSION", 2)
        with pytest.raises(TierMismatchError, match=r"format_version is 1, .* opened with 2"):
            open_tier(folder)

    @pytest.mark.parametrize(
        "text", ["", "{}", "[]", "not json", '{"identity": 3}', '{"identity": {}, "is_closed": 1}']
    )
    def test_a_file_that_is_none_of_ours(self, folder: Path, text: str) -> None:
        folder.mkdir()
        (folder / "tier.json").write_text(text)
        with pytest.raises(TierMismatchError, match=r"tier\.json: the content"):
            open_tier(folder)
        assert (folder / "tier.json").read_text() == text

    def test_a_file_in_place_of_the_folder(self, folder: Path) -> None:
        folder.write_text("a file")
        with pytest.raises(FileExistsError):
            open_tier(folder)


class TestLock:
    def test_two_tiers_of_one_process(self, folder: Path) -> None:
        with open_tier(folder):
            with pytest.raises(TierInUseError, match=f"in use by process {os.getpid()}") as caught:
                open_tier(folder)
            assert caught.value.owner_pid == os.getpid()
        open_tier(folder).close()

    def test_another_process(self, folder: Path) -> None:
        def open_it() -> Any:
            try:
                open_tier(folder).close()
            except TierInUseError as error:
                return error.owner_pid
            return "opened"

        with open_tier(folder):
            assert in_a_child(open_it) == os.getpid()
        assert in_a_child(open_it) == "opened"

    def test_a_late_close_leaves_a_folder_that_was_made_anew(
        self, folder: Path, heap: HostMemoryAllocator
    ) -> None:
        """Else another model's chunks would have the identity of the one that was removed."""
        late = open_tier(folder)
        shutil.rmtree(folder)
        with open_tier(folder, namespace="another model") as other:
            stored(other, heap, range(3))
            late.close()
            state = json.loads((folder / "tier.json").read_text())
            assert state["identity"]["namespace"] == "another model"
            assert not state["is_closed"]

    def test_a_folder_is_free_after_an_opening_that_failed(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("data_file.DataFile", "chunk_index.ChunkIndex", "io_threads.IOThreads"):
            module = f"kvheap.files.{name}"

            def fail(*_: Any, **__: Any) -> None:
                raise OSError("it cannot be had")

            with monkeypatch.context() as patch:
                patch.setattr(f"{module}.__init__", fail)
                with pytest.raises(OSError, match="cannot be had"):
                    open_tier(folder)
        open_tier(folder).close()


class TestReboot:
    def reopened(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, tier: FileTier, is_closed: bool
    ) -> FileTier:
        """The tier after the machine was started anew."""
        if is_closed:
            tier.close()
        else:  # as a kill does
            state = (folder / "tier.json").read_text()
            tier.close()
            (folder / "tier.json").write_text(state)
        monkeypatch.setattr(folder_module, "boot_id", lambda: "another boot")
        return open_tier(folder)

    @pytest.mark.parametrize(
        ("is_durable", "is_closed", "is_kept"),
        [(False, False, False), (False, True, True), (True, False, True), (True, True, True)],
    )
    def test_what_may_be_torn_is_dropped(
        self,
        folder: Path,
        heap: HostMemoryAllocator,
        monkeypatch: pytest.MonkeyPatch,
        is_durable: bool,
        is_closed: bool,
        is_kept: bool,
    ) -> None:
        tier = open_tier(folder, durable=is_durable)
        stored(tier, heap, [1, 2])
        with self.reopened(folder, monkeypatch, tier, is_closed) as tier:
            assert loads_all(tier, heap) == (NAMES[1:3] if is_kept else [])
            stored(tier, heap, [3, 4])
            assert set(loads_all(tier, heap)) >= {NAMES[3], NAMES[4]}

    def test_killed_in_the_same_boot(self, folder: Path, heap: HostMemoryAllocator) -> None:
        tier = open_tier(folder)
        stored(tier, heap, [1, 2])
        state = (folder / "tier.json").read_text()
        tier.close()
        (folder / "tier.json").write_text(state)
        with open_tier(folder) as tier:
            assert loads_all(tier, heap) == NAMES[1:3]

    def test_a_system_that_does_not_name_its_boots(
        self, folder: Path, heap: HostMemoryAllocator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(boots, "BOOT_ID", Path("/nonexistent"))
        tier = open_tier(folder)
        stored(tier, heap, [1, 2])
        state = (folder / "tier.json").read_text()
        tier.close()
        (folder / "tier.json").write_text(state)
        with open_tier(folder) as tier:
            assert loads_all(tier, heap) == []

    @pytest.mark.parametrize("is_durable", [False, True])
    def test_durable_stores_are_synchronized_before_the_index_has_them(
        self,
        folder: Path,
        heap: HostMemoryAllocator,
        monkeypatch: pytest.MonkeyPatch,
        is_durable: bool,
    ) -> None:
        from kvheap.files.chunk_index import ChunkIndex
        from kvheap.files.data_file import DataFile

        steps: list[str] = []

        def noting(name: str, call: Any) -> Any:
            def noted(*arguments: Any) -> Any:
                steps.append(name)
                return call(*arguments)

            return noted

        with open_tier(folder, 4, durable=is_durable) as tier:
            stored(tier, heap, [1, 2, 3, 4])
            monkeypatch.setattr(DataFile, "write", noting("bytes", DataFile.write))
            monkeypatch.setattr(DataFile, "sync", noting("sync", DataFile.sync))
            monkeypatch.setattr(ChunkIndex, "write", noting("index", ChunkIndex.write))
            stored(tier, heap, [5])  # evicts one
            synced = ["sync"] if is_durable else []
            assert steps == ["index", "bytes", *synced, "index"]
            flags = tier._file._index._env.flags()
            assert flags["sync"] == is_durable


class TestErrors:
    @pytest.mark.parametrize(
        "error",
        [
            TierInUseError("/a", 5),
            TierInUseError("/a", None),
            TierMismatchError("/a", "layout", "x", "y"),
            MissingChunksError([b"a"], [b"b"], [b"c", b"d", b"e", b"f"]),
        ],
    )
    def test_they_travel_between_processes(self, error: Exception) -> None:
        again = pickle.loads(pickle.dumps(error))
        assert str(again) == str(error)
        assert vars(again) == vars(error)

"""Snapshots of heaps: against what is known block by block, and as files."""

from __future__ import annotations

import base64
import gc
import json
import math
import os
import random
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_code import Foreign
from forked_child import in_a_child
from made_up_maps import made_up_map, random_map
from optional import need_matplotlib
from small_heaps import PAGE, heap_of, take

from kvheap import (
    AddressManager,
    ClosedError,
    HeapCorruptionError,
    HostMemoryAllocator,
    MemoryBatch,
    PagedTensorMemoryAllocator,
    ReentrantCallError,
    TensorMemoryAllocator,
    foreign_transfer,
)
from kvheap.snapshots import (
    STATES,
    HeapSnapshot,
    SnapshotError,
    is_snapshot,
    open_snapshot,
)


def pages_of(snapshot: HeapSnapshot) -> list[str]:
    """The state of each page, and that the extents cover the heap."""
    found: list[str] = []
    for start, size, state in zip(
        snapshot.starts.tolist(), snapshot.sizes.tolist(), snapshot.states.tolist(), strict=True
    ):
        assert start == len(found) * PAGE
        found += [STATES[state]] * (size // PAGE)
    assert len(found) * PAGE == snapshot.heap_bytes
    return found


class Work:
    """A transfer of others that has not ended, or has failed without an end."""

    fails = False

    def query(self) -> bool:
        if self.fails:
            raise RuntimeError("the peer is silent")
        return False


class Naive:
    """A heap of pages whose states are written down one by one."""

    def __init__(self, num_pages: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.heap = heap_of(num_pages)
        self.pages = ["free"] * num_pages
        self.batches: list[MemoryBatch] = []
        self.works: list[Work] = []

    def mark(self, addresses: Any, state: str) -> None:
        for address in addresses:
            self.pages[int(address) // PAGE] = state

    def step(self) -> None:
        kind = self.random.choice(
            ["allocate", "allocate", "free", "free some", "pin", "unpin", "lease", "read", "fail"]
        )
        if kind == "allocate":
            batch = self.heap.batched_allocate(
                [PAGE], torch.uint8, self.random.randint(1, 12), allow_partial=True
            )
            if len(batch):
                self.batches.append(batch)
                self.mark(batch.addresses, "live")
            return
        if not self.batches:
            return
        batch = self.random.choice(self.batches)
        live = np.flatnonzero(batch.live)
        row = int(self.random.choice(live.tolist()))
        address = batch.addresses[row]
        is_pinned = self.pages[address // PAGE] == "pinned"
        if kind == "pin" and not is_pinned:
            batch[row].pin()
            self.mark([address], "pinned")
        elif kind == "unpin" and is_pinned and not batch.counts.has_leases:
            batch[row].unpin()
            self.mark([address], "live")
        elif kind == "lease" and not is_pinned:
            self.heap.lease(batch, ttl=600, rows=[row])
            self.mark([address], "pinned")
        elif kind == "free some":
            rows = [each for each in live if self.pages[batch.addresses[each] // PAGE] == "live"]
            rows = self.random.sample(rows, self.random.randint(0, len(rows)))
            if rows:
                self.heap.batched_free([batch[each] for each in rows])
                self.mark(batch.addresses[rows], "free")
                if len(rows) == len(live):
                    self.batches.remove(batch)
        elif all(self.pages[batch.addresses[each] // PAGE] == "live" for each in live):
            if kind in ("read", "fail") and len(live) == len(batch):
                work = Work()
                self.works.append(work)
                foreign_transfer(work, source=batch)
                self.heap.batched_free(batch)
                work.fails = kind == "fail"
                self.mark(batch.addresses, "quarantined" if work.fails else "pending")
                self.batches.remove(batch)
            elif kind == "free":
                self.heap.batched_free([batch[int(each)] for each in live])
                self.mark(batch.addresses[live], "free")
                self.batches.remove(batch)


class TestMap:
    @pytest.mark.parametrize("seed", range(8))
    def test_it_is_what_is_known_of_each_page(self, seed: int) -> None:
        naive = Naive(96, seed)
        for _ in range(60):
            naive.step()
            snapshot = naive.heap.snapshot()
            assert pages_of(snapshot) == naive.pages
        stats = naive.heap.stats()
        assert snapshot.bytes_by_state()["free"] == stats.free_bytes
        assert snapshot.largest_free_bytes == stats.largest_free_bytes
        assert (snapshot.free_extents == naive.heap.free_extents()).all()

    def test_owners_ages_and_blocks(self) -> None:
        heap = TensorMemoryAllocator(torch.zeros(64 * PAGE, dtype=torch.uint8), trace_frames=2)

        def first_site() -> MemoryBatch:
            return heap.batched_allocate([PAGE // 4], torch.float32, 5)

        def second_site() -> MemoryBatch:
            return heap.batched_allocate([2 * PAGE], torch.uint8, 3)

        batches = [first_site(), second_site(), first_site()]
        time.sleep(0.01)
        batches[0][0].pin()
        snapshot = heap.snapshot()
        one, two = snapshot.uses()
        assert (one.num_blocks, one.num_bytes, one.pinned_bytes) == (10, 10 * PAGE, PAGE)
        assert (two.num_blocks, two.num_bytes, two.pinned_bytes) == (3, 6 * PAGE, 0)
        assert one.owner.site[0].endswith("in first_site")
        assert __file__ in one.owner.site[0]
        assert "torch.float32" in one.owner.layout
        assert 0.01 <= one.oldest_s < 60
        assert snapshot.blocks.tolist() == [1, 4, 3, 5, 0]
        assert np.isnan(snapshot.ages).tolist() == [False] * 4 + [True]
        assert len(batches) == 3

    def test_sites_are_recorded_only_if_asked_for(self) -> None:
        heap = heap_of(8)
        batch = take(heap, 2)
        snapshot = heap.snapshot()
        assert snapshot.owners[0].site == ()
        assert "make the heap with trace_frames=4" in snapshot.summary()
        assert len(batch) == 2

    def test_pending_blocks_keep_their_owner(self) -> None:
        heap = heap_of(8)
        batch = take(heap, 2)
        foreign_transfer(Work(), source=batch)
        layout = str(batch.layout)
        heap.batched_free(batch)
        (use,) = heap.snapshot().uses()
        assert (use.owner.layout, use.num_blocks) == (layout, 2)
        assert math.isnan(use.oldest_s)

    def test_several_segments(self) -> None:
        heap = heap_of(4)
        heap.add_buffer(torch.zeros(4 * PAGE, dtype=torch.uint8))
        snapshot = heap.snapshot()
        assert snapshot.segments == (0, 4 * PAGE)
        assert snapshot.free_extents.tolist() == [[0, 4 * PAGE], [4 * PAGE, 4 * PAGE]]

    def test_pages_of_any_size(self) -> None:
        heap = PagedTensorMemoryAllocator(
            torch.zeros(10 * 656, dtype=torch.uint8), [torch.Size([656])], [torch.uint8]
        )
        batch = heap.batched_allocate([656], torch.uint8, 3)
        snapshot = heap.snapshot()
        assert snapshot.sizes.tolist() == [3 * 656, 7 * 656]
        assert snapshot.align_bytes == 656
        assert len(batch) == 3

    def test_a_heap_of_no_bytes(self) -> None:
        snapshot = TensorMemoryAllocator(torch.empty(0, dtype=torch.uint8)).snapshot()
        assert snapshot.num_extents == 0
        assert set(snapshot.bytes_by_state().values()) == {0}
        assert "100.0% in use" in snapshot.summary()

    def test_other_users_of_the_address_space(self) -> None:
        manager = AddressManager(8 * PAGE)
        heap = heap_of(8, address_manager=manager)
        manager.allocate(PAGE)
        batch = take(heap, 2)
        manager.allocate(PAGE)
        heap.free(batch[0])
        expected = ["other", "free", "live", "other", *["free"] * 4]
        assert pages_of(heap.snapshot()) == expected

    @pytest.mark.parametrize(
        ("address", "match"),
        [(0, r"\[0, 4096\) are .*free"), (PAGE, r"\[4096, 8192\) are live and also free")],
    )
    def test_bytes_that_are_live_and_free(self, address: int, match: str) -> None:
        heap = heap_of(8)
        batch = take(heap, 4)
        heap.address_manager.free(address, PAGE)
        with pytest.raises(HeapCorruptionError, match=match):
            heap.snapshot()
        with pytest.raises(HeapCorruptionError, match="live block"):
            heap.check()
        heap.address_manager.reserve([address], PAGE)
        assert pages_of(heap.snapshot()) == ["live"] * 4 + ["free"] * 4
        heap.batched_free(batch)

    def test_bytes_of_two_blocks(self) -> None:
        heap = heap_of(8)
        batch = take(heap, 4)
        heap.address_manager.free(2 * PAGE, PAGE)
        other = take(heap, 1)
        assert other.addresses.tolist() == [2 * PAGE]
        with pytest.raises(HeapCorruptionError, match=r"\[8192, 12288\) are live and also live"):
            heap.snapshot()
        assert batch.live.all()

    def test_dropped_blocks_are_reclaimed_first(self) -> None:
        heap = heap_of(8)
        take(heap, 2)
        gc.collect()
        assert pages_of(heap.snapshot()) == ["free"] * 8

    def test_it_keeps_no_block_alive(self) -> None:
        heap = heap_of(8)
        batch = take(heap, 2)
        snapshot = heap.snapshot()
        del batch
        gc.collect()
        assert heap.stats().allocated_bytes == 0
        assert snapshot.bytes_by_state()["live"] == 2 * PAGE


class TestWhere:
    def test_other_threads_allocate_meanwhile(self) -> None:
        heap = heap_of(256)
        has_ended = threading.Event()

        def work() -> None:
            while not has_ended.is_set():
                batch = take(heap, 16)
                heap.batched_free([batch[3]])
                batch[1].pin()
                batch[1].unpin()
                heap.batched_free([batch[row] for row in range(16) if row != 3])

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(150):
                snapshot = heap.snapshot()
                used = len(pages_of(snapshot)) - pages_of(snapshot).count("free")
                assert "other" not in pages_of(snapshot)
                # Each thread holds nothing, a batch, or a batch but for one block.
                assert used in (0, 15, 16, 30, 31, 32)
        finally:
            has_ended.set()
            for thread in threads:
                thread.join()

    def test_inside_an_operation_it_is_refused_and_harms_nothing(self) -> None:
        """At each place of an allocation and a free: it answers, or says why not."""
        outcomes = []
        for number in range(0, 400, 7):
            heap = heap_of(32)
            kept = take(heap, 3)

            def look(heap: TensorMemoryAllocator = heap) -> None:
                try:
                    snapshot = heap.snapshot()
                except ReentrantCallError as error:
                    outcomes.append(str(error).partition(" while ")[0])
                else:
                    assert pages_of(snapshot).count("other") == 0
                    outcomes.append("answered")

            def task(heap: TensorMemoryAllocator = heap) -> None:
                heap.batched_free(take(heap, 5))

            Foreign(number, look).strikes(task)
            assert heap.memcheck()
            assert heap.stats().allocated_bytes == 3 * PAGE
            assert len(kept) == 3
        refused = "snapshot was called by a finalizer or a signal handler"
        assert {*outcomes} == {refused, "answered"}

    def test_a_closed_heap(self) -> None:
        heap = heap_of(4)
        heap.close()
        with pytest.raises(ClosedError, match="is closed"):
            heap.snapshot()

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_a_forked_child_says_that_it_only_looks(self) -> None:
        heap = HostMemoryAllocator(16 * PAGE, shared=True)
        batch = heap.batched_allocate([PAGE], torch.uint8, 3)

        def child() -> tuple[list[str], bool, str]:
            snapshot = heap.snapshot()
            return pages_of(snapshot), snapshot.is_view_only, snapshot.summary()

        pages, is_view_only, summary = in_a_child(child)
        assert pages == ["live"] * 3 + ["free"] * 13
        assert is_view_only
        assert "Another process keeps the books of this heap" in summary
        assert not heap.snapshot().is_view_only
        assert len(batch) == 3


class TestFiles:
    def test_what_is_saved_is_read_back(self, tmp_path: Path) -> None:
        for snapshot in (made_up_map(), random_map(3000), heap_of(4).snapshot()):
            path = tmp_path / "map.json"
            snapshot.save(path)
            found = open_snapshot(path)
            for name, value in vars(snapshot).items():
                if name in type(snapshot).__dataclass_fields__:
                    np.testing.assert_array_equal(getattr(found, name), value, name)
            assert found.summary() == snapshot.summary()
            assert repr(found) == repr(snapshot)
            assert is_snapshot(json.loads(path.read_text()))

    def test_it_is_read_without_torch(self, tmp_path: Path) -> None:
        made_up_map().save(tmp_path / "map.json")
        program = (
            "import sys; from kvheap.snapshots import open_snapshot\n"
            "print(open_snapshot(sys.argv[1]).summary()); assert 'torch' not in sys.modules"
        )
        command = [sys.executable, "-c", program, str(tmp_path / "map.json")]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        assert done.stdout.startswith("TensorMemoryAllocator of 4 MiB on cpu: 50.0% in use")

    def test_pictures(self, tmp_path: Path) -> None:
        need_matplotlib()
        made_up_map().save(tmp_path / "map.PNG")
        assert (tmp_path / "map.PNG").read_bytes()[:4] == b"\x89PNG"
        figure = made_up_map().plot()
        titles = [panel.get_title() for panel in figure.axes]
        assert [title.partition(":")[0] for title in titles[:3]] == [
            "by state",
            "by age",
            "by owner",
        ]
        empty = TensorMemoryAllocator(torch.empty(0, dtype=torch.uint8)).snapshot()
        empty.save(tmp_path / "empty.png")

    def test_a_picture_has_the_bytes_of_each_cell(self) -> None:
        need_matplotlib()
        from kvheap.snapshots.snapshot_plot import bytes_by_cell

        snapshot = random_map(500)
        rows = snapshot.states == 1
        found = bytes_by_cell(snapshot, rows, 100)
        width = snapshot.heap_bytes / 100
        for cell in range(0, 100, 9):
            first, last = cell * width, (cell + 1) * width
            low = np.clip(snapshot.starts[rows], first, last)
            high = np.clip(snapshot.starts[rows] + snapshot.sizes[rows], first, last)
            assert found[cell] == pytest.approx((high - low).sum())

    def test_other_suffixes_write_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"must end in .json, .html, .*got '.*map.txt'"):
            made_up_map().save(tmp_path / "map.txt")
        assert list(tmp_path.iterdir()) == []

    def test_without_matplotlib_it_says_what_to_install(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.delitem(sys.modules, "kvheap.snapshots.snapshot_plot", raising=False)
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ImportError, match=r"pip install matplotlib"):
            made_up_map().save(tmp_path / "map.png")
        with pytest.raises(ImportError, match=r"pip install matplotlib"):
            made_up_map().plot()

    @pytest.mark.parametrize(
        ("name", "value", "match"),
        [
            ("format", "kvheap heap snapshot 2", "got 'kvheap heap snapshot 2': read it with"),
            ("format", 3, "got 3"),
            ("heap", None, "heap must be of type str, got None"),
            ("heap_bytes", True, "heap_bytes must be of type int, got True"),
            ("heap_bytes", 4096, "must cover the heap of 4096 bytes, got 4194304"),
            ("heap_bytes", -1, "heap_bytes must be 0 to"),
            ("num_extents", 1 << 40, "num_extents must be 0 to"),
            ("num_extents", 3, "sizes must have 3 numbers, got 72"),
            ("sizes", "zlib", "sizes must be a column of <i8, got zlib"),
            ("sizes", [0] * 72, "sizes must be positive, got 0"),
            ("sizes", [1.5] * 72, "sizes must be integers"),
            ("sizes", [1 << 70] * 72, "a number that does not fit"),
            ("states", [9] * 72, "states must be 0 to 5, got 9 to 9"),
            ("batches", [4] * 72, "batches must be -1 to 3, got 4 to 4"),
            ("owner_of", [0, 0, 1, 2], "owner_of must be 0 to 1"),
            ("block_bytes", [4096, 8192, 4096, 0], "block_bytes must be 1 to"),
            ("ages_s", {"dtype": "<f8", "zlib": "AAAA"}, "ages_s is damaged"),
            ("ages_s", {"dtype": "<i8", "zlib": ""}, "ages_s must be a column of <f8"),
            ("ages_s", {"dtype": "<f8", "zlib": 5}, "ages_s is damaged"),
            ("segments", [-1], "segments must be addresses"),
            ("owners", 5, "owners must have a layout and a site"),
            ("owners", [{"layout": 1, "site": []}] * 2, "an owner must be of texts"),
            ("time", "<script>", "time must be as in ISO 8601"),
        ],
    )
    def test_damage_is_named(self, tmp_path: Path, name: str, value: Any, match: str) -> None:
        path = tmp_path / "map.json"
        data = made_up_map().to_json() | {name: value}
        path.write_text(json.dumps(data))
        with pytest.raises(SnapshotError, match=match):
            open_snapshot(path)

    @pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', "{}", "\xff", "[" * 100_000])
    def test_what_is_no_snapshot(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "map.json"
        path.write_text(text, "latin-1")
        with pytest.raises(SnapshotError, match=r"map\.json"):
            open_snapshot(path)

    def test_a_column_that_unpacks_to_more_is_refused_without_unpacking(
        self, tmp_path: Path
    ) -> None:
        packed = base64.b64encode(zlib.compress(bytes(1 << 25))).decode()
        data = made_up_map().to_json() | {"sizes": {"dtype": "<i8", "zlib": packed}}
        path = tmp_path / "map.json"
        path.write_text(json.dumps(data))
        with pytest.raises(SnapshotError, match="it must have 576 bytes"):
            open_snapshot(path)

    def test_any_key_may_be_missing(self, tmp_path: Path) -> None:
        path = tmp_path / "map.json"
        for name in made_up_map().to_json():
            data = made_up_map().to_json()
            del data[name]
            path.write_text(json.dumps(data))
            if name != "states_names":
                with pytest.raises(SnapshotError):
                    open_snapshot(path)

"""The page of a snapshot, in a browser."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chromium import Chromium
from made_up_maps import made_up_map, random_map

from kvheap import TensorMemoryAllocator
from kvheap.snapshots import HeapSnapshot

LIGHT = {
    "free": (0xDF, 0xE5, 0xEC),
    "live": (0x3B, 0x76, 0xB8),
    "pinned": (0x14, 0x30, 0x4F),
    "pending": (0xE8, 0xA3, 0x3D),
    "quarantined": (0xC0, 0x39, 0x2B),
    "other": (0x8A, 0x8F, 0x98),
}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("browser")) as found:
        yield found


class Page:
    """A snapshot that is shown."""

    def __init__(self, browser: Chromium, snapshot: HeapSnapshot, path: Path) -> None:
        self.browser, self.snapshot = browser, snapshot
        browser.events.clear()
        snapshot.save(path)
        browser.open(path)
        browser.wait_for(f"location.href === {path.as_uri()!r}")
        self.settle()

    def settle(self) -> None:
        """Wait until what the last events have asked for is drawn."""
        self.browser.wait_for("document.documentElement?.dataset.drawn")
        frame = "new Promise(done => requestAnimationFrame(() => setTimeout(done)))"
        self.browser.run(f"(async () => {{ for (let i = 0; i < 3; i++) await {frame} }})()")

    def redrawn(self, change: Callable[[], object]) -> None:
        """Make a change that the page notices by itself, and wait until it has drawn anew."""
        drawn = "Number(document.documentElement.dataset.drawn)"
        before = self.browser.run(drawn)
        change()
        self.browser.wait_for(f"{drawn} > {before}")
        self.settle()

    def text(self, selector: str) -> str:
        found: str = self.browser.run(f"document.querySelector({selector!r}).innerText")
        return found

    def pixel(self, x: int, y: int) -> tuple[int, ...]:
        found = self.browser.run(
            "(() => { const c = document.getElementById('canvas');"
            f"return [...c.getContext('2d').getImageData({x}, {y}, 1, 1).data] }})()"
        )
        return tuple(found[:3])

    def box(self) -> dict[str, float]:
        found: dict[str, float] = self.browser.run(
            "(() => { const b = document.getElementById('canvas').getBoundingClientRect();"
            "return {x: b.x, y: b.y, width: b.width, height: b.height} })()"
        )
        return found

    def size(self) -> tuple[int, int]:
        width, height = self.browser.run(
            "[document.getElementById('canvas').width, document.getElementById('canvas').height]"
        )
        return width, height

    def hover(self, x: float, y: float) -> str:
        """The tip at a place of the canvas."""
        box = self.box()
        self.browser.mouse("mouseMoved", box["x"] + x, box["y"] + y)
        self.settle()
        tip = "document.getElementById('tip')"
        shown = self.browser.run(f"{tip}.style.display === 'block' ? {tip}.textContent : ''")
        return str(shown)

    def press(self, *keys: str) -> None:
        self.browser.run("document.getElementById('canvas').focus()")
        for key in keys:
            self.browser.press(key)
        self.settle()

    def choose(self, by: str) -> None:
        self.browser.run(
            f"(() => {{ const s = document.getElementById('by'); s.value = {by!r};"
            "s.dispatchEvent(new Event('change')) })()"
        )
        self.settle()


@pytest.fixture
def page(browser: Chromium, tmp_path: Path) -> Iterator[Page]:
    shown = Page(browser, made_up_map(), tmp_path / "map.html")
    yield shown
    assert browser.problems() == []


def shown_range(page: Page) -> tuple[int, int]:
    """The addresses that are shown."""
    text = page.text("#range")
    if text.startswith("whole heap"):
        return 0, page.snapshot.heap_bytes
    first, last = re.findall(r"from (\d+) to (\d+)", text)[0]
    return int(first), int(last)


class TestPage:
    def test_each_place_has_the_colour_of_its_state(self, page: Page) -> None:
        width, height = page.size()
        rows = height // 12
        snapshot = page.snapshot
        ends = snapshot.starts + snapshot.sizes
        checked = set()
        for row in range(rows):
            for x in range(2, width - 2, 37):
                cell = snapshot.heap_bytes / (rows * width)
                first, last = (row * width + x) * cell, (row * width + x + 1) * cell
                index = int(np.searchsorted(ends, first, side="right"))
                if ends[index] < last:
                    continue  # a mixed cell
                state = ("free", "live", "pinned", "pending", "quarantined", "other")[
                    snapshot.states[index]
                ]
                if (state, row % 7) not in checked:
                    checked.add((state, row % 7))
                    assert page.pixel(x, row * 12 + 3) == LIGHT[state], (x, row, state)
        assert {state for state, _ in checked} == {*LIGHT}

    def test_a_tip_says_what_is_there(self, page: Page) -> None:
        width, _ = page.size()
        tip = page.hover(width / 2, 5)
        first = page.snapshot
        assert tip.splitlines()[0].startswith(f"live: {first.sizes[0] // 1024} KiB at 0 to ")
        assert "64 blocks of 4 KiB, 5 min old" in tip
        assert "a <layout> & more" in tip
        assert "/a/file.py:12 in <module>" in tip

    def test_keys_zoom_and_move(self, page: Page) -> None:
        heap_bytes = page.snapshot.heap_bytes
        page.press("+", "+")
        first, last = shown_range(page)
        assert last - first == pytest.approx(heap_bytes / 4, abs=2)
        page.press("ArrowRight")
        assert shown_range(page)[0] == pytest.approx(first + heap_bytes / 40, abs=2)
        page.press("Home")
        assert shown_range(page)[0] == 0
        page.press("End")
        assert shown_range(page)[1] == heap_bytes
        page.press("-")
        assert shown_range(page)[1] - shown_range(page)[0] == pytest.approx(heap_bytes / 2, abs=2)
        page.press("0")
        assert shown_range(page) == (0, heap_bytes)

    def test_the_deepest_zoom_shows_a_few_units(self, page: Page) -> None:
        page.press(*"++++++++++++++++++++++++")
        first, last = shown_range(page)
        assert last - first == 4 * page.snapshot.align_bytes

    def test_the_wheel_zooms_at_the_pointer(self, page: Page) -> None:
        box, (width, _) = page.box(), page.size()
        x, y = width // 2, 17 * 12 + 5  # where each unit is an extent
        before = page.hover(x, y)
        assert "4 KiB at " in before
        page.browser.mouse("mouseWheel", box["x"] + x, box["y"] + y, deltaX=0, deltaY=-400)
        page.settle()
        first, last = shown_range(page)
        assert last - first < page.snapshot.heap_bytes
        assert page.hover(x, y) == before

    def test_a_drag_moves(self, page: Page) -> None:
        page.press("+", "+", "+")
        box = page.box()
        first, _ = shown_range(page)
        x, y = box["x"] + 200, box["y"] + 100
        page.browser.mouse("mousePressed", x, y, button="left", clickCount=1)
        page.browser.mouse("mouseMoved", x, y - 48, button="left")
        page.browser.mouse("mouseReleased", x, y - 48, button="left", clickCount=1)
        page.settle()
        assert shown_range(page)[0] > first

    def test_next_and_previous_extents_are_said(self, page: Page) -> None:
        page.press("n")
        said = page.text("#said")
        assert said.startswith(f"Extent 1 of {page.snapshot.num_extents}. live: ")
        page.press("n", "n", "p")
        assert page.text("#said").startswith("Extent 2 of ")

    def test_by_age_and_by_owner(self, page: Page) -> None:
        by_state = page.pixel(100, 3)
        page.choose("age")
        by_age = page.pixel(100, 3)
        page.choose("owner")
        by_owner = page.pixel(100, 3)
        assert len({by_state, by_age, by_owner}) == 3
        assert "/a/file.py:12 in <module>" in page.text("#legend")
        swatch = page.browser.run(
            "getComputedStyle(document.querySelector('[data-owner=\"0\"]')).backgroundColor"
        )
        assert swatch == f"rgb({', '.join(map(str, by_owner))})"

    def test_tables_say_it_in_words(self, page: Page) -> None:
        rows = page.text("table").splitlines()
        assert any(row.split()[:3] == ["live", "640", "KiB"] for row in rows)
        owners = page.text("table.owners")
        assert "a <layout> & more" in owners
        assert "not recorded" in owners

    def test_dark_and_light(self, page: Page) -> None:
        try:
            light = page.pixel(100, 3)
            page.redrawn(lambda: page.browser.prefer("dark"))
            assert page.pixel(100, 3) != light
            back = page.browser.run("getComputedStyle(document.body).backgroundColor")
            assert back == "rgb(18, 23, 29)"
            page.redrawn(lambda: page.browser.prefer("light"))
            assert page.pixel(100, 3) == light
        finally:
            page.browser.prefer("light")

    def test_texts_are_readable_in_both_schemes(self, page: Page) -> None:
        script = (
            "(() => { const s = getComputedStyle(document.documentElement);"
            "return ['back', 'text', 'dim'].map(n => s.getPropertyValue('--' + n).trim()) })()"
        )
        for scheme in ("light", "dark"):
            page.browser.prefer(scheme)
            back, text, dim = page.browser.run(script)
            assert contrast(back, text) >= 7
            assert contrast(back, dim) >= 4.5  # WCAG 2.2, AA
        page.browser.prefer("light")

    def test_what_a_screen_reader_finds(self, page: Page) -> None:
        nodes = page.browser.call("Accessibility.getFullAXTree")["nodes"]
        found = {(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes}
        roles = {role for role, _ in found}
        assert {"main", "heading", "table", "columnheader", "rowheader", "status"} <= roles
        assert ("combobox", "Colour by") in found
        assert ("table", "Bytes by state") in found
        assert ("table", "Bytes by owner") in found
        (name,) = [name for role, name in found if role == "image"]
        assert name.startswith("Map of the heap")

    def test_the_map_fits_a_small_screen_and_a_fine_one(self, page: Page) -> None:
        try:
            for width, scale in ((400, 1.0), (1200, 2.0)):
                page.redrawn(lambda size=(width, 800, scale): page.browser.resize(*size))
                box, (pixels, _) = page.box(), page.size()
                assert box["x"] + box["width"] <= width
                assert pixels == pytest.approx(box["width"] * scale, abs=1)
                assert page.browser.run("document.documentElement.scrollWidth <= window.innerWidth")
        finally:
            page.browser.resize(1200, 900)


def contrast(one: str, other: str) -> float:
    """The contrast of two colours, as WCAG defines it."""

    def luminance(colour: str) -> float:
        channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


class TestSizes:
    def test_a_million_extents(self, browser: Chromium, tmp_path: Path) -> None:
        snapshot = random_map(1_000_000)
        page = Page(browser, snapshot, tmp_path / "large.html")
        assert page.text("#range").startswith("whole heap")
        page.press("+", "+", "n")
        assert "of 1000000. " in page.text("#said")
        assert page.hover(300, 50) != ""
        assert browser.problems() == []

    def test_a_heap_of_no_bytes(self, browser: Chromium, tmp_path: Path) -> None:
        heap = TensorMemoryAllocator(torch.empty(0, dtype=torch.uint8))
        page = Page(browser, heap.snapshot(), tmp_path / "empty.html")
        page.press("+", "n", "ArrowRight", "End")
        assert page.hover(100, 20) == ""
        assert browser.problems() == []

    def test_texts_cannot_leave_their_places(self, browser: Chromium, tmp_path: Path) -> None:
        evil = "</script><img src=x onerror=document.title='struck'><!--DATA-->"
        snapshot = made_up_map(layout=evil, site=(evil,))
        page = Page(browser, snapshot, tmp_path / "evil.html")
        page.choose("owner")
        page.hover(100, 5)
        page.press("n")
        assert evil in page.text("#said")
        assert evil in page.text("table.owners")
        assert page.browser.run("document.title").startswith("Heap: ")
        assert browser.problems() == []


def test_the_page_is_one_file_without_addresses(tmp_path: Path) -> None:
    made_up_map().save(tmp_path / "map.html")
    text = (tmp_path / "map.html").read_text("utf-8")
    assert not re.search(r"https?://|src=|@import|url\(", text)
    assert "default-src 'none'" in text
    names: Any = re.findall(r"<!--[A-Z]+-->", text)
    assert names == []

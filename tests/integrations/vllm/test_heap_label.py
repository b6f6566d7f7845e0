"""``HeapLabel``: bytes that may have changed have another id. Needs no vLLM."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvheap.integrations.vllm.heap_label import LABEL_BYTES, HeapLabel
from kvheap.memory import boots

HEAP_BYTES = 1 << 20


class Medium:
    """A page, and what of it would be left if the power failed."""

    def __init__(self) -> None:
        self.page = np.zeros(LABEL_BYTES, np.uint8)
        self.kept = self.page.copy()
        self.can_flush = True

    def flush(self) -> None:
        if not self.can_flush:
            raise OSError(5, "Input/output error")
        self.kept = self.page.copy()

    def fail(self) -> None:
        self.page = self.kept.copy()

    def open(self, heap_bytes: int = HEAP_BYTES, boot: str = "boot 1") -> HeapLabel:
        return HeapLabel(self.page, heap_bytes, self.flush, boot)


@pytest.fixture
def medium() -> Medium:
    return Medium()


def test_a_new_file_has_no_id(medium: Medium) -> None:
    label = medium.open()
    assert label.previous is None
    assert label.why == "it is new"
    assert not medium.page.any(), "it was written to by looking"


def test_the_next_process_finds_the_id(medium: Medium) -> None:
    first = medium.open()
    first.renew()
    second = medium.open()
    assert second.previous == first.current != second.current
    assert second.why == ""


def test_looking_changes_nothing(medium: Medium) -> None:
    first = medium.open()
    first.renew()
    for _ in range(3):
        label = medium.open()
        label.seal()
        label.close()
        assert label.previous == first.current


def test_whoever_changes_bytes_changes_the_id(medium: Medium) -> None:
    first, second = medium.open(), medium.open()
    first.renew()
    first.seal()
    second.renew()
    second.renew()
    assert medium.open().previous == second.current


def test_ids_are_never_the_same(medium: Medium) -> None:
    assert len({medium.open().current for _ in range(100)}) == 100


@pytest.mark.parametrize("is_sealed", [True, False])
def test_after_a_restart_of_the_machine_only_what_was_sealed_is_valid(
    medium: Medium, is_sealed: bool
) -> None:
    first = medium.open()
    first.renew()
    if is_sealed:
        first.seal()
    medium.fail()
    second = medium.open(boot="boot 2")
    assert second.previous == (first.current if is_sealed else None)
    assert "restarted" in second.why or is_sealed


def test_a_renewed_label_is_not_undone_by_a_power_failure(medium: Medium) -> None:
    first = medium.open()
    first.renew()
    first.seal()
    medium.open().renew()
    medium.fail()
    assert medium.open(boot="boot 2").previous is None


def test_what_cannot_be_flushed_is_not_sealed(
    medium: Medium, caplog: pytest.LogCaptureFixture
) -> None:
    label = medium.open()
    medium.can_flush = False
    label.renew()
    label.seal()
    assert "Input/output error" in caplog.text
    assert medium.open().previous == label.current
    assert medium.open(boot="boot 2").previous is None


def test_without_a_name_of_the_boot_only_what_was_sealed_is_valid(
    medium: Medium, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert len(boots.boot_id()) == 36
    monkeypatch.setattr(boots, "BOOT_ID", tmp_path / "none")
    assert boots.boot_id() == ""
    label = medium.open(boot="")
    label.renew()
    assert medium.open(boot="").previous is None
    label.seal()
    assert medium.open(boot="").previous == label.current


def test_a_heap_of_other_bytes_is_another_heap(medium: Medium) -> None:
    medium.open().renew()
    label = medium.open(2 * HEAP_BYTES)
    assert label.previous is None
    assert label.why == f"it had {HEAP_BYTES} bytes, and has {2 * HEAP_BYTES} now"


def test_every_byte_of_it_counts(medium: Medium) -> None:
    first = medium.open()
    first.renew()
    used = int(np.flatnonzero(medium.page)[-1]) + 1
    for at in range(used):
        medium.page[at] ^= 0x10
        label = medium.open()
        assert label.previous is None, f"byte {at}"
        assert label.why in ("it is new", "its label is damaged")
        medium.page[at] ^= 0x10
    assert medium.open().previous == first.current


def test_a_label_that_was_half_written_is_none(medium: Medium) -> None:
    medium.open().renew()
    old = medium.page.copy()
    second = medium.open()
    second.renew()
    for at in np.flatnonzero(old != medium.page)[1:]:
        torn = medium.page.copy()
        torn[at:] = old[at:]
        label = HeapLabel(torn, HEAP_BYTES, medium.flush, "boot 1")
        assert label.previous is None


def test_nothing_is_written_after_the_end(medium: Medium) -> None:
    label = medium.open()
    label.close()
    with pytest.raises(ValueError, match="broadcast"):
        label.renew()
    label.seal()
    assert not medium.page.any()

"""The page of a snapshot: one file of HTML that needs no network."""

from __future__ import annotations

import json
from html import escape
from importlib import resources

from kvheap.snapshots.heap_map import STATES, HeapMap
from kvheap.snapshots.snapshot_json import to_json
from kvheap.snapshots.summary import age_text, bytes_text, headline_of, notes_of

__all__ = ["page_of"]

SHOWN_OWNERS = 50


def page_of(snapshot: HeapMap) -> str:
    """The page, whose tables are there without JavaScript too."""
    template = resources.files("kvheap.snapshots").joinpath("page.html").read_text("utf-8")
    data = json.dumps(to_json(snapshot)).replace("<", "\\u003c").replace("\u2028", "\\u2028")
    parts = {
        "TITLE": escape(f"{snapshot.heap}, {snapshot.time}"),
        "HEADLINE": escape(headline_of(snapshot)),
        "FACTS": escape(
            f"Taken {snapshot.time} in process {snapshot.pid} by kvheap {snapshot.version}. "
            f"Addresses are multiples of {snapshot.align_bytes} bytes, in "
            f"{len(snapshot.segments)} segment{'s' * (len(snapshot.segments) != 1)}."
        ),
        "NOTES": "".join(f'<p class="note">{escape(note)}</p>' for note in notes_of(snapshot)),
        "STATES": _state_rows(snapshot),
        "OWNERS": _owner_rows(snapshot),
        "DATA": data,
    }
    for name, text in parts.items():
        template = template.replace(f"<!--{name}-->", text, 1)
    return template


def _state_rows(snapshot: HeapMap) -> str:
    rows = []
    for state, num_bytes in snapshot.bytes_by_state().items():
        extents = int((snapshot.states == STATES.index(state)).sum())
        share = num_bytes / snapshot.heap_bytes if snapshot.heap_bytes else 0.0
        rows.append(
            f'<tr><th scope="row"><i class="swatch {state}"></i>{state}</th>'
            f"<td>{bytes_text(num_bytes)}</td><td>{share:.1%}</td><td>{extents:,}</td></tr>"
        )
    return "".join(rows)


def _owner_rows(snapshot: HeapMap) -> str:
    uses = snapshot.uses()
    rows = []
    for use in uses[:SHOWN_OWNERS]:
        number = snapshot.owners.index(use.owner)
        site = "<br>".join(escape(line) for line in use.owner.site) or "not recorded"
        rows.append(
            f'<tr><th scope="row"><i class="swatch" data-owner="{number}"></i>'
            f"{escape(use.owner.layout)}</th><td>{bytes_text(use.num_bytes)}</td>"
            f"<td>{use.num_blocks:,}</td><td>{bytes_text(use.pinned_bytes)}</td>"
            f"<td>{age_text(use.oldest_s)}</td><td>{site}</td></tr>"
        )
    if len(uses) > SHOWN_OWNERS:
        rows.append(f'<tr><td colspan="6">and {len(uses) - SHOWN_OWNERS:,} others</td></tr>')
    return "".join(rows) or '<tr><td colspan="6">none</td></tr>'

"""Draws ``overview.svg``: python3 docs/overview.py. Needs nothing but Python.

The picture has a background of its own, so that it can be read on a page of either colour, and a
second set of colours for readers who prefer dark pages.
"""

from __future__ import annotations

from pathlib import Path

WIDTH, HEIGHT = 1000, 470

STYLE = """
  .page { fill: #ffffff; stroke: #d0d7de }
  .box { fill: #f6f8fa; stroke: #afb8c1 }
  .free { fill: #ffffff; stroke: #c4cbd3 }
  .a { fill: #4c78a8 } .b { fill: #e4893b } .c { fill: #5a9e6f }
  .line { stroke: #57606a; stroke-width: 1.6; fill: none }
  .head { fill: #57606a }
  text { font-family: -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
  .title { font-size: 16.5px; font-weight: 600 }
  .text { font-size: 13.5px }
  .small { font-size: 12.5px; fill: #57606a }
  .call { font-family: ui-monospace, Consolas, "DejaVu Sans Mono", monospace; font-size: 13px }
  .on { font-size: 12px; fill: #ffffff; font-weight: 600 }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117; stroke: #3d444d }
    .box { fill: #161b22; stroke: #3d444d }
    .free { fill: #0d1117; stroke: #3d444d }
    .a { fill: #5b8ec4 } .b { fill: #d07a32 } .c { fill: #4f9467 }
    .line { stroke: #9198a1 } .head { fill: #9198a1 }
    text { fill: #f0f6fc } .small { fill: #9198a1 }
  }
"""

LETTERS = {"a": "A", "b": "B", "c": "C"}


def text(x: float, y: float, words: str, kind: str = "text", anchor: str = "start") -> str:
    """One line of text."""
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def box(x: float, y: float, width: float, height: float, kind: str = "box", radius: int = 8) -> str:
    """A rectangle."""
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" class="{kind}"/>'


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """A line with a head at its end."""
    return f'<path d="M{x1} {y1} L{x2} {y2}" class="line" marker-end="url(#head)"/>'


def engine() -> list[str]:
    """The paged cache: blocks of three requests, where there was room."""
    rows = ["a.b.", "ca.b", ".c.a", "b.a."]
    out = [box(24, 64, 232, 330), text(40, 92, "Engine: paged cache", "title")]
    out.append(text(40, 112, "blocks of 16 tokens, all layers", "small"))
    for layer in range(3):
        left, top = 48 + 12 * layer, 148 - 10 * layer
        if layer < 2:
            out.append(box(left, top, 164, 164, "free", 4))
            continue
        out.append(box(left - 4, top - 4, 172, 172, "box", 4))
        for y, row in enumerate(rows):
            for x, owner in enumerate(row):
                place = left + 42 * x, top + 42 * y
                out.append(box(*place, 38, 38, "free" if owner == "." else owner, 3))
                if owner != ".":
                    out.append(text(place[0] + 19, place[1] + 24, LETTERS[owner], "on", "middle"))
    out.append(text(40, 334, "KV of running requests A, B, C", "text"))
    out.append(text(40, 354, "28 layouts: vLLM, SGLang,", "small"))
    out.append(text(40, 372, "TensorRT-LLM, transformers", "small"))
    return out


def heap() -> list[str]:
    """One buffer, and the books on the host."""
    left, width = 392, 270
    out = [box(left - 16, 64, width + 32, 330), text(left, 92, "The heap", "title")]
    out.append(text(left, 112, "KV that outlives its request", "small"))
    out.append(text(left, 146, "keys: hashes of prefixes, what to evict", "text"))
    out.append(text(left, 168, "free list: addresses, 16,384 in one call", "text"))
    out.append(text(left, 190, "books: who still uses which bytes", "text"))
    out += [arrow(x, 202, x, 232) for x in (left + 44, left + 130, left + 216)]
    out.append(box(left, 236, width, 46, "free", 4))
    x = left + 3.0
    for owner, size in (("a", 74), (".", 18), ("c", 46), ("b", 62), (".", 34)):
        if owner != ".":
            out.append(box(x, 239, size, 40, owner, 3))
            out.append(text(x + size / 2, 264, LETTERS[owner], "on", "middle"))
        x += size
    out.append(text(left + width - 4, 264, "free", "small", "end"))
    out.append(text(left, 308, "one flat buffer of chunks", "text"))
    out.append(text(left, 328, "on a GPU or in (pinned) host memory", "small"))
    out.append(text(left, 362, "batched_allocate(source=)", "call"))
    out.append(text(left, 381, "batched_free(out=)", "call"))
    return out


def tiers() -> list[str]:
    """What is behind the heap."""
    left, width = 806, 170
    out = []
    for y, title, lines in (
        (64, "Pinned host", ("another heap", "offload, restore")),
        (178, "Outlives kill -9", ("FileTier: files", "SharedHeap: memory")),
        (292, "Other machines", ("NIXL: read by key", "Mooncake: a pool")),
    ):
        out.append(box(left, y, width, 102))
        out.append(text(left + 14, y + 30, title, "title"))
        out += [text(left + 14, y + 56 + 20 * n, line, "small") for n, line in enumerate(lines)]
    return out


def between() -> list[str]:
    """The copies."""
    out = [arrow(262, 208, 368, 208), arrow(370, 258, 264, 258)]
    out.append(text(316, 198, "store", "call", "middle"))
    out.append(text(316, 278, "load", "call", "middle"))
    out.append(text(316, 228, "one launch for", "small", "middle"))
    out.append(text(316, 245, "all layers, K, V", "small", "middle"))
    for y in (115, 229, 343):
        out += [arrow(684, y - 8, 800, y - 8), arrow(800, y + 8, 686, y + 8)]
    out.append(text(742, 88, "kernel on 2-3 SMs", "small", "middle"))
    out.append(text(742, 146, "or copy engine", "small", "middle"))
    out.append(text(742, 260, "with checksums", "small", "middle"))
    out.append(text(742, 374, "leased, in runs", "small", "middle"))
    return out


def draw() -> str:
    """The whole picture."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="An engine, the heap and the tiers behind it, and the copies between them">',
        f"<style>{STYLE}</style>",
        '<defs><marker id="head" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="8" '
        'markerHeight="8" orient="auto-start-reverse"><path d="M0 0 L10 5 L0 10 z" class="head"/>'
        "</marker></defs>",
        box(1, 1, WIDTH - 2, HEIGHT - 2, "page", 10),
        '<text x="24" y="40" class="text"><tspan class="title">kvheap</tspan>'
        "<tspan>: a home for KV that should outlive its request</tspan></text>",
        *engine(),
        *heap(),
        *tiers(),
        *between(),
        text(
            24,
            426,
            "A request with a known prefix loads its chunks instead of computing them.",
            "text",
        ),
        text(
            24,
            448,
            "Bytes are not handed out again while a stream or a copy still uses them.",
            "small",
        ),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "overview.svg").write_text(draw(), encoding="utf-8")

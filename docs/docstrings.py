"""Docstrings as Markdown: Sphinx's roles, tables of equal signs, and doctests.

The docstrings are written for ``help()``. mkdocstrings reads Markdown, where a table of equal signs
is a paragraph, and ``>>>`` three nested quotations.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:py:)?(?:meth|class|func|mod|data|attr|exc):`(~?)([^`]+)`")
ENTRY = re.compile(r"^\w+(?:, \w+)*: ")
RULE = re.compile(r"^(\s*)=+(?: +=+)+\s*$")


class Markdown(griffe.Extension):
    """Rewrites each docstring once, before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object, if it has one."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """A docstring's text in Markdown."""
    return _with_doctests(_with_tables(_with_plain_ends(ROLE.sub(_code, text))))


def _with_plain_ends(text: str) -> str:
    """Sentences under ``Raises:`` that name no error become a paragraph behind it."""
    out: list[str] = []
    sentences: list[str] = []
    indent: int | None = None
    for line in [*text.split("\n"), ""]:
        depth = len(line) - len(line.lstrip())
        if indent is None:
            indent = depth if line.strip() == "Raises:" else None
        elif line.strip() and depth == indent + 4 and not ENTRY.match(line.strip()):
            sentences.append(" " * indent + line.strip())
            continue
        elif (line.strip() and depth <= indent) or not line.strip():
            out += ["", *sentences] if sentences else []
            sentences, indent = [], None
        out.append(line)
    return "\n".join(out).rstrip("\n")


def _code(found: re.Match[str]) -> str:
    name = found[2].rpartition(".")[2] if found[1] else found[2]
    return f"`{name}`"


def _with_tables(text: str) -> str:
    lines, out = text.split("\n"), []
    number = 0
    while number < len(lines):
        rule = RULE.match(lines[number])
        if not rule:
            out.append(lines[number])
            number += 1
            continue
        end = number + 1
        rules = [number]
        while end < len(lines) and len(rules) < 3 and lines[end].strip():
            if RULE.match(lines[end]):
                rules.append(end)
            end += 1
        out += _table(lines[number], lines[number + 1 : end])
        number = end
    return "\n".join(out)


def _table(rule: str, lines: list[str]) -> list[str]:
    starts = [found.start() for found in re.finditer(r"=+", rule)]
    rows: list[list[str]] = []
    for line in lines:
        if RULE.match(line):
            continue
        spans = zip(starts, [*starts[1:], None], strict=True)
        cells = [line[start:end].strip() for start, end in spans]
        if cells[0] or not rows:
            rows.append(cells)
        else:
            rows[-1] = [" ".join(both).strip() for both in zip(rows[-1], cells, strict=True)]
    indent = " " * starts[0]
    text = [
        f"{indent}| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
        for row in rows
    ]
    return ["", text[0], f"{indent}|{'---|' * len(starts)}", *text[1:], ""]


def _with_doctests(text: str) -> str:
    out: list[str] = []
    is_open, indent = False, ""
    for line in text.split("\n"):
        if not is_open and line.lstrip().startswith(">>>"):
            is_open, indent = True, line[: len(line) - len(line.lstrip())]
            out += ["", f"{indent}```pycon"]
        elif is_open and not line.strip():
            is_open = False
            out.append(f"{indent}```")
        out.append(line)
    if is_open:
        out.append(f"{indent}```")
    return "\n".join(out)

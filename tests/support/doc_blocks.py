"""The code blocks of a Markdown page, with what the page says of how they are run.

A block stands for itself: it runs in a new namespace, and a reader can copy it. A comment on the
line before its fence says otherwise:

- ``<!-- continues -->``: it goes on where the block before it ended;
- ``<!-- needs: PACKAGE -->``: it is skipped where that package is missing;
- ``<!-- not run: REASON -->``: it is not run, and the reason is shown.

A block of ``text`` right after one of ``python`` is what that one prints.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DocBlock", "blocks_of"]

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n`]*$")
COMMENT = re.compile(r"^ *<!-- (?P<word>continues|needs|not run)(?:: (?P<what>.+))? -->$")


@dataclass(frozen=True)
class DocBlock:
    """One block of code.

    Attributes:
        page: the file.
        line: the line of its first line of code, counted from 1.
        language: what its fence says.
        code: its lines.
        expected: what it prints, if the page shows that.
        continues: whether it goes on in the namespace of the block before it.
        needs: a package without which it is skipped.
        not_run: why it is not run.
    """

    page: Path
    line: int
    language: str
    code: str
    expected: str | None = None
    continues: bool = False
    needs: str | None = None
    not_run: str | None = None


def blocks_of(page: Path) -> list[DocBlock]:
    """All blocks of a page, in order; those of ``text`` that show a result belong to its block."""
    lines = page.read_text(encoding="utf-8").split("\n")
    blocks: list[DocBlock] = []
    comments: dict[str, str] = {}
    number, last_end = 0, -2
    while number < len(lines):
        line = lines[number]
        comment, fence = COMMENT.match(line), FENCE.match(line)
        if comment:
            comments[comment["word"]] = comment["what"] or ""
        elif fence:
            end = number + 1
            while lines[end].strip() != "```":
                end += 1
            indent = len(fence["indent"])
            code = "".join(text[indent:] + "\n" for text in lines[number + 1 : end])
            is_result = fence["language"] == "text" and not "".join(lines[last_end + 1 : number])
            if is_result and blocks and blocks[-1].language == "python":
                blocks[-1] = DocBlock(**{**vars(blocks[-1]), "expected": code})
            else:
                blocks.append(
                    DocBlock(
                        page,
                        number + 2,
                        fence["language"],
                        code,
                        continues="continues" in comments,
                        needs=comments.get("needs"),
                        not_run=comments.get("not run"),
                    )
                )
            comments, number, last_end = {}, end, end
        elif line.strip():
            comments = {}
        number += 1
    return blocks

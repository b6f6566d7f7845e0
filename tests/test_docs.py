"""The documentation says what is so: its code runs, its commands exist, its lists are whole."""

from __future__ import annotations

import ast
import contextlib
import doctest
import io
import os
import re
import runpy
import shlex
import subprocess
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from doc_blocks import DocBlock, blocks_of

from kvheap.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
]

SHELLS = {"sh", "bash"}
LANGUAGES = {"python", "text", "toml", "json", *SHELLS}
CHECKER = doctest.OutputChecker()
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

LEFT_OUT = {
    "CommandError": "printed by the command as one line",
    "GivenUpError": "inside a node, which lends nothing to a reader that asks no more",
    "IndexRefusedError": "logged by the vLLM tier, which then begins empty",
    "MachineError": "printed by the command as one line",
    "OwnerRefusedError": "inside a SharedHeap, between a process and the owner",
    "ReleaseVoidError": "inside kvheap, between an event and its completion",
    "ShortReadError": "inside a FileTier, which removes the chunk and says so",
    "WipedLaterError": "inside kvheap, between freeing and wiping",
    "WipingError": "inside kvheap, between freeing and wiping",
}
"""Error classes that no caller sees, and where they end."""


INSIDE = {
    "MemoryBatch": {
        "await_filling",
        "await_transfers",
        "born",
        "bytes_of",
        "checked_rows",
        "claimable",
        "count",
        "counts",
        "describe",
        "forget_tokens",
        "index",
        "is_owner",
        "objects",
        "record",
        "require_owner",
        "require_writable",
        "set_used_size",
        "site",
        "storage",
        "stored_tokens",
        "used_sizes",
    },
    "MemoryObj": {
        "byte_array",
        "can_evict",
        "get_dtype",
        "get_dtypes",
        "get_memory_format",
        "get_num_tokens",
        "get_physical_size",
        "get_ref_count",
        "get_shape",
        "get_shapes",
        "get_size",
        "is_pinned",
        "meta",
        "raw_data",
    },
    "PagedKVCache": {"error_word", "filled_tokens"},
    "PrefixIndex": {"books"},
    "PrefixStore": {"watched_calls"},
    "TensorMemoryAllocator": {
        "absolute",
        "allocate_blocks",
        "block_bytes",
        "close_memory",
        "gather",
        "idempotent_free",
        "layout_of",
        "memory_segments",
        "merged_releases",
        "new_tensor",
        "object_type",
        "pinned_addresses",
        "require_gatherable",
        "require_open",
        "require_owner",
        "require_writable_from",
        "rows_by_batch",
        "scatter",
        "start_over_after_fork",
        "watched_calls",
    },
}
"""Classes whose methods the reference lists one by one, and which of them are for subclasses, for
other parts of kvheap, or for code that was written for LMCache."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_in(languages: set[str]) -> list[DocBlock]:
    return [block for page in PAGES for block in blocks_of(page) if block.language in languages]


def sessions() -> Iterator[list[DocBlock]]:
    """The blocks of Python, each with those that go on with it."""
    session: list[DocBlock] = []
    for block in blocks_in({"python"}):
        if session and not (block.continues and block.page == session[0].page):
            yield session
            session = []
        session.append(block)
    yield session


def place(block: DocBlock) -> str:
    return f"{name_of(block.page)}:{block.line}"


@pytest.fixture(scope="module", autouse=True)
def _no_colours() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_COLOR", "1")
        patch.setenv("COLUMNS", "200")
        yield


@pytest.mark.parametrize("session", list(sessions()), ids=lambda session: place(session[0]))
def test_a_block_of_python_runs(
    session: list[DocBlock], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in session:
        if block.not_run is not None:
            pytest.skip(f"{place(block)}: {block.not_run}")
        if block.needs is not None:
            if os.environ.get(f"KVHEAP_REQUIRE_{block.needs.upper()}"):
                __import__(block.needs)
            pytest.importorskip(block.needs, reason=f"{place(block)} needs {block.needs}")
        # Its lines have the numbers that they have on the page.
        code = compile("\n" * (block.line - 1) + block.code, place(block), "exec")
        printed = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
            warnings.simplefilter("error")
            exec(code, namespace)
        if block.expected is not None:
            example = doctest.Example("", block.expected)
            if not CHECKER.check_output(block.expected, printed.getvalue(), FLAGS):
                difference = CHECKER.output_difference(example, printed.getvalue(), FLAGS)
                pytest.fail(f"{place(block)} prints something else\n{difference}", pytrace=False)


def test_every_block_is_run_or_says_why_not() -> None:
    for page in PAGES:
        for block in blocks_of(page):
            assert block.language in LANGUAGES, place(block)
            assert block.not_run is None or len(block.not_run) > 10, place(block)


@pytest.mark.parametrize("block", blocks_in(SHELLS), ids=place)
def test_a_block_of_shell_can_be_parsed(block: DocBlock) -> None:
    shell = ["bash", "-n"] if block.language == "bash" else ["sh", "-n"]
    ended = subprocess.run(shell, input=block.code, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def kvheap_commands() -> list[tuple[str, list[str]]]:
    """Every call of ``kvheap`` in a block of shell or between backticks, up to what follows."""
    found = []
    for page in PAGES:
        blocks = [block.code for block in blocks_of(page) if block.language in SHELLS]
        inline = re.findall(r"`(kvheap [^`\n]+)`", page.read_text(encoding="utf-8"))
        for text in (*blocks, *inline):
            calls = re.findall(r"(?:^|/|&& )kvheap ([a-z]\w*[^|&\n]*)", text, re.MULTILINE)
            found += [(name_of(page), shlex.split(call, comments=True)) for call in calls]
    return found


def test_the_commands_have_the_options_that_pages_name() -> None:
    commands = kvheap_commands()
    assert len(commands) > 5
    helps: dict[str, str] = {}
    for page, (command, *arguments) in commands:
        if command not in helps:
            text = io.StringIO()
            with contextlib.redirect_stdout(text), pytest.raises(SystemExit) as end:
                main([command, "--help"])
            assert end.value.code == 0, f"{page}: there is no 'kvheap {command}'"
            helps[command] = text.getvalue()
        known = set(re.findall(r"--[\w-]+", helps[command]))
        unknown = {word for word in arguments if word.startswith("--")} - known - {"--help"}
        assert not unknown, f"{page}: 'kvheap {command}' has no {unknown}"


def error_classes() -> set[str]:
    """The names of all exceptions that are defined in kvheap, read from the source."""
    bases: dict[str, list[str]] = {}
    for folder in ("allocator", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    names = [ast.unparse(base).rpartition(".")[2] for base in node.bases]
                    bases[node.name] = names
    found: set[str] = set()
    ends = ("Error", "Exception", "Warning")
    while True:
        more = {
            name
            for name, of in bases.items()
            if any(base.endswith(ends) or base in found for base in of)
        }
        if more == found:
            return {name for name in found if not name.startswith("_")}
        found = more


def test_every_error_has_a_section() -> None:
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    sections = re.findall(r"^#+ `(\w+)`$", text, re.MULTILINE)
    assert len(sections) == len(set(sections))
    own = {name for name in sections if name not in {"ValueError", "TypeError", "None"}}
    assert own == error_classes() - LEFT_OUT.keys()
    assert LEFT_OUT.keys() <= error_classes()


def test_the_sections_say_where_errors_are_imported_from() -> None:
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    for name, section in re.findall(
        r"^### `(\w+)`\n(.*?)(?=^##|\Z)", text, re.DOTALL | re.MULTILINE
    ):
        named = re.search(r"^In `(kvheap[\w.]+)`", section, re.MULTILINE)
        error = getattr(import_module(named[1] if named else "kvheap"), name)
        for base in re.findall(r"(?:An?|, an?) `(\w+Error)`[.:,]", section.replace("\n", " ")):
            bases = {kind.__name__ for kind in error.__mro__}
            assert base in bases, f"{name} is no {base}"


def test_every_public_name_is_in_the_reference() -> None:
    import kvheap

    pages = (ROOT / "docs" / "api").glob("*.md")
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    listed = set(re.findall(r"^::: kvheap\.(\w+)$", text, re.MULTILINE))
    listed |= {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)}
    missing = {name for name in kvheap.__all__ if name != "__version__"} - listed
    assert not missing


@pytest.mark.parametrize("name", INSIDE)
def test_every_method_is_in_the_reference(name: str) -> None:
    import kvheap

    pages = (ROOT / "docs" / "api").glob("*.md")
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    listed = set(re.findall(rf"^::: kvheap\.{name}\.(\w+)$", text, re.MULTILINE))
    # Methods that are functions of another module.
    listed |= set(re.findall(r"^::: kvheap\.engine\.chunks\.(\w+)$", text, re.MULTILINE))
    there = {method for method in dir(getattr(kvheap, name)) if not method.startswith("_")}
    missing = there - listed - INSIDE[name]
    assert not missing, "they belong under docs/api/, by purpose; or, if not for users, in INSIDE"
    assert there >= INSIDE[name]


def test_the_picture_is_what_its_script_draws() -> None:
    draw = runpy.run_path(str(ROOT / "docs" / "overview.py"))["draw"]
    assert (ROOT / "docs" / "overview.svg").read_text(encoding="utf-8") == draw()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)\s#]+)(?:#[^)\s]*)?\)", text):
        found = (page.parent / target).resolve()
        if found.parent == ROOT / "docs" and not found.exists():
            # A page of the site that stands elsewhere in the repository.
            pytest.fail(f"{name_of(page)} leads to {target}, which is not there", pytrace=False)
        assert found.exists(), f"{name_of(page)} leads to {target}"

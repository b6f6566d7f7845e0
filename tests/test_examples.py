"""Every example runs, checks itself, and says how it is used."""

from __future__ import annotations

import ast
import os
import runpy
import sys
import warnings
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))

ARGUMENTS = {
    "async_offload": ["--requests", "4", "--blocks", "20"],
    "paged_cache": ["--tokens", "300", "--blocks", "24", "--layers", "2"],
    "prefix_cache": ["--chunks", "150", "--sessions", "20", "--policy", "s3fifo"],
    "transformers_prefix_store": ["--prompts", "3"],
    "two_processes": ["--blocks", "4"],
}
"""Less work than the scripts do by default."""

NEEDS = {"transformers_prefix_store": "transformers"}


def need_package(script: Path) -> None:
    """Skip the test where an optional package is missing, unless that one is required here."""
    package = NEEDS.get(script.stem)
    if package is not None and not os.environ.get(f"KVHEAP_REQUIRE_{package.upper()}"):
        pytest.importorskip(package, reason=f"the example needs {package}", exc_type=ImportError)


def run(script: Path, *arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("error", module=script.stem)
        patch.setattr(sys, "argv", [str(script), *arguments])
        runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_an_example_runs(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need_package(script)
    run(script, *ARGUMENTS[script.stem])
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_an_example_says_how_it_is_used(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need_package(script)
    with pytest.raises(SystemExit) as end:
        run(script, "--help")
    assert end.value.code == 0
    text = capsys.readouterr().out
    summary = (ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "").split("\n")
    assert text.startswith("usage:")
    assert summary[0] in text


def test_without_its_package_an_example_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for script in EXAMPLES:
        if package := NEEDS.get(script.stem):
            absent = ModuleNotFoundError(f"No module named {package!r}", name=package)
            finder = type("Finder", (), {"find_spec": raises(package, absent)})
            monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
            monkeypatch.delitem(sys.modules, package, raising=False)
            with pytest.raises(SystemExit, match=f"pip install {package}$"):
                run(script, "--help")


def raises(package: str, error: ImportError) -> object:
    def find_spec(name: str, *_: object) -> None:
        if name == package:
            raise error

    return staticmethod(find_spec)


def test_each_is_tried_with_arguments_of_its_own() -> None:
    assert {script.stem for script in EXAMPLES} == ARGUMENTS.keys()
    page = (EXAMPLES[0].parent.parent / "docs" / "examples.md").read_text(encoding="utf-8")
    assert all(f"(../examples/{script.name})" in page for script in EXAMPLES)

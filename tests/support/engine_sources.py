"""What an installed package defines, read from its sources without importing it."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable
from pathlib import Path


def folder_of(package: str) -> Path:
    """Where a package is installed."""
    spec = importlib.util.find_spec(package)
    assert spec is not None, package
    assert spec.submodule_search_locations is not None, package
    return Path(spec.submodule_search_locations[0])


def files_with(folder: Path, text: str) -> set[str]:
    """The source files under ``folder`` that contain ``text``."""
    wanted = text.encode()
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.py")
        if wanted in path.read_bytes()
    }


def classes_from(folder: Path, base: str) -> set[str]:
    """The names of the classes under ``folder`` that derive from ``base``; tests are left out."""
    bases: dict[str, set[str]] = {}
    for path in folder.rglob("*.py"):
        if path.name.startswith("test_"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = {ast.unparse(of).rpartition(".")[2] for of in node.bases}
    found: set[str] = set()
    while more := {name for name, of in bases.items() if of & {base, *found}} - found:
        found |= more
    return found


def assert_known(what: str, found: Iterable[str], known: Iterable[str], version: str) -> None:
    """Fail if the engine has more or less than what was known, and name it."""
    new, gone = sorted(set(found) - set(known)), sorted(set(known) - set(found))
    assert not new, (
        f"{what} that were not there in {version}: {new}; read how they keep the KV of a token, "
        "add a case, and put them on the list"
    )
    assert not gone, f"{what} of {version} that are gone: {gone}; take them off the list"

"""A built wheel, installed outside the checkout, is whole and stays under one name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {
    "kvheap": ROOT / "allocator",
    "kvheap/benchmarks": ROOT / "benchmarks",
    "kvheap/kernels": ROOT / "kernels",
}

IMPORT_ALL = """
import importlib, pathlib, pkgutil, sys
import kvheap
assert pathlib.Path(kvheap.__file__).is_relative_to(sys.argv[1]), kvheap.__file__
for name in kvheap.__all__:
    getattr(kvheap, name)
for module in pkgutil.walk_packages(kvheap.__path__, "kvheap."):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib" and not (error.name or "").startswith("vllm"):
            raise  # those are extras
"""


DATA = ("py.typed", "metrics/dashboard.json", "snapshots/page.html")
"""Files of the package that are no modules."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel of a copy of the sources was installed."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "results")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    run = {"check": True, "cwd": folder, "stdout": subprocess.DEVNULL}
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"]
    subprocess.run([*build, "source"], **run)
    (wheel,) = (folder / "dist").glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target"]
    subprocess.run([*install, "site", str(wheel)], **run)
    return folder / "site"


def test_every_module_is_in_it(site: Path) -> None:
    for package, folder in SOURCES.items():
        for source in folder.rglob("*.py"):
            assert (site / package / source.relative_to(folder)).is_file(), source
    for name in DATA:
        assert (site / "kvheap" / name).is_file(), name


def test_every_module_can_be_imported_outside_the_checkout(site: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(site), "MPLBACKEND": "agg"}
    command = [sys.executable, "-c", IMPORT_ALL, str(site)]
    subprocess.run(command, check=True, cwd=site.parent, env=environment)


def test_the_command_finds_the_benchmarks(site: Path) -> None:
    code = "from kvheap.cli.scripts import find_scripts; print(find_scripts())"
    environment = os.environ | {"PYTHONPATH": str(site)}
    run = {"cwd": site.parent, "env": environment, "text": True, "check": True}
    found = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, **run).stdout
    assert Path(found.strip()) == site / "kvheap" / "benchmarks"


def test_it_installs_no_other_top_level_name(site: Path) -> None:
    names = {path.name for path in site.iterdir() if path.suffix != ".dist-info"}
    assert names - {"bin"} == {"kvheap"}

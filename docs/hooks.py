"""What mkdocs does besides: pages and pictures that live outside ``docs/``, and no network.

In the files of ``docs/``, links lead to where things are in the repository, such as
``../benchmarks/NOTES.md``, so that they work there too. In the site they lead to the pages below.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

LOG = logging.getLogger("mkdocs.hooks.kvheap")

ROOT = Path(__file__).parent.parent
RESULTS = "benchmarks/results/"
PAGES = {
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/NOTES.md": "notes.md",
}
"""Files of the repository that are pages of the site."""

LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)\s#]+)(#[^)\s]*)?\)")
LOADED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc\s*=\s*["']?(https?:)?//"""
    r"""|<link\b(?![^>]*rel=["']?(?:canonical|next|prev))[^>]*\bhref\s*=\s*["']?(https?:)?//""",
    re.IGNORECASE,
)
RAW = re.compile(
    r":(?:meth|class|func|mod|data|attr|exc):(?:<code>|`)|<p>=====|<blockquote>\s*<blockquote>"
)
"""What a docstring looks like that was not turned into Markdown; ``>>>`` are nested quotations."""

LOADED_BY_CSS = re.compile(r"""(?:@import\s+|url\()\s*["']?(?:https?:)?//""", re.IGNORECASE)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and pictures from outside ``docs/``."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for example in sorted((ROOT / "examples").glob("*.py")):
        text = f"# {example.stem}\n\n```python\n{example.read_text(encoding='utf-8')}```\n"
        page = File.generated(config, f"examples/{example.stem}.md", content=text)
        files.append(page)
    for picture in sorted((ROOT / RESULTS).rglob("*.png")):
        name = picture.relative_to(ROOT / RESULTS)
        files.append(File.generated(config, f"pictures/{name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to files of the repository into links to pages of the site."""
    where = {page: Path(source).parent for source, page in PAGES.items()}.get(page.file.src_uri)
    folder = ROOT / ("docs" if where is None else where) / Path(page.file.src_uri).parent

    def link(found: re.Match[str]) -> str:
        target = (folder / found[1]).resolve()
        if not target.is_relative_to(ROOT):
            return found[0]
        name = target.relative_to(ROOT).as_posix()
        if name in PAGES:
            name = PAGES[name]
        elif name.startswith(RESULTS) and name.endswith(".png"):
            name = "pictures/" + name.removeprefix(RESULTS)
        elif name.startswith("examples/") and name.endswith(".py"):
            name = name.removesuffix(".py") + ".md"
        elif name.startswith("docs/"):
            name = name.removeprefix("docs/")
        elif (ROOT / name).exists():
            LOG.warning("%s links to %s, which the site does not have", page.file.src_uri, name)
        up = "../" * page.file.src_uri.count("/")
        return f"]({up}{name}{found[2] or ''})"

    # Not in code: a list of tensors [x](y) is no link.
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts)


def on_post_build(config: Any, **_: Any) -> None:
    """Warn, which fails a strict build, of pages that need a network or show raw docstrings."""
    site = Path(config.site_dir)
    for path in sorted(site.rglob("*.html")):
        text = path.read_text(encoding="utf-8")
        for wrong, pattern in (("loads from a network", LOADED), ("shows raw text", RAW)):
            found = pattern.search(text)
            if found:
                LOG.warning("%s %s: %s", path.relative_to(site), wrong, found[0])
    for path in sorted(site.rglob("*.css")):
        found = LOADED_BY_CSS.search(path.read_text(encoding="utf-8"))
        if found:
            LOG.warning("%s loads from a network: %s", path.relative_to(site), found[0])

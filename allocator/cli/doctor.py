"""``kvheap doctor``: prints what this machine has for kvheap, and what is missing."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvheap import __version__
from kvheap.doctor.examine import conclusions, examine
from kvheap.doctor.finding import Finding

__all__ = ["run"]

STYLES = {"ok": "green", "absent": "dim", "untested": "yellow", "wrong": "bold red"}


def run(options: argparse.Namespace) -> int:
    """Run the command with these options; returns the exit status: 1 if something is wrong."""
    findings = examine()
    said = conclusions(findings)
    is_fit = all(finding.state != "wrong" for finding in findings)
    if options.json:
        print(
            json.dumps(
                {
                    "kvheap": __version__,
                    "fit": is_fit,
                    "uses": said,
                    "findings": [asdict(finding) for finding in findings],
                },
                indent=1,
            )
        )
    else:
        _print(findings, said, is_fit)
    return 0 if is_fit else 1


def _print(findings: Sequence[Finding], said: Sequence[str], is_fit: bool) -> None:
    console = Console()
    console.print(Text(f"kvheap {__version__} on this machine", style="bold"))
    table = Table.grid(padding=(0, 2))
    for _ in range(3):
        table.add_column(overflow="fold")
    topic = ""
    for finding in findings:
        if finding.topic != topic:
            topic = finding.topic
            table.add_row()
            table.add_row("", Text(topic, style="bold"))
        # Text: paths and commands may contain square brackets.
        found = Text(finding.found)
        if finding.remedy:
            found.append(f"\n-> {finding.remedy}", style="cyan")
        state = Text(finding.state, style=STYLES[finding.state])
        table.add_row(state, Text(finding.name), found)
    console.print(table)
    console.print()
    for sentence in said:
        console.print(Text(sentence))
    if is_fit:
        console.print(Text("Nothing that kvheap needs here is missing."))
    else:
        names = ", ".join(finding.name for finding in findings if finding.state == "wrong")
        console.print(Text(f"To be mended: {names}.", style="bold red"))

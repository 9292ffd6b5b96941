"""The measured part of docs/explanation/performance.md is written by the benchmark, not by hand."""

from __future__ import annotations

import json
import platform
import sqlite3
import subprocess
from collections.abc import Sequence
from pathlib import Path

from bench.contestants import ROOT
from bench.table import WORKS, Result, table

PAGE = ROOT / "docs" / "explanation" / "performance.md"
BEGIN = "<!-- measured: written by `make bench` -->\n"
END = "<!-- /measured -->"


def write_page(results: Sequence[Result]) -> None:
    """Replace what stands between the marks by the table of this session."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(
        f"{before}{BEGIN}\n{_session(results)}\n\n{table(results, WORKS)}\n\n{END}{after}"
    )


def read_results(file: Path) -> list[Result]:
    """The measurements of an earlier session."""
    return [Result(**json.loads(line)) for line in file.read_text().splitlines()]


def _session(results: Sequence[Result]) -> str:
    asked = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    rounds = max(result.round for result in results)
    return (
        f"{rounds} rounds at commit {asked.stdout.strip() or 'unknown'}, Python "
        f"{platform.python_version()}, SQLite {sqlite3.sqlite_version}; "
        "each cell is median [min..max]."
    )

"""The measured parts of docs/explanation/performance.md: written by the benchmark, not by hand."""

from __future__ import annotations

import json
import platform
import sqlite3
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from bench.contestants import ROOT, StoreKind
from bench.table import Result, table

PAGE = ROOT / "docs" / "explanation" / "performance.md"
ROUNDS_MIN = 5
_COMMANDS = {
    "drivers": "python -m bench.drivers --write",
    "api sqlite": "python -m bench.api --write",
    "api postgres": "python -m bench.api --postgres --write",
    "archive sqlite": "python -m bench.recovery archive --write",
    "archive postgres": "python -m bench.recovery archive --postgres --write",
    "sizes 250 sqlite": "python -m bench.recovery sizes --write",
    "sizes 250 postgres": "python -m bench.recovery sizes --postgres --write",
    "sizes 2000 sqlite": "python -m bench.recovery sizes --megabytes 2000 --write",
    "sizes 2000 postgres": "python -m bench.recovery sizes --megabytes 2000 --postgres --write",
}
"""What writes a part, where it is not `make bench`."""


def write_part(name: str, text: str) -> None:
    """Replace what stands between the marks of one part."""
    command = _COMMANDS.get(name, "make bench")
    begin, end = f"<!-- measured {name}: written by `{command}` -->\n", f"<!-- /{name} -->"
    before, found, rest = PAGE.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{PAGE} has no place marked {begin.strip()}")
    PAGE.write_text(f"{before}{begin}\n{text}\n\n{end}{after}")


def write_page(results: Sequence[Result], kind: StoreKind, *, server: str, note: str) -> None:
    """The table of a session, with what it was measured on."""
    text = f"{_session(results, kind, server=server, note=note)}\n\n{table(results, kind)}"
    write_part(kind, text)


def read_results(file: Path) -> list[Result]:
    """The measurements of an earlier session."""
    if not file.exists():
        return []
    return [Result(**json.loads(line)) for line in file.read_text().splitlines()]


def _session(results: Sequence[Result], kind: StoreKind, *, server: str, note: str) -> str:
    asked = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    rounds = max(result.round for result in results)
    is_few = rounds < ROUNDS_MIN
    store = f"SQLite {sqlite3.sqlite_version}" if kind == "sqlite" else f"PostgreSQL {server}"
    head = "**Preliminary**: " if is_few else ""
    text = (
        f"{head}{time.strftime('%Y-%m-%d')}, {rounds} round{'' if rounds == 1 else 's'} at commit "
        f"{asked.stdout.strip() or 'unknown'}, Python {platform.python_version()}, {store}; "
        "each cell is median [min..max]."
    )
    return f"{text} {note}." if note else text

"""Which driver, and which form of a batch: journal rows per second for 1 to 1,000 rows per commit.

    python -m bench.drivers [--rounds 5] [--seconds 0.4] [--write]

The decision to use asyncpg with arrays was made with it; psycopg is no dependency, it lives in an
environment of the benchmark (bench/peers/setup psycopg). Every cell is a process of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from statistics import median

from bench.contestants import ROOT, VENVS
from bench.database import Database
from bench.measure import canary
from bench.page import ROUNDS_MIN, write_part
from bench.rows import SIZES
from bench.table import align, show

FORMS = {
    "asyncpg": ("unnest", "executemany", "copy"),
    "psycopg": ("unnest", "executemany", "copy", "pipeline"),
}
PYTHONS = {"asyncpg": sys.executable, "psycopg": str(VENVS / "psycopg" / "bin" / "python")}
MODULES = {"asyncpg": "bench.rows_asyncpg", "psycopg": "bench.peers.psycopg_rows"}
Cells = dict[tuple[str, str, int], list[tuple[float, float, float]]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.drivers")
    parser.add_argument("--rounds", type=int, default=ROUNDS_MIN)
    parser.add_argument("--seconds", type=float, default=0.4, help="per cell")
    parser.add_argument("--write", action="store_true", help="into docs/explanation/performance.md")
    parser.add_argument("--note", default="", help="a sentence for the page")
    chosen = parser.parse_args()
    subprocess.run([ROOT / "bench" / "peers" / "setup", "psycopg"], check=True)
    database = Database()
    try:
        database.start()
        cells: Cells = {}
        for turn in range(1, chosen.rounds + 1):
            print(f"bench: round {turn} of {chosen.rounds}", file=sys.stderr, flush=True)
            one_round(database, cells, chosen.seconds)
        version = database.version()
    finally:
        database.server.stop()
    fsync_us = canary(ROOT / ".tools")["fsync_us"]
    head = "**Preliminary**: " if chosen.rounds < ROUNDS_MIN else ""
    note = f" {chosen.note}." if chosen.note else ""
    text = (
        f"{head}{time.strftime('%Y-%m-%d')}, median of {chosen.rounds}, PostgreSQL {version}, "
        f"fdatasync {fsync_us:.0f} us.{note}\n\n{table(cells)}"
    )
    print(text)
    if chosen.write:
        write_part("drivers", text)


def one_round(database: Database, cells: Cells, seconds: float) -> None:
    """Every form at every size, each on an empty table."""
    for size in SIZES:
        for driver, forms in FORMS.items():
            for form in forms:
                with database.fresh() as url:
                    cell = measure(database, driver, form, size=size, url=url, seconds=seconds)
                cells.setdefault((driver, form, size), []).append(cell)


def measure(
    database: Database, driver: str, form: str, *, size: int, url: str, seconds: float
) -> tuple[float, float, float]:
    """Rows per second, and processor us per row of the client and of the server."""
    command = [PYTHONS[driver], "-m", MODULES[driver], form, str(size), url, str(seconds)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "src")))},
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.readline().strip() != "READY":
            raise SystemExit(f"{driver} {form} did not start")
        probe = database.probe()
        process.stdin.write("GO\n")
        process.stdin.flush()
        rows, wall_s, cpu_s = map(float, process.stdout.readline().split())
        spent = probe.per_step(rows)
    return rows / wall_s, cpu_s / rows * 1e6, spent["pg_ms_step"] * 1e3


def table(cells: Cells) -> str:
    """Markdown: a line per form, rows per second; and processor time where batches are full."""
    rows = [
        ["driver and form", *(f"{size} rows/commit" for size in SIZES), "us/row at 100, ours + PG"]
    ]
    for driver, forms in FORMS.items():
        for form in forms:
            middles = [
                tuple(median(column) for column in zip(*cells[driver, form, size], strict=True))
                for size in SIZES
            ]
            at_100 = middles[SIZES.index(100)]
            cost = f"{at_100[1]:.1f} + {at_100[2]:.1f}"
            rows.append([f"{driver} {form}", *(show(middle[0]) for middle in middles), cost])
    return align(rows)


if __name__ == "__main__":
    main()

"""What backups and the stream archive cost, and how long getting back takes.

    python -m bench.recovery archive [--rounds 5] [--postgres] [--write]
    python -m bench.recovery sizes [--megabytes 250] [--rounds 1] [--postgres] [--write]

archive  W1 and W2 (see `bench/measure.py`) without a stream archive, with an asynchronous one, and
         with a synchronous one on the same disk and in memory, in turns; a second disk lies between
sizes    a store of so many megabytes: `llmo backup create`, `verify`, `prove`, `restore`, each as
         the process that an operator starts, and `restore --from-archive` out of segments alone;
         of a restore the time until it serves (behind it comes a backup for the archive to go on)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from bench.contestants import ROOT
from bench.database import Database
from bench.measure import canary
from bench.page import write_part
from bench.table import align, show

DATA = ROOT / ".tools" / "bench-data"
MEMORY = Path("/dev/shm")
MODES = ("off", "async", "sync", "sync, in memory")
GOALS = {"async": 5.0, "sync": 30.0, "sync, in memory": 30.0}
Found = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.recovery")
    parser.add_argument("what", choices=["archive", "sizes"])
    parser.add_argument("--megabytes", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=0, help="5 for archive, 1 for sizes")
    parser.add_argument("--postgres", action="store_true", help="on PostgreSQL, not SQLite")
    parser.add_argument("--write", action="store_true", help="into docs/explanation/performance.md")
    parser.add_argument("--note", default="", help="a sentence for the page")
    chosen = parser.parse_args()
    rounds = chosen.rounds or (5 if chosen.what == "archive" else 1)
    database = Database() if chosen.postgres else None
    DATA.mkdir(parents=True, exist_ok=True)
    found: Found = {}
    try:
        if database is not None:
            database.start()
        for turn in range(1, rounds + 1):
            print(f"bench: round {turn} of {rounds}", file=sys.stderr, flush=True)
            work = archive_round if chosen.what == "archive" else sizes_round
            work(found, database, chosen.megabytes)
    finally:
        if database is not None:
            database.server.stop()
    kind = "postgres" if chosen.postgres else "sqlite"
    rows = archive_rows(found) if chosen.what == "archive" else size_rows(found)
    fsync_us = canary(ROOT / ".tools")["fsync_us"]
    note = f" {chosen.note}." if chosen.note else ""
    size = "" if chosen.what == "archive" else f", a store of {chosen.megabytes} MB"
    text = (
        f"{time.strftime('%Y-%m-%d')}, {rounds} rounds on {kind}{size}, "
        f"fdatasync {fsync_us:.0f} us.{note}\n\n{align(rows)}"
    )
    print(text)
    if chosen.write:
        part = "archive" if chosen.what == "archive" else f"sizes {chosen.megabytes}"
        write_part(f"{part} {kind}", text)


# -- what the archive costs -----------------------------------------------------------------------


def archive_round(found: Found, database: Database | None, _: int) -> None:
    """Every mode once, for both workloads."""
    for work in ("W1", "W2"):
        for mode in MODES:
            with place(database) as (folder, url), elsewhere(mode) as archive:
                words = [work, "--folder", str(folder), "--store", url]
                if mode != "off":
                    words += ["--archive", str(archive), "--mode", mode.partition(",")[0]]
                done = run(sys.executable, "-m", "bench.ours", *words)
                fields = json.loads(done.splitlines()[-1])
                key = "steps_s" if work == "W1" else "ms_step"
                found.setdefault(f"{work} {mode}", []).append(fields[key])
                found.setdefault(f"{work} {mode} cpu", []).append(fields["cpu_ms_step"])


def archive_rows(found: Found) -> list[tuple[str, ...]]:
    head = ("archive", "W1, steps/s", "against off", "goal", "W1, processor ms/step")
    rows: list[tuple[str, ...]] = [(*head, "W2, ms per step", "W2, processor ms/step")]
    base = found["W1 off"]
    for mode in MODES:
        values = found[f"W1 {mode}"]
        ratios = [100 * (one / zero - 1) for one, zero in zip(values, base, strict=True)]
        goal = f">= -{GOALS[mode]:g} %" if mode in GOALS else ""
        cost = f"{median(ratios):+.0f} % [{min(ratios):+.0f}..{max(ratios):+.0f}]"
        cells = (mode, spread(values), "" if mode == "off" else cost, goal)
        others = (f"W1 {mode} cpu", f"W2 {mode}", f"W2 {mode} cpu")
        rows.append((*cells, *(spread(found[name]) for name in others)))
    return rows


@contextlib.contextmanager
def elsewhere(mode: str) -> Iterator[Path]:
    """A folder for segments: on the disk of the store, or in memory."""
    parent = MEMORY if mode.endswith("memory") else DATA
    with tempfile.TemporaryDirectory(prefix="llmo-archive-", dir=parent) as text:
        yield Path(text)


# -- how long getting back takes ------------------------------------------------------------------


def sizes_round(found: Found, database: Database | None, megabytes: int) -> None:
    """One store: filled, backed up, verified, proved, destroyed, restored; twice."""
    with place(database) as (folder, url), elsewhere("") as archive:
        environment = {
            "LLM_ORCHESTRATOR_URL": url,
            "LLM_ORCHESTRATOR_DATA": str(folder / "data"),
            "LLM_ORCHESTRATOR_CONFIG": str(folder / "settings.toml"),
        }
        (folder / "settings.toml").write_text(f'archive_place = "{archive}"\n')
        fill = ("-m", "bench.fill", "--store", url, "--megabytes", str(megabytes))
        run(sys.executable, *fill, "--archive", str(archive))
        found.setdefault("segments, MB", []).append(size_mb(archive))

        def llmo(name: str, *words: str) -> None:
            started, before = time.monotonic(), os.times()
            said = run(sys.executable, "-m", "llm_orchestrator", *words, environment=environment)
            took_s, after = time.monotonic() - started, os.times()
            cpu_s = after.children_user + after.children_system
            cpu_s -= before.children_user + before.children_system
            is_restore = words[0] == "restore"
            found.setdefault(name, []).append(json.loads(said)["took_s"] if is_restore else took_s)
            found.setdefault(f"{name} cpu", []).append(cpu_s)
            print(f"bench: {name}: {took_s:.1f} s", file=sys.stderr, flush=True)

        llmo("create", "backup", "create")
        found.setdefault("file, MB", []).append(size_mb(folder / "data" / "backups"))
        llmo("verify", "backup", "verify")
        llmo("prove", "backup", "prove")
        destroy(url, database)
        llmo("restore", "restore", "--yes", "--json")
        destroy(url, database)
        for file in (folder / "data" / "backups").iterdir():
            file.unlink()
        old = next(iter(sorted((archive / "segments").iterdir(), key=_mtime)))
        keep_only(archive, old.name)
        llmo("restore --from-archive", "restore", "--from-archive", "--yes", "--json")


def keep_only(archive: Path, stream: str) -> None:
    """Only the stream that filled the store: what a disaster right after it would leave."""
    for folder in (archive / "segments").iterdir():
        if folder.name != stream:
            shutil.rmtree(folder)


def _mtime(path: Path) -> float:
    return path.stat().st_mtime


def destroy(url: str, database: Database | None) -> None:
    """Nothing of the store is left."""
    if database is not None:
        database.server.psql('DROP DATABASE :"name" WITH (FORCE)', name=url.rpartition("/")[2])
        return
    file = Path(url.removeprefix("sqlite:///"))
    for path in file.parent.glob(f"{file.name}*"):
        path.unlink()


def size_rows(found: Found) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("what", "seconds", "processor s of the command")]
    rows += [
        (name, spread(values), spread(found[f"{name} cpu"]))
        for name, values in found.items()
        if f"{name} cpu" in found
    ]
    rows += [(name, spread(values), "") for name, values in found.items() if name.endswith("MB")]
    return rows


# -- small ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def place(database: Database | None) -> Iterator[tuple[Path, str]]:
    """A folder, and the URL of a fresh store."""
    with tempfile.TemporaryDirectory(prefix="recovery-", dir=DATA) as text:
        folder = Path(text)
        if database is None:
            yield folder, f"sqlite:///{folder / 'live' / 'runs.db'}"
            return
        with database.fresh() as url:
            yield folder, url


def run(*words: str, environment: dict[str, str] | None = None) -> str:
    """What a command prints; its failure ends the benchmark."""
    done = subprocess.run(
        words,
        env={**os.environ, **(environment or {})},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"bench: {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def size_mb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def spread(values: list[float]) -> str:
    if len(values) == 1:
        return show(values[0])
    return f"{show(median(values))} [{show(min(values))}..{show(max(values))}]"


if __name__ == "__main__":
    main()

"""Where our processor time goes: one workload in this process, a profile per thread.

The profiler slows small functions more than large ones: read it for proportions, not for seconds.
It begins without the profiler and counts how often the event loop turns.
"""

from __future__ import annotations

import asyncio
import cProfile
import pstats
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from bench.contestants import CONTESTANTS, ROOT, StoreKind
from bench.database import Database
from bench.ours import work_on
from llm_orchestrator.config import Config

LINES = 40


def profile(work: str, kind: StoreKind) -> None:
    """Print a table per thread, the busiest functions first."""
    data = ROOT / ".tools" / "bench-data"
    data.mkdir(parents=True, exist_ok=True)
    database = Database() if kind == "postgres" else None
    try:
        if database is not None:
            database.start()
        fresh = database.fresh() if database is not None else nullcontext("")
        with tempfile.TemporaryDirectory(dir=data) as folder, fresh as found:
            url = found or f"sqlite:///{folder}/ours.db"
            _profile(work, kind, url=url, folder=Path(folder))
    finally:
        if database is not None:
            database.server.stop()


def _profile(work: str, kind: StoreKind, *, url: str, folder: Path) -> None:
    profiles: dict[str, cProfile.Profile] = {}
    run = threading.Thread.run

    def run_profiled(thread: threading.Thread) -> None:
        profiles[thread.name] = cProfile.Profile()
        profiles[thread.name].runcall(run, thread)

    runs = CONTESTANTS[kind][0].runs.get(work, 0)
    config = Config(data_dir=folder / "data")
    with _count_turns() as turns:
        plain = asyncio.run(work_on(work, url, runs=runs, config=config))
    print(f"{work} as it is: {plain}")
    if "steps" in plain:
        print(f"turns of the event loop per step, all in all: {turns[0] / plain['steps']:.2f}")
    threading.Thread.run = run_profiled  # type: ignore[method-assign, assignment]
    profiles["event loop"] = cProfile.Profile()
    try:
        job = work_on(work, url, runs=runs, config=config)
        done = profiles["event loop"].runcall(asyncio.run, job)
    finally:
        threading.Thread.run = run  # type: ignore[method-assign]
    print(f"{work} under the profiler: {done}")
    for name, one in profiles.items():
        print(f"\n== {name}")
        pstats.Stats(one, stream=sys.stdout).sort_stats("tottime").print_stats(LINES)


@contextmanager
def _count_turns() -> Iterator[list[int]]:
    """How often an event loop of this process has looked for what is ready: [times]."""
    turns = [0]
    run_once = asyncio.BaseEventLoop._run_once  # type: ignore[attr-defined]  # noqa: SLF001

    def counted(loop: asyncio.BaseEventLoop) -> None:
        turns[0] += 1
        run_once(loop)

    asyncio.BaseEventLoop._run_once = counted  # type: ignore[attr-defined]  # noqa: SLF001
    try:
        yield turns
    finally:
        asyncio.BaseEventLoop._run_once = run_once  # type: ignore[attr-defined]  # noqa: SLF001

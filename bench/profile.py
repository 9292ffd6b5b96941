"""Where our processor time goes: one workload in this process, a profile per thread.

The profiler slows small functions more than large ones: read it for proportions, not for seconds.
"""

from __future__ import annotations

import asyncio
import cProfile
import pstats
import sys
import tempfile
import threading
from pathlib import Path

from bench.contestants import CONTESTANTS, ROOT
from bench.ours import work_on

LINES = 30


def profile(work: str) -> None:
    """Print a table per thread, the busiest functions first."""
    profiles: dict[str, cProfile.Profile] = {}
    run = threading.Thread.run

    def run_profiled(thread: threading.Thread) -> None:
        profiles[thread.name] = cProfile.Profile()
        profiles[thread.name].runcall(run, thread)

    data = ROOT / ".tools" / "bench-data"
    data.mkdir(parents=True, exist_ok=True)
    threading.Thread.run = run_profiled  # type: ignore[method-assign, assignment]
    profiles["event loop"] = cProfile.Profile()
    try:
        with tempfile.TemporaryDirectory(dir=data) as folder:
            runs = CONTESTANTS[0].runs.get(work, 0)
            job = work_on(work, Path(folder) / "ours.db", runs)
            done = profiles["event loop"].runcall(asyncio.run, job)
    finally:
        threading.Thread.run = run  # type: ignore[method-assign]
    print(f"{work}: {done}")
    for name, one in profiles.items():
        print(f"\n== {name}")
        pstats.Stats(one, stream=sys.stdout).sort_stats("tottime").print_stats(LINES)

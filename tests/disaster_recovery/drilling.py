"""One scenario of the drill at a time, with a load that leaves room for the other tests' machine.

Lost or doubled work fails a test, and so does whatever else was promised. Time does not: a goal
that is missed is printed. `make drill` measures, at full load. Run with -s to follow what happens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DISASTER = [pytest.mark.serial, pytest.mark.timeout(600)]
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root: network namespaces")
_LATE = "recovery took"
_SMALL = (
    "load.in_flight=24",
    "load.ask_ms=1000",
    "load.words=10",
    "load.word_ms=300",
    "baseline.seconds=1",
    "baseline.cpu_percent_max=1000",
)


def carry_out(
    scenario: str, data: Path, *more: str, against: str = "single"
) -> tuple[int, dict[str, Any]]:
    """One run of a scenario, `more` overriding it: the exit code, and the result file."""
    sets = [word for value in (*_SMALL, *more) for word in ("--set", value)]
    words = ["drill", "run", scenario, "--repeat=1", f"--against={against}", *sets]
    done = subprocess.run(
        [sys.executable, "-m", "llm_orchestrator", *words, "--data", str(data)],
        check=False,
        timeout=500,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    result = json.loads((data / "drills" / "results" / f"{scenario}.json").read_text())
    return done.returncode, dict(result)


def drill(scenario: str, data: Path, *more: str, against: str = "single") -> dict[str, Any]:
    """Carry out a scenario once; its only run, all promises kept."""
    code, result = carry_out(scenario, data, *more, against=against)
    assert code in (0, 6), f"exit code {code}"
    (run,) = result["runs"]
    assert not run["findings"]
    assert run["recovery_time_s"] is not None
    broken = [reason for reason in run["reasons"] if not reason.startswith(_LATE)]
    assert not broken
    goal_s = result["scenario"]["objectives"]["recovery_time_s"]
    print(f"\n{scenario}: {run['recovery_time_s']} s, the goal is {goal_s} s", *run["reasons"])
    return dict(run)

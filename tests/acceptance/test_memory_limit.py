"""Runs that would take more memory than the process has wait outside it, and all complete."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.acceptance.memory_child import ROUNDS

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 500
RUNS = 24


class Ended(NamedTuple):
    """A child that ended. `peak` in MiB."""

    code: int
    peak: float
    out: str
    err: str


def run_child(folder: Path, limit: int) -> Ended:
    """The most memory that the child ever had is the kernel's word."""
    command = [sys.executable, "-m", "tests.acceptance.memory_child", str(folder), str(limit)]
    with (folder / "out").open("w+") as out, (folder / "err").open("w+") as err:
        child = subprocess.Popen([*command, str(RUNS)], cwd=ROOT, stdout=out, stderr=err)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        return Ended(child.returncode, usage.ru_maxrss / 1024, out.read(), err.read())


@pytest.mark.serial
@pytest.mark.timeout(180)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_stays_below_its_limit_and_every_run_completes(tmp_path: Path) -> None:
    ended = run_child(tmp_path, LIMIT)
    assert ended.code == 0, ended.err
    assert ended.out.split() == [str(ROUNDS + number) for number in range(RUNS)]
    print(f"{RUNS} runs of {ROUNDS} MiB under {LIMIT} MiB: {ended.peak:.0f} MiB at most")
    assert ended.err.count("runs are let go") >= 1
    assert ended.peak < LIMIT


@pytest.mark.serial
@pytest.mark.timeout(180)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_without_the_watch_the_same_runs_take_more(tmp_path: Path) -> None:
    ended = run_child(tmp_path, 0)
    assert ended.code == 0, ended.err
    assert ended.peak > LIMIT, "the test above proves nothing"

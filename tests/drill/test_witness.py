"""The witness bites: one whole drill, and its evidence with one thing changed at a time.

The evidence is of a real node that was really killed. Nobody but the judge looks at the changed
copies, by the command that an auditor would use.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.serial, pytest.mark.timeout(300)]
Lines = list[dict[str, Any]]
SMALL = (
    "load.in_flight=12",
    "load.ask_ms=300",
    "load.words=10",
    "load.word_ms=150",
    "baseline.seconds=1",
    "baseline.cpu_percent_max=1000",
    "objectives.recovery_time_s=100",
    "limits.recover_s=100",
)


def llmo(data: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llm_orchestrator", "drill", *words, "--data", str(data)],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def overrides(*more: str) -> list[str]:
    return [word for value in (*SMALL, *more) for word in ("--set", value)]


@pytest.fixture(scope="module")
def drilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of a drill that passed."""
    data = tmp_path_factory.mktemp("drill")
    done = llmo(data, "run", "application_single_node_restart", *overrides())
    assert done.returncode == 0, done.stderr
    return data


def evidence(data: Path) -> Path:
    (found,) = data.glob("drills/*/application_single_node_restart/1")
    return found


def read(path: Path) -> Lines:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_node_that_is_killed_loses_nothing_and_leaves_evidence(drilled: Path) -> None:
    result = json.loads(
        (drilled / "drills/results/application_single_node_restart.json").read_text()
    )
    (run,) = result["runs"]
    assert run["status"] == "passed"
    assert run["affected_runs"] >= 10
    assert run["facts"]["exit_codes"] == [-9]
    assert 0 == run["marks"]["t0"] <= run["marks"]["t3"] < run["marks"]["t4"] < run["marks"]["t5"]
    assert run["marks"]["t5"] <= run["marks"]["t6"]
    assert run["recovery_time_s"] == run["marks"]["t5"]
    assert run["counts"]["runs_accepted"] > run["counts"]["probes"] > 0
    folder = evidence(drilled)
    sums = dict(line.split("  ")[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert {"witness.jsonl", "llm.jsonl", "node.log", "versions.json", "scenario.json"} <= set(sums)
    assert not (folder / "target").exists()
    again = llmo(drilled, "judge", str(folder))
    assert again.returncode == 0, again.stdout
    assert llmo(drilled, "report").returncode == 0
    assert "application_single_node_restart" in llmo(drilled, "history").stdout


def _a_load_run(lines: Lines) -> dict[str, Any]:
    """A run of the load that was not under way when the node was killed."""
    (window,) = [line for line in lines if line["event"] == "window"]
    early = {
        line["run"]
        for line in lines
        if line["event"] == "ended" and line["kind"] == "load" and line["at"] < window["from"]
    }
    late = [line for line in lines if line["event"] == "accepted" and line["at"] > window["until"]]
    late = [line for line in late if line["kind"] == "load"]
    done = {line["run"] for line in lines if line["event"] == "ended"}
    return next(
        line
        for line in (*late, *lines)
        if line["event"] == "accepted" and line["run"] in (done if line in late else early)
    )


def _doubled_call(lines: Lines, calls: Lines) -> None:
    run = _a_load_run(lines)
    call = next(c for c in calls if f"drill {run['key']} ask" in c.get("prompt", ""))
    end = next(c for c in calls if c["event"] == "ended" and c["id"] == call["id"])
    calls += [{**call, "id": "again", "at": end["at"] + 1}, {**end, "id": "again"}]


def _doubled_effect(lines: Lines, calls: Lines) -> None:
    effect = next(line for line in lines if line["event"] == "effect")
    lines.append({**effect, "id": effect["id"] + "-2"})


def _lost_run(lines: Lines, calls: Lines) -> None:
    run = _a_load_run(lines)["run"]
    lines[:] = [line for line in lines if not (line["event"] == "final" and line["run"] == run)]


def _stuck_run(lines: Lines, calls: Lines) -> None:
    run = _a_load_run(lines)["run"]
    lines[:] = [line for line in lines if not (line["event"] == "ended" and line["run"] == run)]


def _changed_entry(lines: Lines, calls: Lines) -> None:
    run = _a_load_run(lines)["run"]
    line = next(x for x in lines if x["event"] == "final" and x["run"] == run and x["seq"] == 3)
    line["digest"] = "0" * 64


def _wrong_output(lines: Lines, calls: Lines) -> None:
    run = _a_load_run(lines)["run"]
    line = next(x for x in lines if x["event"] == "ended" and x["run"] == run)
    line["output"] = {"said": "what another run says"}


def _failed_run(lines: Lines, calls: Lines) -> None:
    run = _a_load_run(lines)["run"]
    line = next(x for x in lines if x["event"] == "ended" and x["run"] == run)
    line |= {"state": "failed", "output": None}


def _step_finished_twice(lines: Lines, calls: Lines) -> None:
    run = _a_load_run(lines)["run"]
    of_run = [x for x in lines if x["event"] == "final" and x["run"] == run]
    line = next(x for x in of_run if x["kind"] == "step_finished")
    lines.append({**line, "seq": max(x["seq"] for x in of_run) + 1})


def _two_writers(lines: Lines, calls: Lines) -> None:
    run = _a_load_run(lines)["run"]
    of_run = [x for x in lines if x["event"] == "final" and x["run"] == run]
    last = max(of_run, key=lambda x: int(x["seq"]))
    lines.append({**last, "seq": last["seq"] + 1, "epoch": last["epoch"] - 1, "kind": "state"})


def _claimed_twice(lines: Lines, calls: Lines) -> None:
    run = _a_load_run(lines)["run"]
    of_run = [x for x in lines if x["event"] == "final" and x["run"] == run]
    claim = next(x for x in of_run if x["kind"] == "claimed")
    last = max(of_run, key=lambda x: int(x["seq"]))
    lines.append({**claim, "seq": last["seq"] + 1, "epoch": last["epoch"]})


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (_doubled_call, "paid_twice|twice"),
        (_doubled_effect, "effect_twice"),
        (_lost_run, "lost"),
        (_stuck_run, "lost"),
        (_changed_entry, "lost"),
        (_wrong_output, "wrong"),
        (_failed_run, "wrong"),
        (_step_finished_twice, "twice"),
        (_two_writers, "two_writers"),
        (_claimed_twice, "two_writers"),
    ],
)
def test_whatever_is_broken_is_found(
    drilled: Path, tmp_path: Path, change: Callable[[Lines, Lines], None], kind: str
) -> None:
    lines = read(evidence(drilled) / "witness.jsonl")
    calls = read(evidence(drilled) / "llm.jsonl")
    change(lines, calls)
    for name, some in {"witness.jsonl": lines, "llm.jsonl": calls}.items():
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in some))
    done = llmo(drilled, "judge", str(tmp_path))
    assert done.returncode == 8, done.stdout
    found = {finding["kind"] for finding in json.loads(done.stdout)["findings"]}
    assert found & set(kind.split("|")), found


def test_what_a_fault_excuses_is_no_finding(drilled: Path) -> None:
    """The drill above repeated calls, and it passed: a kill has its price, and it is printed."""
    done = json.loads(llmo(drilled, "judge", str(evidence(drilled))).stdout)
    assert done["respent"]["calls"] + done["respent"]["refused_calls"] > 0
    assert done["findings"] == []


def test_a_baseline_that_is_not_well_touches_nothing(drilled: Path, tmp_path: Path) -> None:
    done = llmo(
        tmp_path,
        "run",
        "application_single_node_restart",
        *overrides("baseline.cpu_percent_max=0.0001"),
    )
    assert done.returncode == 7, done.stderr
    (run,) = json.loads(
        (tmp_path / "drills/results/application_single_node_restart.json").read_text()
    )["runs"]
    assert run["status"] == "inconclusive"
    assert run["facts"]["exit_codes"] == []
    assert "t0" not in run["marks"]


def test_a_goal_that_is_missed_is_no_loss(tmp_path: Path) -> None:
    done = llmo(
        tmp_path,
        "run",
        "application_single_node_restart",
        *overrides("objectives.recovery_time_s=0.0001"),
    )
    assert done.returncode == 6, done.stderr
    assert "the goal is 0.0001 s" in done.stderr

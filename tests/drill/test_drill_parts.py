"""The drill engine's parts: scenarios, marks, results, the dead-man timer."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill import report as reports
from llm_orchestrator.drill import report_detail as detail
from llm_orchestrator.drill import report_plot as plots
from llm_orchestrator.drill.campaign import SCHEMA, summary, write_json
from llm_orchestrator.drill.deadman import DeadMan
from llm_orchestrator.drill.lab_process import wait
from llm_orchestrator.drill.load import Shape, order, probe, workflows
from llm_orchestrator.drill.marks import Marks, disorder_of
from llm_orchestrator.drill.metrics import Board, as_text
from llm_orchestrator.drill.objectives import standings
from llm_orchestrator.drill.run import Drill
from llm_orchestrator.drill.scenario import load_all, load_one, parse
from llm_orchestrator.drill.single import SingleTarget
from llm_orchestrator.errors import ConfigError, NotFound
from llm_orchestrator.language.load import load_text
from llm_orchestrator.language.steps import LLMStep

SOUND = """\
id: sound
class: application
title: Something breaks
needs: [single]
faults: [{kind: process_kill}]
objectives: {recovery_time_s: 3}
"""


def test_every_scenario_is_sound_and_has_the_load_that_is_promised() -> None:
    assert load_all()
    for name in load_all():
        scenario = load_one(name)
        assert scenario.load.in_flight >= 200, name
        assert scenario.baseline.cpu_percent_max <= 80, name


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (SOUND + "objectivs: {}\n", "objectivs"),
        (SOUND.replace("recovery_time_s", "recovery_tim_s"), "recovery_tim_s"),
        (SOUND.replace("id: sound", "id: Not-Snake"), "id"),
        (SOUND.replace("class: application", "class: weather"), "class"),
        (SOUND + "measure_from: heal\n", "needs `heal`"),
        (SOUND.replace("[{kind: process_kill}]", "[]"), "faults"),
        (SOUND + 'load: {in_flight: "200"}\n', "in_flight"),
    ],
)
def test_a_scenario_that_says_something_unknown_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse(text, "sound")


def test_overrides_reach_a_part_and_are_checked_like_the_file() -> None:
    assert parse(SOUND, "sound", ["load.in_flight=7"]).load.in_flight == 7
    for wrong in ("load.in_fligth=7", "load.in_flight=many", "nothing", "id.x=1"):
        with pytest.raises(ConfigError):
            parse(SOUND, "sound", [wrong])
    with pytest.raises(NotFound):
        load_one("no_such_disaster")


def test_recovery_runs_from_the_fault_or_from_its_end() -> None:
    marks = Marks()
    assert "t5" not in marks.at_s
    assert Marks().recovery_time_s is None
    for name, at_s in {"t0": 10.0, "heal": 12.0, "t4": 13.0, "t5": 13.5}.items():
        marks.put(name, at_s)
    marks.put("t5", 99.0)
    marks.take([(9.0, "t1"), (10.5, "t1"), (11.0, "t1"), (11.0, "t2")])
    assert marks.recovery_time_s == 3.5
    assert marks.relative()["t1"] == 0.5
    assert marks.parts() == {"detect": 0.5, "decide": 0.5, "verify": 0.5}
    marks.measure_from = "heal"
    assert marks.recovery_time_s == 1.5
    with pytest.raises(ValueError, match="t9"):
        marks.put("t9", 1.0)


def test_marks_that_contradict_each_other_are_a_fault_of_the_drill(tmp_path: Path) -> None:
    order = {"t0": 0.0, "t1": 1.0, "t2": 1.0, "t3": 20.0, "t4": 20.5, "t5": 21.0, "t6": 30.0}
    assert disorder_of(order) == []
    assert disorder_of({**order, "t4": 0.1}) == [], "another node went on"
    (found,) = disorder_of({**order, "t5": 12.0, "t4": 11.0})
    assert found == "t5 (first verified run, 12.00 s) lies before t3 (failover started, 20.00 s)"
    assert len(disorder_of({**order, "t6": 3.0})) == 1
    assert len(disorder_of({"t0": 0.0, "t1": -9.0})) == 1
    assert disorder_of({**order, "t5": 19.5, "t4": 19.0}) == [], "a watcher looks now and then"
    wrong = outcome("passed", 12.0) | {"marks": {**order, "t5": 12.0, "t4": 11.0}}
    write_json(tmp_path / "x.json", result(wrong))
    report = reports.read(tmp_path, "d")
    (run,) = report.results["application_single_node_restart"]["runs"]
    assert run["status"] == "inconclusive"
    why = report.not_tested["application_single_node_restart"]
    assert why.startswith("inconclusive: a fault of the drill: t5 (first verified run, 12.00 s)")


class Books:
    """A witness that has seen runs verified at some moments, and no run stopped since."""

    def __init__(self, *verified_s: float) -> None:
        self._verified_s = verified_s

    async def order(self, do: str, since_s: float) -> dict[str, Any]:
        """What `look` says."""
        first = min((at_s for at_s in self._verified_s if at_s >= since_s), default=None)
        return {"accepted_s": first, "verified_s": first, "drained_s": since_s}


@pytest.mark.parametrize(("t3_s", "t5_s"), [(20.0, 21.0), (1.5, 0.5)])
def test_a_failover_that_begins_late_is_measured_to_its_end(
    tmp_path: Path, t3_s: float, t5_s: float
) -> None:
    scenario = parse(SOUND, "sound")
    target = SingleTarget(tmp_path, RealClock(), scenario.system)
    drill = Drill(scenario, target, tmp_path, name="x", tell=lambda text: None)
    drill._witness = Books(0.5, 21.0)  # type: ignore[assignment]
    marks = drill.outcome.marks
    marks.at_s = {"t0": 0.0, "t3": t3_s, "t4": 0.5, "t5": 0.5, "t6": 0.5}
    asyncio.run(drill._recover_later())
    assert marks.recovery_time_s == t5_s
    assert disorder_of(marks.relative()) == []


def test_whoever_notices_first_has_detected_it() -> None:
    marks = Marks()
    marks.put("t0", 10.0)
    marks.detected([10.5, None, 9.0, 10.1])
    assert marks.relative()["t1"] == 0.1
    unseen = Marks(at_s={"t0": 10.0})
    unseen.detected([None, 9.0])
    assert "t1" not in unseen.at_s


def test_a_fallback_is_in_every_step_that_asks_a_model_and_needs_a_provider_to_ask() -> None:
    shape = Shape("a", 1, ask_ms=0, words=1, word_ms=1, probe_ms=100, receiver="", model="gpt-4o")
    assert not any("fallback" in text for text in workflows(shape))
    texts = workflows(dataclasses.replace(shape, fallback="anthropic/claude-haiku-4-5"))
    for text in texts:
        asked = [step for step in load_text(text).steps if isinstance(step, LLMStep)]
        assert asked
        assert all(step.model == "gpt-4o" for step in asked)
        assert all(step.fallback[0].provider == "anthropic" for step in asked)
    with pytest.raises(ConfigError, match="providers: 2"):
        parse(SOUND + "load: {fallback: anthropic/x}\n", "sound")


def test_no_two_runs_of_a_load_have_the_same_answer() -> None:
    shape = Shape("a", 200, ask_ms=0, words=20, word_ms=1, probe_ms=100, receiver="")
    orders = [order(shape, n) for n in range(50)] + [probe(shape, n) for n in range(50)]
    assert len({each.expects["said"] for each in orders}) == 100
    assert all(each.tokens.get("tell", 20) == 20 for each in orders)


# --- results ---


def outcome(status: str, recovery_s: float | None) -> dict[str, Any]:
    return {
        "status": status,
        "reasons": [] if status == "passed" else ["because <of> it"],
        "repeat": 1,
        "recovery_time_s": recovery_s,
        "recovery_point_s": 0.0,
        "marks": {"t0": 0.0, "t5": recovery_s or 0.0},
        "respent": {"calls": 1, "tokens": 2},
        "parts": {},
        "affected_runs": 3,
    }


def result(
    *runs: dict[str, Any], name: str = "application_single_node_restart", **more: Any
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "scenario": load_one(name).plain(),
        "target": "single",
        "commit": "c",
        "digest": "d",
        "finished_at": "2026-11-23T12:00:00+00:00",
        "overrides": [],
        "host": {"processors": 2, "memory_mb": 1, "kernel": "6.1", "python": "3"},
        "runs": list(runs),
        "summary": summary(runs),
        **more,
    }


def test_one_repeat_that_does_not_pass_fails_the_drill() -> None:
    runs = [outcome("passed", 1.0), outcome("missed", 9.0), outcome("passed", 2.0)]
    found = summary(runs)
    assert (found["status"], found["passed"], found["n"]) == ("missed", 2, 3)
    assert found["recovery_time_s"] == {"median": 2.0, "p95": 9.0, "max": 9.0}
    assert summary([*runs, outcome("inconclusive", None)])["status"] == "inconclusive"
    assert summary([outcome("lost", 1.0), outcome("inconclusive", None)])["status"] == "lost"


def test_the_report_says_what_is_stale_what_is_a_trial_and_what_was_not_tested(
    tmp_path: Path,
) -> None:
    write_json(tmp_path / "application_single_node_restart.json", result(outcome("passed", 1.25)))
    trial = result(
        outcome("passed", 1.0),
        name="application_graceful_stop_single",
        overrides=["load.in_flight=2"],
    )
    write_json(tmp_path / "application_graceful_stop_single.json", trial)
    fresh, old = reports.read(tmp_path, "d"), reports.read(tmp_path, "another")
    assert fresh.remark(fresh.results["application_single_node_restart"]) == ""
    assert old.remark(old.results["application_single_node_restart"]) == "stale"
    assert "application_single_node_restart" not in fresh.not_tested
    assert {"application_graceful_stop_single", "application_frozen_single"} <= set(
        fresh.not_tested
    )
    page = reports.as_markdown(fresh)
    assert "1.25 / 1.25 s" in page
    missing = page.partition("## Not tested")[2]
    assert "- `application_graceful_stop_single`: only a trial (load.in_flight=2)\n" in missing
    assert "- `application_frozen_single`: never carried out\n" in missing
    assert "- `application_zombie`: never carried out; needs root\n" in missing
    assert old.not_tested["application_single_node_restart"].startswith("stale: ")
    assert "trial: load.in_flight=2" in page
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"x\.json"):
        reports.read(tmp_path, "d")


def test_programs_can_read_the_report_and_nothing_inconclusive_counts(tmp_path: Path) -> None:
    write_json(tmp_path / "application_single_node_restart.json", result(outcome("missed", 4.5)))
    unsure = result(outcome("inconclusive", None), name="application_graceful_stop_single")
    write_json(tmp_path / "application_graceful_stop_single.json", unsure)
    report = reports.read(tmp_path, "d")
    files = reports.write(report, tmp_path / "out", tmp_path / "out" / "page.md")
    assert all(path.stat().st_size for path in files)
    assert report.not_tested["application_graceful_stop_single"] == (
        "inconclusive: because <of> it"
    )
    cases = {case.get("name"): case for case in ET.fromstring(reports.as_junit(report))}
    assert cases["application_single_node_restart[1]"].find("failure") is not None
    assert cases["application_graceful_stop_single[1]"].find("skipped") is not None
    assert cases["application_frozen_single"].find("skipped") is not None
    metrics = as_text(report.results)
    name = "llm_orchestrator_drill_recovery_time_seconds"
    assert f'{name}{{scenario="application_single_node_restart"}} 4.5' in metrics
    assert f'{name}{{scenario="application_graceful_stop_single"}}' not in metrics
    last = "llm_orchestrator_drill_last_result"
    for word, value in {"missed": 1, "passed": 0, "inconclusive": 0, "lost": 0}.items():
        given = f'scenario="application_single_node_restart",result="{word}"'
        assert f"{last}{{{given}}} {value}\n" in metrics
    given = 'scenario="application_graceful_stop_single",result="inconclusive"'
    assert f"{last}{{{given}}} 1\n" in metrics
    shown = reports.as_html(report)
    assert "because &lt;of&gt; it" in shown
    assert "http://" not in shown


def test_the_file_of_metrics_says_how_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "drill.prom"
    board = Board(path, RealClock())
    board.begin({}, 2)
    assert "llm_orchestrator_drill_runs_left 2\n" in path.read_text()
    board.phase("sound", "fault")
    word = "llm_orchestrator_drill_phase_start_timestamp_seconds"
    (line,) = [each for each in path.read_text().splitlines() if each.startswith(word)]
    labels, _, at_s = line.rpartition(" ")
    assert labels == f'{word}{{scenario="sound",phase="fault"}}'
    assert abs(float(at_s) - RealClock().now_us() / 1e6) < 60
    board.stand({"application_single_node_restart": result(outcome("passed", 2.5))}, 0)
    text = path.read_text()
    assert word not in text
    assert "llm_orchestrator_drill_runs_left 0\n" in text
    assert 'recovery_time_seconds{scenario="application_single_node_restart"} 2.5\n' in text
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ConfigError, match="--metrics"):
        Board(tmp_path / "none" / "drill.prom", RealClock()).begin({}, 1)


# --- the dead-man timer ---

_HOLDER = """\
import json, sys
from llm_orchestrator.drill.deadman import DeadMan
DeadMan(json.loads(sys.argv[1]), 600).arm()
print("armed", flush=True)
sys.stdin.read()
"""


def test_a_drill_that_is_killed_leaves_no_fault_in_place(tmp_path: Path) -> None:
    mark = tmp_path / "undone"
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, json.dumps([["touch", str(mark)]])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as drill:
        assert drill.stdout is not None
        assert drill.stdout.readline() == b"armed\n"
        assert not mark.exists()
        os.kill(drill.pid, signal.SIGKILL)
        drill.wait()
    assert wait(mark.exists, 30.0)


def test_a_drill_that_ends_in_order_is_not_undone_twice(tmp_path: Path) -> None:
    mark = tmp_path / "undone"
    timer = DeadMan([["touch", str(mark)]], 600)
    timer.arm()
    timer.disarm()
    assert not mark.exists()


def test_a_drill_that_hangs_is_undone(tmp_path: Path) -> None:
    mark = tmp_path / "undone"
    timer = DeadMan([["touch", str(mark)]], 0.05)
    timer.arm()
    assert wait(mark.exists, 30.0)
    timer.disarm()


def test_an_objective_is_met_only_when_all_of_it_was_measured(tmp_path: Path) -> None:
    def standing(*found: dict[str, Any]) -> str:
        some = {each["scenario"]["id"]: each for each in found}
        return {each.id: each.status for each in standings(some)}["application_crash"]

    first = result(outcome("passed", 2.0))
    second = result(outcome("missed", 29.0), name="application_sigkill_second_node")
    assert standing() == "open"
    assert standing(first) == "open"
    assert standing(first, second) == "met"
    assert standing(first, result(outcome("lost", 1.0), name=second["scenario"]["id"])) == "missed"
    assert standing(first, result(outcome("missed", 31.0), name=second["scenario"]["id"])) == (
        "missed"
    )
    trial = result(outcome("passed", 1.0), name=second["scenario"]["id"], overrides=["a.b=1"])
    assert standing(first, trial) == "open"


def test_the_verdict_puts_lost_work_before_lateness() -> None:
    good, late, lost = (
        {"a": result(outcome(status, 1.0))} for status in ("passed", "missed", "lost")
    )
    assert detail.verdict({}).startswith("No verdict")
    assert detail.verdict(good).startswith("**Fit**")
    assert detail.verdict(late).startswith("**Safe, not always in time**")
    assert detail.verdict({**late, "b": lost["a"]}).startswith("**Not fit**")


def test_labels_of_one_timeline_never_lie_on_each_other() -> None:
    marks = {"t0": 0.0, "t1": 0.0, "t2": 0.01, "t3": 0.1, "t4": 3.1, "t5": 3.3, "t6": 60.0}
    svg = ET.fromstring(plots.timeline([{"marks": marks}]))
    labels = [each for each in svg.iter("text") if (each.text or "").startswith("t")]
    assert len(labels) == len(marks)
    boxes = [
        (float(each.get("x", "")), float(each.get("y", "")), 7 * len(each.text or ""))
        for each in labels
    ]
    for place, (x, y, width) in enumerate(boxes):
        assert 0 <= x <= x + width <= 720
        for other_x, other_y, other_width in boxes[place + 1 :]:
            assert y != other_y or x + width <= other_x or other_x + other_width <= x


def test_what_was_late_is_explained_by_its_largest_part() -> None:
    late = outcome("missed", 9.0)
    late["parts"] = {"detect": 1.0, "promote": 7.5, "work off": 60.0}
    (line,) = detail.recommendations({"a": result(late)})
    assert "7.50 s of it to promote" in line

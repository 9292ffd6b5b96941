"""kill -9 at every point between two writes, for every step type: the run ends right.

The points are derived from a dry run (their number is printed); a store, leaf and HTTP wrapper
stops the real process there, SIGKILL ends it, a plain process opens the same store. Then the
journal, the row of `runs`, the fake server's fsynced ledger and an independent witness file are
compared.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.crash.flows import FLOWS, Flow
from tests.acceptance.crash.forks import Forks, forks
from tests.acceptance.crash.witness import done
from tests.acceptance.fake_server import FakeServer, fake_server

STRIDE = int(os.environ.get("CRASH_SWEEP_STRIDE", "1"))
"""1 kills at every point; a larger number at every so many-th, for a quick look."""


@dataclass(frozen=True)
class World:
    forks: Forks
    fake: FakeServer
    folder: Path

    def place(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir(parents=True)
        return folder

    def ledger_bytes(self) -> int:
        return self.fake.ledger.stat().st_size

    def arrived(self, since: int) -> list[dict[str, Any]]:
        """Calls in the ledger's file after its byte `since`: each is there before its answer."""
        with self.fake.ledger.open("rb") as file:
            file.seek(since)
            lines = [json.loads(line) for line in file.read().splitlines()]
        return [line for line in lines if line["event"] == "arrived"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("sweep")
    with fake_server(folder) as fake, forks() as server:
        yield World(server, fake, folder)


@dataclass(frozen=True)
class Case:
    """What is known after a kill and a restart."""

    flow: Flow
    point: str
    end: dict[str, Any]
    decided: list[str]
    calls: Counter[str]
    """How often each step was really called, by the ledgers, under `run/step`."""

    def before(self) -> list[tuple[str, str, str, int]]:
        return _rows(self.end["before"])

    def after(self) -> list[tuple[str, str, str, int]]:
        return _rows(self.end["after"])


def _rows(runs: list[dict[str, Any]]) -> list[tuple[str, str, str, int]]:
    return [(run["run"], *entry) for run in runs for entry in run["entries"]]


def dry_run(world: World, name: str) -> tuple[list[str], dict[str, Any]]:
    """Every point of an undisturbed run, and how it ends."""
    points: list[str] = []
    folder = world.place(f"{name}-dry")
    with world.forks.child(folder, flow=name, url=world.fake.url, stop_at=0) as child:
        for line in child.lines():
            assert "error" not in line, line["error"]
            if "point" in line:
                points.append(line["name"])
            if "end" in line:
                assert line["end"]["state"] == "completed"
                return points, line["end"]
    raise AssertionError(f"the dry run ended without a result: {(folder / 'stderr').read_text()}")


def kill_and_go_on(world: World, name: str, stop_at: int) -> Case | None:
    """Kill at one point, start again. None when this run had fewer points (batches vary)."""
    folder = world.place(f"{name}-{stop_at}")
    seen = world.ledger_bytes()
    order = {"flow": name, "url": world.fake.url}
    with world.forks.child(folder, **order, stop_at=stop_at) as child:
        last: dict[str, Any] = {}
        for last in child.lines():
            assert "error" not in last, last["error"]
        if not last.get("stopped"):
            assert "end" in last, f"died by itself: {(folder / 'stderr').read_text()}"
            return None
        child.kill()
    decided: list[str] = []
    with world.forks.child(folder, **order, stop_at=None) as child:
        for line in child.lines():
            assert "error" not in line, f"after a kill {last['name']}: {line['error']}"
            if "decided" in line:
                decided.append(line["step"])
            if "end" in line:
                child.wait()
                calls = Counter(_called(world.arrived(seen), line["end"], FLOWS[name]))
                calls.update(done(folder / "witness"))
                return Case(FLOWS[name], last["name"], line["end"], decided, calls)
    raise AssertionError(f"no end after a kill {last['name']}: {(folder / 'stderr').read_text()}")


def _called(lines: list[dict[str, Any]], end: dict[str, Any], flow: Flow) -> Iterator[str]:
    for line in lines:
        if line["api"] == "openai.embeddings":
            yield f"{end['after'][0]['run']}/{flow.embeds}"
        else:
            assert line["idempotency_key"], line
            yield line["idempotency_key"]


# -- what must hold -------------------------------------------------------------------------------


def check(case: Case, undisturbed: dict[str, Any]) -> None:
    """Raises AssertionError with the point's name."""
    end = case.end
    assert end["state"] in case.flow.ends
    if end["state"] == "completed":
        assert fixed(end["output"]) == fixed(undisturbed["output"])
    for run in [*end["before"], *end["after"]]:
        assert run["wrong"] == []
    for run in end["after"]:
        assert run["state"] in case.flow.ends
    check_finished_steps_stand(case)
    check_calls(case)
    check_free_values(case)


def fixed(output: Any) -> Any:
    """An output without what is free to differ between two runs."""
    return output["fixed"] if isinstance(output, dict) and "fixed" in output else output


def check_finished_steps_stand(case: Case) -> None:
    """The journal grew, nothing in it changed, and each step has one result."""
    for run_before in case.end["before"]:
        [run] = [run for run in case.end["after"] if run["run"] == run_before["run"]]
        assert run["entries"][: len(run_before["entries"])] == run_before["entries"]
    finished = Counter(
        f"{run}/{step}" for run, kind, step, _ in case.after() if kind == "step_finished"
    )
    assert [key for key, count in finished.items() if count > 1] == []
    attempts = {attempt for _, kind, _, attempt in case.after() if kind == "step_finished"}
    assert attempts <= {0, 1}, "a takeover burns no attempt"


def check_calls(case: Case) -> None:
    """What was finished is never called again; only what was in flight may be, once."""
    was_finished = {
        f"{run}/{step}" for run, kind, step, _ in case.before() if kind == "step_finished"
    }
    repeated = 0
    for key, count in case.calls.items():
        step = key.partition("/")[2]
        if key in was_finished:
            assert count == 1, f"{key} was finished and called again"
        elif step in case.flow.once:
            allowed = 1 + case.flow.repeats_allowed
            allowed += case.decided.count(step) if case.flow.choose == "retry" else 0
            assert count <= allowed, f"{key} was issued {count} times"
        else:
            assert count <= 2, f"{key} was called {count} times"
        repeated += count - 1
    assert repeated <= len(in_flight(case)), f"{case.calls}, in flight {in_flight(case)}"


def in_flight(case: Case) -> set[str]:
    """Steps that had been called when the process died and had no durable result."""
    finished = {f"{run}/{step}" for run, kind, step, _ in case.before() if kind == "step_finished"}
    started = {f"{run}/{step}" for run, kind, step, _ in case.before() if kind == "intent"}
    unrecorded = {key for key in case.calls if key not in finished}
    return (started | unrecorded) - finished


def check_free_values(case: Case) -> None:
    """Time, chance and ids that were durable are the same after the crash."""
    if case.flow.code is None or case.end["state"] != "completed":
        return
    [run] = [run for run in case.end["after"] if run["free"]]
    assert sorted(map(str, run["free"][1:])) == sorted(map(str, case.end["output"]["free"][1:]))


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.timeout(300)
def test_kill_9_at_every_point_costs_at_most_what_was_in_flight(world: World, name: str) -> None:
    points, undisturbed = dry_run(world, name)
    chosen = range(1, len(points) + 1, STRIDE)
    missed, wrong = 0, []
    for stop_at in chosen:
        try:
            case = kill_and_go_on(world, name, stop_at)
            if case is None:
                missed += 1
                continue
            check(case, undisturbed)
        except AssertionError as error:
            wrong.append(f"point {stop_at} ({points[stop_at - 1]}): {error}")
    print(f"{name}: {len(points)} points, killed at {len(chosen) - missed}")
    if wrong:
        pytest.fail("\n".join(wrong))
    assert missed <= max(2, len(chosen) // 5), f"{missed} of {len(chosen)} points were not reached"

"""Random definitions with random failures: they end, in the states that the rules give.

The oracle below is written from the rules in engine/graph.py and the language's words for on_error
and on_skipped, not from the interpreter. Then each journal is cut at a random place, as a crash
cuts it, and a new engine goes on from there.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_orchestrator.engine.acceptance import from_accepted
from llm_orchestrator.engine.machine import column_bytes
from llm_orchestrator.engine.replay import fold
from llm_orchestrator.errors import RunFailed
from llm_orchestrator.model import Entry, RunState
from llm_orchestrator.store.base import Append, Batch, Register, StateChange
from llm_orchestrator.store.journal import GENESIS
from tests.unit.engine.support import Engine, VirtualClock, Work, definition, stored, virtually

Steps = list[dict[str, Any]]
ATTEMPTS = 2
SETTINGS = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


# -- the oracle -----------------------------------------------------------------------------------


@dataclass
class Expected:
    """Keys of steps by how they end. Control steps have an entry only when they are skipped."""

    finished: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    skipped: set[str] = field(default_factory=set)


class Oracle:
    """What the rules say of a definition whose `on_failure` is continue."""

    def __init__(self) -> None:
        self.expected = Expected()

    def scope(self, steps: Steps, prefix: str = "") -> bool:
        """Judge a list of steps in file order, which is an order of its dependencies."""
        states: dict[str, str] = {}
        stood_in: dict[str, bool] = {}
        by_id = {step["id"]: step for step in steps}
        named_by: dict[str, list[str]] = {}
        for step in steps:
            if target := _fallback(step):
                named_by.setdefault(target, []).append(step["id"])
        for step in steps:
            name = step["id"]
            needs = [states[need] for need in (*step["depends_on"], *named_by.get(name, ()))]
            if name in stood_in:
                states[name] = "completed" if stood_in[name] else "failed"
            elif (
                name in named_by
                or "failed" in needs
                or ("skipped" in needs and step["on_skipped"] == "skip")
                or step.get("condition") == "false"
            ):
                states[name] = "skipped"
                self.expected.skipped.add(prefix + name)
            elif self.works(step, prefix) or step["on_error"] == "continue":
                states[name] = "completed"
            elif target := _fallback(step):
                if target not in stood_in:
                    stood_in[target] = self.works(by_id[target], prefix)
                states[name] = "completed" if stood_in[target] else "failed"
            else:
                states[name] = "failed"
        return "failed" not in states.values()

    def works(self, step: dict[str, Any], prefix: str) -> bool:
        """True when the step's own work ends well."""
        key = prefix + step["id"]
        if step["type"] == "work":
            is_good = step["fails"] < ATTEMPTS
            (self.expected.finished if is_good else self.expected.failed).add(key)
            return bool(is_good)
        if step["type"] == "loop":
            return all(
                self.scope(step["steps"], f"{key}/{number + 1}/")
                for number in range(step["max_iterations"])
            )
        ends = [self.scope(inner, f"{key}/{place}/") for place, inner in _children(step)]
        return all(ends)


def _children(step: dict[str, Any]) -> Iterator[tuple[str, Steps]]:
    if step["type"] == "parallel":
        yield from ((task["id"], [task]) for task in step["tasks"])
    elif step["type"] == "map":
        yield from ((str(number), step["steps"]) for number in range(len(step["items"])))
    else:
        yield "yes", step["branches"]["yes"]


def _fallback(step: dict[str, Any]) -> str | None:
    on_error = step["on_error"]
    return on_error["fallback"] if isinstance(on_error, dict) else None


# -- definitions ----------------------------------------------------------------------------------


@st.composite
def step_lists(draw: st.DrawFn, depth: int = 2, size_max: int = 6) -> Steps:
    """Steps with ids that are free of the rest of the file (see `rename`)."""
    count = draw(st.integers(1, size_max))
    steps: Steps = []
    for number in range(count):
        earlier = [step["id"] for step in steps]
        step: dict[str, Any] = {
            "id": f"s{number}",
            "depends_on": draw(st.lists(st.sampled_from(earlier), unique=True, max_size=3))
            if earlier
            else [],
            "on_error": draw(st.sampled_from(["fail", "fail", "continue"])),
            "on_skipped": draw(st.sampled_from(["skip", "skip", "run"])),
        }
        if draw(st.integers(0, 5)) == 0:
            step["condition"] = "false"
        steps.append(step | draw(_bodies(depth)))
    _add_fallbacks(draw, steps)
    return steps


@st.composite
def _bodies(draw: st.DrawFn, depth: int) -> dict[str, Any]:
    kinds = ["work"] * 6 + (["parallel", "map", "branch", "loop"] if depth > 0 else [])
    kind = draw(st.sampled_from(kinds))
    if kind == "work":
        return {
            "type": "work",
            "fails": draw(st.sampled_from([0, 0, 0, 1, 9])),
            "takes": draw(st.sampled_from([0.0, 0.0, 0.5, 3.0])),
            "retry": {"max_attempts": ATTEMPTS, "initial_delay_ms": 5000},
        }
    inner = draw(step_lists(depth - 1, 3))
    if kind == "parallel":
        for task in inner:
            task["depends_on"] = []
            if isinstance(task["on_error"], dict):
                task["on_error"] = "fail"
        return {"type": "parallel", "tasks": inner}
    if kind == "map":
        return {"type": "map", "items": [1] * draw(st.integers(1, 3)), "steps": inner}
    if kind == "branch":
        return {"type": "branch", "switch": "'yes'", "branches": {"yes": inner}}
    return {"type": "loop", "max_iterations": draw(st.integers(1, 3)), "steps": inner}


def _add_fallbacks(draw: st.DrawFn, steps: Steps) -> None:
    """Some steps fall back on a later one that nothing else decides about."""
    free = [
        place
        for place, step in enumerate(steps)
        if place and not step["depends_on"] and "condition" not in step
    ]
    if not free or not draw(st.booleans()):
        return
    place = draw(st.sampled_from(free))
    steps[place]["on_error"] = "fail"
    for step in draw(st.lists(st.sampled_from(steps[:place]), max_size=2, unique_by=id)):
        step["on_error"] = {"fallback": steps[place]["id"]}


def rename(steps: Steps, numbers: Iterator[int]) -> Steps:
    """The same steps with ids that are unique in the whole file."""
    names = {step["id"]: f"n{next(numbers)}" for step in steps}
    renamed = []
    for step in steps:
        new = {**step, "id": names[step["id"]]}
        new["depends_on"] = [names[need] for need in step["depends_on"]]
        if target := _fallback(step):
            new["on_error"] = {"fallback": names[target]}
        for name in ("tasks", "steps"):
            if name in new:
                new[name] = rename(new[name], numbers)
        if "branches" in new:
            new["branches"] = {"yes": rename(new["branches"]["yes"], numbers)}
        renamed.append(new)
    return renamed


graphs = step_lists().map(lambda steps: rename(steps, itertools.count()))


# -- the runs -------------------------------------------------------------------------------------


@dataclass
class Ran:
    state: str
    output: Any
    entries: list[Entry]
    calls: Any
    run_id: str


async def _run(folder: Path, steps: Steps, on_failure: str) -> Ran:
    made = definition(steps=steps, on_failure=on_failure)
    async with Engine(folder / "runs.db") as engine:
        run_id = await engine.begin(made)
        return await _finish(engine, run_id)


async def _finish(engine: Engine, run_id: str) -> Ran:
    try:
        output = await engine.result(run_id)
        state = "completed"
    except RunFailed as error:
        output, state = None, error.state
    return Ran(state, output, await engine.entries(run_id), engine.work.calls, run_id)


async def _go_on(folder: Path, steps: Steps, ran: Ran, *, cut: int, on_failure: str) -> Ran:
    """A store that holds only the first `cut` entries, as a crash leaves it; then an engine."""
    made = definition(steps=steps, on_failure=on_failure)
    prefix = ran.entries[:cut]
    async with Engine(folder / "cut.db", clock=later(), work=Work()) as engine:
        state = fold(ran.run_id, prefix)
        change = None
        if cut > 1:
            is_running = state.state is RunState.RUNNING
            change = StateChange(
                state.state,
                owner="dead" if is_running else None,
                output=column_bytes(state.output) if state.state is RunState.COMPLETED else None,
                error=None if state.error is None else column_bytes(state.error),
            )
        accept = from_accepted(ran.run_id, state.accepted)
        append = Append(ran.run_id, 0, GENESIS, prefix, accept=accept, change=change)
        await engine.store.commit(Batch(appends=(append,), changes=(Register(stored(made)),)))
    async with Engine(folder / "cut.db", clock=later(), work=Work()) as engine:
        return await _finish(engine, ran.run_id)


def later() -> VirtualClock:
    clock = VirtualClock(seed=1)
    clock.offset_us = 3_600_000_000
    return clock


def _keys(entries: list[Entry], kind: str) -> list[str]:
    return [entry.step for entry in entries if entry.kind == kind]


def _failed_for_good(ran: Ran) -> set[str]:
    state = fold(ran.run_id, ran.entries)
    return {key for key, failure in state.failures.items() if failure.is_final}


@given(graphs)
@SETTINGS
def test_every_graph_ends_in_the_states_that_the_rules_give(steps: Steps) -> None:
    oracle = Oracle()
    is_good = oracle.scope(steps)
    with tempfile.TemporaryDirectory() as folder:
        ran = virtually(_run(Path(folder), steps, "continue"))
    finished = _keys(ran.entries, "step_finished")
    assert len(finished) == len(set(finished))
    assert set(finished) == oracle.expected.finished
    assert _failed_for_good(ran) == oracle.expected.failed
    assert set(_keys(ran.entries, "step_skipped")) == oracle.expected.skipped
    assert ran.state == ("completed" if is_good else "failed")


@given(graphs)
@SETTINGS
def test_fail_fast_ends_as_continue_does_and_does_no_more(steps: Steps) -> None:
    oracle = Oracle()
    is_good = oracle.scope(steps)
    with tempfile.TemporaryDirectory() as folder:
        ran = virtually(_run(Path(folder), steps, "fail_fast"))
    finished = _keys(ran.entries, "step_finished")
    assert len(finished) == len(set(finished))
    assert set(finished) <= oracle.expected.finished
    assert _failed_for_good(ran) <= oracle.expected.failed
    assert ran.state == ("completed" if is_good else "failed")


def _plain(output: Any) -> Any:
    """Without the words of errors: of two steps that fail at one moment either may be named."""
    if isinstance(output, dict):
        return {key: key == "error" or _plain(value) for key, value in output.items()}
    return [_plain(each) for each in output] if isinstance(output, list) else output


@given(graphs, st.sampled_from(["continue", "fail_fast"]), st.floats(0, 1))
@SETTINGS
def test_a_journal_cut_anywhere_goes_on_to_the_same_end(
    steps: Steps, on_failure: str, where: float
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ran = virtually(_run(Path(folder), steps, on_failure))
        cut = 1 + round(where * (len(ran.entries) - 1))
        again = virtually(_go_on(Path(folder), steps, ran, cut=cut, on_failure=on_failure))
    assert (again.state, _plain(again.output)) == (ran.state, _plain(ran.output))
    assert again.entries[:cut] == ran.entries[:cut]
    was_done = set(_keys(ran.entries[:cut], "step_finished"))
    assert was_done.isdisjoint(again.calls), "a finished step was called again"
    finished = _keys(again.entries, "step_finished")
    assert len(finished) == len(set(finished))
    if on_failure == "continue":
        assert set(finished) == set(_keys(ran.entries, "step_finished"))


def test_the_loop_of_these_tests_notices_a_hang() -> None:
    async def hang() -> None:
        while True:
            await VirtualClock().sleep(1e7)

    with pytest.raises(TimeoutError, match="hangs"):
        virtually(hang())


def test_virtual_time_takes_no_time() -> None:
    async def rest() -> float:
        await asyncio.gather(*(VirtualClock().sleep(seconds) for seconds in (5, 3600, 60)))
        return VirtualClock().monotonic()

    assert virtually(rest()) >= 3600

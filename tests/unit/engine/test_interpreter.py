"""Definitions: skipped and failed steps, fallbacks, big maps, children."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_orchestrator.errors import RunFailed
from tests.unit.engine.support import Engine, definition, stored, virtually

Json = Any


def work(name: str, *after: str, **fields: Json) -> dict[str, Json]:
    return {"id": name, "type": "work", "depends_on": list(after), "value": name, **fields}


FAILS: dict[str, Json] = {"fails": 9, "retry": {"max_attempts": 1}}


def run(folder: Path, inputs: Json = None, **fields: Json) -> Engine:
    """Run a definition; the engine keeps what it came to."""
    engine = Engine(folder / "runs.db")

    async def main() -> None:
        async with engine:
            run_id = await engine.begin(definition(**fields), inputs)
            try:
                engine.ended = "completed", await engine.result(run_id)
            except RunFailed as error:
                engine.ended = "failed", str(error)
            engine.journal = await engine.entries(run_id)

    virtually(main())
    return engine


def skipped(engine: Engine) -> list[str]:
    return sorted(entry.step for entry in engine.journal if entry.kind == "step_skipped")


def test_a_false_condition_skips_a_step_and_its_dependents(tmp_path: Path) -> None:
    steps = [work("a", condition="false"), work("b", "a"), work("c", "b", on_skipped="run")]
    engine = run(tmp_path, steps=steps)
    assert engine.ended == ("completed", {"c": {"value": "c"}})
    assert skipped(engine) == ["a", "b"]


def test_fail_fast_starts_nothing_more_but_lets_work_in_flight_end(tmp_path: Path) -> None:
    steps = [
        work("bad", takes=5.0, **FAILS),
        work("slow", takes=20.0),
        work("next", "slow"),
    ]
    engine = run(tmp_path, steps=steps)
    assert engine.ended[0] == "failed"
    assert engine.work.calls == {"bad": 1, "slow": 1}
    assert [entry.step for entry in engine.journal if entry.kind == "step_finished"] == ["slow"]


def test_continue_goes_on_with_whatever_does_not_depend_on_the_failure(tmp_path: Path) -> None:
    steps = [work("bad", **FAILS), work("of_bad", "bad"), work("free"), work("next", "free")]
    engine = run(tmp_path, steps=steps, on_failure="continue")
    assert engine.ended[0] == "failed"
    assert "step bad" in engine.ended[1]
    assert skipped(engine) == ["of_bad"]
    assert set(engine.work.calls) == {"bad", "free", "next"}


def test_on_error_continue_gives_null_and_the_error(tmp_path: Path) -> None:
    engine = run(
        tmp_path,
        steps=[work("bad", on_error="continue", **FAILS), work("next", "bad")],
        outputs={
            "value": {"value": "{{ steps.bad.value }}"},
            "error": {"value": "{{ steps.bad.error }}"},
        },
    )
    assert engine.ended == ("completed", {"value": None, "error": "step bad: bad fails"})


def test_a_fallback_stands_in_once_for_however_many_steps(tmp_path: Path) -> None:
    steps = [
        work("one", on_error={"fallback": "other"}, **FAILS),
        work("two", on_error={"fallback": "other"}, **FAILS),
        work("other"),
        work("next", "one", "two"),
    ]
    engine = run(tmp_path, steps=steps, outputs={"one": {"value": "{{ steps.one.value }}"}})
    assert engine.ended == ("completed", {"one": "other"})
    assert engine.work.calls["other"] == 1
    assert engine.work.calls["next"] == 1


def test_a_fallback_that_nobody_needs_is_skipped(tmp_path: Path) -> None:
    steps = [work("one", on_error={"fallback": "other"}), work("other")]
    engine = run(tmp_path, steps=steps)
    assert skipped(engine) == ["other"]
    assert engine.work.calls == {"one": 1}


def test_a_fallback_that_fails_is_an_ordinary_failure(tmp_path: Path) -> None:
    steps = [
        work("one", on_error={"fallback": "other"}, **FAILS),
        work("other", **FAILS),
        work("free", takes=30.0),
        work("next", "free"),
    ]
    engine = run(tmp_path, steps=steps, on_failure="continue")
    assert engine.ended[0] == "failed"
    assert set(engine.work.calls) == {"one", "other", "free", "next"}


def test_an_output_that_cannot_be_evaluated_takes_its_fallback(tmp_path: Path) -> None:
    engine = run(
        tmp_path,
        steps=[work("a", condition="false")],
        outputs={"said": {"value": "{{ steps.a.value }}", "fallback": "nothing"}},
    )
    assert engine.ended == ("completed", {"said": "nothing"})


def test_a_child_workflow_that_nobody_registered_fails_its_step_alone(tmp_path: Path) -> None:
    steps = [
        {"id": "sub", "type": "workflow", "workflow": "nobody", "on_error": "continue"},
        work("next", "sub"),
    ]
    engine = run(tmp_path, steps=steps)
    assert engine.ended == ("completed", {"next": {"value": "next"}})


def test_a_child_workflow_runs_with_its_own_journal(tmp_path: Path) -> None:
    async def main() -> None:
        async with Engine(tmp_path / "runs.db") as engine:
            inner = definition("inner", steps=[work("in")])
            await engine.operator.register(stored(inner))
            engine.node.flows.add_definition(stored(inner))
            outer = definition(
                "outer",
                steps=[{"id": "sub", "type": "workflow", "workflow": "inner"}, work("out", "sub")],
                outputs={"said": {"value": "{{ steps.sub.output }}"}},
            )
            run_id = await engine.begin(outer)
            assert await engine.result(run_id) == {"said": {"in": {"value": "in"}}}
            assert len(await engine.store.look.run_ids()) == 2

    virtually(main())


def test_concurrency_bounds_the_steps_of_one_run(tmp_path: Path) -> None:
    steps = [work(f"s{number}", takes=1.0) for number in range(9)]
    engine = run(tmp_path, steps=steps, concurrency=2)
    assert engine.work.running_max == 2


def test_a_maps_limit_bounds_its_items(tmp_path: Path) -> None:
    items = {"id": "each", "type": "map", "items": list(range(9)), "max_concurrency": 3}
    engine = run(tmp_path, steps=[{**items, "steps": [work("one", takes=1.0)]}])
    assert engine.work.running_max == 3
    assert engine.ended == ("completed", {"each": {"results": ["one"] * 9}})


def test_a_map_begins_no_item_after_one_has_failed(tmp_path: Path) -> None:
    each = {"id": "each", "type": "map", "items": list(range(9)), "max_concurrency": 2}
    engine = run(tmp_path, steps=[{**each, "steps": [work("one", takes=1.0, **FAILS)]}])
    assert engine.ended[0] == "failed"
    assert sum(engine.work.calls.values()) == 2


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("limit", [{"max_concurrency": 50}, {}])
def test_a_map_of_ten_thousand_items_is_bounded_in_memory(
    tmp_path: Path, limit: dict[str, int]
) -> None:
    each = {"id": "each", "type": "map", "items": "inputs.items", **limit}
    before = resident_bytes()
    engine = run(
        tmp_path,
        {"items": list(range(10_000))},
        steps=[{**each, "steps": [work("one")]}],
        outputs={"count": {"value": "{{ steps.each.results | length }}"}},
    )
    assert engine.ended == ("completed", {"count": 10_000})
    assert engine.work.running_max <= limit.get("max_concurrency", 1_000)
    assert resident_bytes() - before < 250 << 20

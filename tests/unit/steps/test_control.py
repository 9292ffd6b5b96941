from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from llm_orchestrator.model import Json, StepState
from llm_orchestrator.steps.approval import Approval
from llm_orchestrator.steps.base import Child, ChildRun, Control, Outcome, Plan, Signal, Timer
from llm_orchestrator.steps.branch import Branch
from llm_orchestrator.steps.child import ChildWorkflow
from llm_orchestrator.steps.loop import Loop
from llm_orchestrator.steps.map import Map
from llm_orchestrator.steps.parallel import Parallel
from llm_orchestrator.steps.wait import Wait, parse_moment
from tests.unit.steps.support import PlainNames, config

NOTHING = PlainNames({})


def echo(name: str, **more: Json) -> dict[str, Json]:
    return {"id": name, "type": "llm", "provider": "echo", "model": "m", "prompt": "p", **more}


def done(**outputs: Json) -> Outcome:
    """A scope that ended; each step's first output is its value here."""
    return Outcome(StepState.COMPLETED, {name: {"text": value} for name, value in outputs.items()})


FAILED = Outcome(StepState.FAILED, {}, "no credit")


def begin(step: Control, settings: Any, names: PlainNames = NOTHING) -> Plan:
    return step.plan(settings, names, {})


def test_parallel_runs_every_task_in_a_shared_scope_of_its_own() -> None:
    settings = config("parallel", tasks=[echo("a"), echo("b")], max_concurrency=1)
    plan = begin(Parallel(), settings)
    assert plan.max_concurrency == 1
    assert plan.children == [
        Child("a", (settings.tasks[0],), is_shared=True),
        Child("b", (settings.tasks[1],), is_shared=True),
    ]


def test_parallel_gives_each_tasks_outputs_and_null_for_a_skipped_one() -> None:
    settings = config("parallel", tasks=[echo("a"), echo("b")])
    children = {"b": done(), "a": done(a="x")}
    plan = Parallel().plan(settings, NOTHING, children)
    assert plan == Plan(outputs={"results": {"a": {"text": "x"}, "b": None}})


@pytest.mark.parametrize(
    ("step", "settings", "names"),
    [
        (Parallel(), config("parallel", tasks=[echo("1"), echo("2")]), {}),
        (Map(), config("map", items=[1, 2], steps=[echo("s")]), {}),
        (Branch(), config("branch", switch="x", branches={"1": [echo("s")]}), {"x": "1"}),
        (Loop(), config("loop", until="x", steps=[echo("s")]), {"x": False}),
    ],
)
def test_a_failed_child_fails_its_step_at_once_and_is_named(
    step: Control, settings: Any, names: dict[str, Json]
) -> None:
    plan = step.plan(settings, PlainNames(names), {"1": FAILED})
    assert plan.error is not None
    assert plan.error.endswith("1: no credit")
    assert not plan.children


def test_map_runs_its_steps_once_for_each_item() -> None:
    settings = config("map", items="inputs.texts", item="text", steps=[echo("s")])
    plan = begin(Map(), settings, PlainNames({"inputs": {"texts": ["x", "y"]}}))
    assert list(plan.children) == [
        Child("0", settings.steps, {"text": "x", "index": 0}),
        Child("1", settings.steps, {"text": "y", "index": 1}),
    ]
    assert plan.children[-1].key == "1"
    assert [child.key for child in plan.children[1:]] == ["1"]
    with pytest.raises(IndexError):
        plan.children[2]


@given(st.lists(st.integers() | st.none(), max_size=30), st.randoms())
def test_map_gives_results_in_the_order_of_the_items(items: list[int | None], chance: Any) -> None:
    settings = config("map", items="xs", steps=[echo("first"), echo("last")])
    names = PlainNames({"xs": items})
    ended = list(enumerate(items))
    chance.shuffle(ended)
    children = {
        str(place): done(first="no") if item is None else done(first="no", last=item)
        for place, item in ended
    }
    assert Map().plan(settings, names, children) == Plan(outputs={"results": items})


def test_map_over_no_items_ends_at_once() -> None:
    assert begin(Map(), config("map", items=[], steps=[echo("s")])) == Plan(outputs={"results": []})


def test_map_over_what_is_no_list_is_an_error() -> None:
    plan = begin(Map(), config("map", items="x", steps=[echo("s")]), PlainNames({"x": {"a": 1}}))
    assert plan.error == "items are an object of 1 keys; map needs a list"


def test_a_plan_over_many_items_makes_no_child_until_it_is_read() -> None:
    made = []

    class Items(list[int]):
        def __getitem__(self, place: Any) -> Any:
            made.append(place)
            return super().__getitem__(place)

    settings = config("map", items="xs", steps=[echo("s")])
    plan = begin(Map(), settings, PlainNames({"xs": Items(range(10_000))}))
    assert len(plan.children) == 10_000
    assert made == []
    assert plan.children[9_999].names == {"item": 9_999, "index": 9_999}
    assert made == [9_999]


@pytest.mark.parametrize(
    ("value", "chosen"),
    [
        ("spam", "spam"),
        (" spam\n", "spam"),
        (True, "true"),
        (False, "false"),
        (3, "3"),
        (3.0, "3"),
        (2.5, "2.5"),
        (None, "null"),
        ("a/b%", "a/b%"),
        ("other", "default"),
    ],
)
def test_branch_takes_the_steps_under_the_value(value: Json, chosen: str) -> None:
    keys = ["spam", "true", "false", "3", "2.5", "null", "a/b%"]
    branches = {key: [echo(f"s{place}")] for place, key in enumerate(keys)}
    settings = config("branch", switch="x", branches=branches, default=[echo("d")])
    [child] = begin(Branch(), settings, PlainNames({"x": value})).children
    assert child.steps == settings.branches.get(chosen, settings.default)
    assert child.is_shared
    assert "/" not in child.key
    outcome = done(**{child.steps[-1].id: "out"})
    plan = Branch().plan(settings, PlainNames({}), {child.key: outcome})
    assert plan == Plan(outputs={"result": "out", "branch": chosen})


def test_a_branch_without_a_match_and_default_does_nothing() -> None:
    settings = config("branch", switch="x", branches={"a": [echo("s")]})
    plan = begin(Branch(), settings, PlainNames({"x": "b"}))
    assert plan == Plan(outputs={"result": None, "branch": None})


def test_loop_judges_each_iteration_by_its_own_outputs() -> None:
    settings = config("loop", until="steps.s.text", steps=[echo("s")], max_iterations=5)
    names = PlainNames({})
    assert [child.key for child in begin(Loop(), settings, names).children] == ["1"]
    assert names.asked == []
    first, second = done(s=False), done(s=True)
    plan = Loop().plan(settings, names, {"1": first})
    assert list(plan.children) == [
        Child("1", settings.steps, {"iteration": 1, "previous": {}}),
        Child("2", settings.steps, {"iteration": 2, "previous": {"s": {"text": False}}}),
    ]
    plan = Loop().plan(settings, names, {"1": first, "2": second})
    assert plan == Plan(outputs={"result": True, "iterations": 2, "is_done": True})
    assert [extra["iteration"] for _, extra in names.asked] == [1, 2]


def test_loop_ends_at_its_limit_and_says_that_it_is_not_done() -> None:
    settings = config("loop", until="no", steps=[echo("s")], max_iterations=2)
    children = {"1": done(s="a"), "2": done(s="b")}
    plan = Loop().plan(settings, PlainNames({"no": "false"}), children)
    assert plan == Plan(outputs={"result": "b", "iterations": 2, "is_done": False})


def test_loop_without_a_condition_runs_to_its_limit() -> None:
    settings = config("loop", steps=[echo("s")], max_iterations=2)
    assert len(Loop().plan(settings, NOTHING, {"1": done(s="a")}).children) == 2
    plan = Loop().plan(settings, NOTHING, {"1": done(s="a"), "2": done()})
    assert plan == Plan(outputs={"result": None, "iterations": 2, "is_done": True})


def test_wait_for_time_a_moment_or_a_signal() -> None:
    assert begin(Wait(), config("wait", seconds=5)) == Plan(wait=Timer(seconds=5))
    plan = begin(Wait(), config("wait", until="2027-01-31T08:00:00+01:00"))
    assert plan == Plan(wait=Timer(until_us=1_801_378_800_000_000))
    settings = config("wait", signal="paid", timeout_seconds=60, payload_schema={"type": "object"})
    assert begin(Wait(), settings) == Plan(wait=Signal("paid", 60, {"type": "object"}))


def test_what_a_wait_brings_comes_out_even_when_it_is_null() -> None:
    timer, signal = config("wait", seconds=5), config("wait", signal="paid", timeout_seconds=60)
    assert Wait().plan(timer, NOTHING, {}, waited={}) == Plan(outputs={"payload": None})
    for payload in (None, {"n": 1}, False):
        waited = {"payload": payload, "by": None, "timed_out": False}
        assert Wait().plan(signal, NOTHING, {}, waited=waited) == Plan(outputs={"payload": payload})
    plan = Wait().plan(signal, NOTHING, {}, waited={"payload": None, "timed_out": True})
    assert plan.error == "no signal 'paid' came within 60 s"


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("1970-01-01T00:00:01Z", 1_000_000),
        ("1970-01-01 00:00:01.000001", 1_000_001),
        ("1970-01-02", 86_400_000_000),
        ("1969-12-31T23:59:59Z", -1_000_000),
        ("1.5", 1_500_000),
        ("soon", None),
        ("nan", None),
        ("inf", None),
        ("", None),
    ],
)
def test_a_moment_is_read_in_utc_wherever_the_machine_stands(
    text: str, moment: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert parse_moment(text) == moment
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_moment_that_is_none_is_an_error() -> None:
    assert "no moment" in str(begin(Wait(), config("wait", until="soon")).error)


def test_approval_asks_for_a_yes_with_the_form_filled_in_or_a_no() -> None:
    settings = config("approval", form={"reason": "string"}, timeout_seconds=9)
    wait = begin(Approval(), settings).wait
    assert isinstance(wait, Signal)
    assert wait.is_approval
    assert wait.timeout_s == 9
    assert wait.payload_schema is not None
    fits = Draft202012Validator(dict(wait.payload_schema)).is_valid
    assert fits({"approved": True, "form": {"reason": "ok"}})
    assert fits({"approved": False})
    assert not fits({"approved": True})
    assert not fits({"approved": True, "form": {"reason": 1}})
    assert not fits({"form": {"reason": "ok"}})
    assert not fits({"approved": "yes"})


@pytest.mark.parametrize("is_approved", [True, False])
def test_approval_gives_the_answer_and_who_gave_it(is_approved: bool) -> None:
    payload = {"approved": is_approved, "form": {"a": 1}, "by": "ann"}
    waited = {"payload": payload, "timed_out": False}
    plan = Approval().plan(config("approval"), NOTHING, {}, waited=waited)
    assert plan == Plan(outputs={"approved": is_approved, "form": {"a": 1}, "by": "ann"})
    assert tuple(plan.outputs or ()) == Approval.outputs


def test_nobodys_answer_is_a_no_unless_the_file_says_otherwise() -> None:
    def late(**settings: Json) -> Plan:
        step = config("approval", timeout_seconds=9, **settings)
        return Approval().plan(step, NOTHING, {}, waited={"payload": None, "timed_out": True})

    assert late() == Plan(outputs={"approved": False, "form": None, "by": None})
    assert late(on_timeout="approve") == Plan(outputs={"approved": True, "form": None, "by": None})
    assert late(on_timeout="fail").error == "nobody answered within 9 s"


def test_a_child_workflow_is_a_run_of_its_own() -> None:
    settings = config("workflow", workflow="sub", version="2.0", inputs={"a": 1})
    assert begin(ChildWorkflow(), settings) == Plan(wait=ChildRun("sub", "2.0", {"a": 1}))
    waited = {"run_id": "r2", "state": "completed", "output": None, "error": None}
    plan = ChildWorkflow().plan(settings, NOTHING, {}, waited=waited)
    assert plan == Plan(outputs={"output": None, "run_id": "r2"})


@pytest.mark.parametrize("state", ["failed", "cancelled"])
@pytest.mark.parametrize("error", ["boom", {"kind": "author", "message": "boom"}])
def test_a_child_that_did_not_complete_fails_its_step(state: str, error: Json) -> None:
    waited = {"run_id": "r2", "state": state, "output": None, "error": error}
    plan = ChildWorkflow().plan(config("workflow", workflow="sub"), NOTHING, {}, waited=waited)
    assert plan.error == f"run r2 of sub {state}: boom"

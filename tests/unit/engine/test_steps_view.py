"""The rows of `runs show` say what the journal says."""

from __future__ import annotations

from llm_orchestrator.cli.progress import Progress
from llm_orchestrator.engine.steps_view import StepsView, steps_of
from llm_orchestrator.model import Entry, Kind, StepState
from llm_orchestrator.store.journal import encode

RUN = "01920000-0000-7000-8000-000000000001"


def entries(*drafts: tuple[Kind, str, int, dict[str, object]]) -> list[Entry]:
    return [
        Entry(RUN, seq, 1, kind, step, attempt, encode(data), b"", seq)
        for seq, (kind, step, attempt, data) in enumerate(drafts, 1)
    ]


USAGE = {"input_tokens": 10, "output_tokens": 5, "cost_usd": 0.01}
ERROR = {"error": {"kind": "transient", "message": "503"}, "usage": USAGE}


def test_attempts_usage_and_time_of_all_tries_are_counted() -> None:
    [row] = steps_of(
        entries(
            (Kind.INTENT, "a", 1, {}),
            (Kind.ATTEMPT_FAILED, "a", 1, ERROR),
            (Kind.INTENT, "a", 2, {}),
            (Kind.STEP_FINISHED, "a", 2, {"result": {}, "usage": USAGE, "ms": 40}),
        )
    )
    assert (row.state, row.attempts, row.repeats, row.ms) == (StepState.COMPLETED, 2, 0, 40)
    assert (row.usage.input_tokens, row.usage.cost_usd, row.seq) == (20, 0.02, 4)
    assert row.error == ""


def test_an_attempt_that_a_crash_left_open_counts_as_a_repeat() -> None:
    [row] = steps_of(
        entries(
            (Kind.INTENT, "a", 1, {}),
            (Kind.CLAIMED, "", 0, {"node": "n2"}),
            (Kind.INTENT, "a", 1, {}),
        )
    )
    assert (row.state, row.attempts, row.repeats) == (StepState.RUNNING, 1, 1)


def test_what_a_rewind_took_back_is_not_shown() -> None:
    rows = steps_of(
        entries(
            (Kind.ACCEPTED, "", 0, {}),
            (Kind.STEP_FINISHED, "a", 1, {"result": 1}),
            (Kind.STEP_FINISHED, "b", 1, {"result": 1}),
            (Kind.REWOUND, "", 0, {"to_seq": 2}),
        )
    )
    assert [row.step for row in rows] == ["a"]


def test_skips_waits_and_failures_say_why() -> None:
    rows = steps_of(
        entries(
            (Kind.STEP_SKIPPED, "s", 0, {"reason": "a failed"}),
            (Kind.WAITING, "w", 0, {"for": "signal", "name": "go", "until": 1 << 62}),
            (Kind.WAITING, "t", 0, {"for": "timer", "until": 1_000_000}),
            (Kind.SIGNAL, "w", 0, {"name": "go", "timed_out": False}),
            (Kind.ATTEMPT_FAILED, "f", 3, {**ERROR, "final": True}),
        )
    )
    by = {row.step: row for row in rows}
    assert (by["s"].state, by["s"].wait) == (StepState.SKIPPED, "a failed")
    assert (by["w"].state, by["w"].wait) == (StepState.COMPLETED, "got go")
    assert by["t"].wait == "timer until 1970-01-01T00:00:01.000Z"
    assert (by["f"].state, by["f"].error, by["f"].attempts) == (StepState.FAILED, "503", 3)


def test_progress_is_the_same_from_the_engine_and_from_the_journal(capsys: object) -> None:
    from_engine = Progress(is_quiet=True)
    from_engine.run_id = RUN
    from_engine.publish(RUN, "failed", "a", 1, dict(ERROR))
    from_engine.publish(RUN, "finished", "a", 2, {"usage": USAGE, "ms": 7})
    from_engine.publish("another run", "finished", "x", 1, {})
    view = StepsView()
    for entry in entries(
        (Kind.ATTEMPT_FAILED, "a", 1, ERROR),
        (Kind.STEP_FINISHED, "a", 2, {"usage": USAGE, "ms": 7}),
    ):
        view.add(entry)
    assert list(from_engine.rows) == ["a"]
    left, right = from_engine.rows["a"], view.rows["a"]
    assert (left.state, left.attempts, left.usage, left.ms) == (
        right.state, right.attempts, right.usage, right.ms,
    )  # fmt: skip

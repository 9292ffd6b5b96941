"""A run's steps as its journal tells them, one row a step, for lists and for progress.

Pure: entries go in, rows come out, in the order in which the steps were first heard of. Entries
that a rewind took back are left out here; their cost stays in the run's total (the fold counts it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llm_orchestrator.engine.gate import NEVER
from llm_orchestrator.engine.replay import hidden
from llm_orchestrator.model import Entry, Json, Kind, StepState, Usage, stamp
from llm_orchestrator.store.journal import decode


@dataclass(slots=True)
class StepView:
    """One step. `ms` is what the last attempt took, where it was measured."""

    step: str
    state: StepState = StepState.RUNNING
    attempts: int = 0
    repeats: int = 0
    usage: Usage = field(default_factory=Usage)
    ms: float | None = None
    wait: str = ""
    error: str = ""
    is_copy: bool = False
    first_at: int = 0
    last_at: int = 0
    seq: int = 0
    """The entry that recorded the result: where a rewind to this checkpoint goes."""

    def to_json(self) -> dict[str, Json]:
        """Every field, for programs."""
        return {
            "step": self.step,
            "state": str(self.state),
            "attempts": self.attempts,
            "repeats": self.repeats,
            **self.usage.to_json(),
            "ms": self.ms,
            "wait": self.wait,
            "error": self.error,
            "is_copy": self.is_copy,
            "seq": self.seq or None,
        }


class StepsView:
    """Rows that grow as entries come."""

    def __init__(self) -> None:
        self.rows: dict[str, StepView] = {}
        self._open: dict[str, int] = {}

    def add(self, entry: Entry) -> StepView | None:
        """Take one entry in; the row that it changed, or None when it belongs to no step."""
        if not entry.step:
            return None
        data = decode(entry.payload)
        row = self.rows.setdefault(entry.step, StepView(entry.step, first_at=entry.recorded_at))
        row.last_at = entry.recorded_at
        row.attempts = max(row.attempts, entry.attempt)
        if "usage" in data:
            row.usage = row.usage + Usage.from_json(data["usage"])
        if "ms" in data:
            row.ms = float(data["ms"])
        if entry.kind == Kind.INTENT:
            if self._open.get(entry.step) == entry.attempt:
                row.repeats += 1
            self._open[entry.step] = entry.attempt
            row.state = StepState.RUNNING
        elif entry.kind == Kind.ATTEMPT_FAILED:
            self._fail(row, entry, data)
        elif entry.kind == Kind.STEP_FINISHED:
            self._finish(row, entry, data)
        elif entry.kind == Kind.STEP_SKIPPED:
            row.state, row.wait = StepState.SKIPPED, str(data.get("reason", ""))
        elif entry.kind == Kind.WAITING:
            row.state, row.wait = StepState.WAITING, _wait(data)
        elif entry.kind == Kind.SIGNAL:
            row.state = StepState.COMPLETED
            row.wait = "timed out" if data.get("timed_out") else f"got {data.get('name', '')}"
            row.seq = entry.seq
        return row

    def _finish(self, row: StepView, entry: Entry, data: dict[str, Json]) -> None:
        self._open.pop(entry.step, None)
        row.state, row.error, row.seq = StepState.COMPLETED, "", entry.seq
        row.is_copy = bool(data.get("is_copy"))
        row.attempts = max(row.attempts, 1)

    def _fail(self, row: StepView, entry: Entry, data: dict[str, Json]) -> None:
        self._open.pop(entry.step, None)
        row.state = StepState.FAILED if data.get("final") else StepState.RUNNING
        error = data.get("error")
        row.error = str(error.get("message", "")) if isinstance(error, dict) else str(error)


def steps_of(entries: Sequence[Entry]) -> list[StepView]:
    """The rows of a whole journal (checked entries, in order)."""
    view, taken_back = StepsView(), hidden(entries)
    for entry in entries:
        if entry.seq not in taken_back:
            view.add(entry)
    return list(view.rows.values())


def _wait(data: dict[str, Json]) -> str:
    until = int(data.get("until", NEVER))
    limit = "" if until >= NEVER else f" until {stamp(until)}"
    if data.get("for") == "timer":
        return f"timer{limit}"
    return f"{data.get('name', 'signal')}{limit}"

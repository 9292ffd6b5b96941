"""What a fork takes over from its origin, and what it will do again. Pure.

A fork from a step keeps every finished step that was recorded before that step was first heard of;
without a step it keeps all of them. What it keeps costs nothing a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from llm_orchestrator.engine.replay import Fold
from llm_orchestrator.engine.steps_view import StepView, steps_of
from llm_orchestrator.errors import NotFound
from llm_orchestrator.model import Entry, Kind, Usage
from llm_orchestrator.store.journal import decode, encode


class Plan(NamedTuple):
    """What a fork would do. `redone` are steps that the origin has begun, with what they took."""

    kept: Sequence[str]
    redone: Sequence[StepView]

    @property
    def usage(self) -> Usage:
        """What `redone` used the first time."""
        return sum((step.usage for step in self.redone), Usage())


def plan(entries: Sequence[Entry], state: Fold, step: str | None) -> Plan:
    """What a fork from `step` would do. Raises NotFound as `kept_before`."""
    kept = {entry.step: None for entry in kept_before(entries, state, step)}
    rows = [row for row in steps_of(entries) if row.step not in kept]
    return Plan(list(kept), rows)


def kept_before(entries: Sequence[Entry], state: Fold, step: str | None) -> list[Entry]:
    """The finished steps that a fork keeps: those recorded before `step` first was.

    Raises NotFound when the run has never heard of `step`.
    """
    kept = {done.seq for done in state.finished.values()}
    kept |= {entry.seq for entry in entries if entry.kind == Kind.STEP_SKIPPED}
    if step is None:
        cut = 1 << 62
    else:
        touched = [entry.seq for entry in entries if entry.step == step]
        touched += [entry.seq for entry in entries if entry.step.startswith(f"{step}/")]
        if not touched:
            raise NotFound(
                f"run {state.run_id} has no step {step!r}", hint=f"llmo runs show {state.run_id}"
            )
        cut = min(touched)
    return [
        entry
        for entry in entries
        if entry.seq in kept
        and entry.seq < cut
        and not (step and (entry.step == step or entry.step.startswith(f"{step}/")))
    ]


def free(payload: bytes) -> bytes:
    """A copied result costs nothing a second time."""
    data = decode(payload)
    data.pop("usage", None)
    data["is_copy"] = True
    return encode(data)

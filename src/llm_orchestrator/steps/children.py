"""What the control steps that run children share: failures, results, and cheap lists of children.

A plan is asked for at the start, when a child has failed, and when all listed children have ended.
Children are made when the engine reads them, not when it plans: a plan over 10,000 items costs what
one over ten does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

from llm_orchestrator.language.base import BaseStep
from llm_orchestrator.model import Json, StepState
from llm_orchestrator.steps.base import Child, Outcome


class LazyChildren(Sequence[Child]):
    """`count` children, each made by `make(place)` whenever it is read; always the same one."""

    def __init__(self, count: int, make: Callable[[int], Child]) -> None:
        self._count = count
        self._make = make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> Child: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Child]: ...

    def __getitem__(self, place: int | slice) -> Child | Sequence[Child]:
        if isinstance(place, slice):
            return [self._make(number) for number in range(*place.indices(self._count))]
        return self._make(range(self._count)[place])


def find_failure(children: Mapping[str, Outcome]) -> str | None:
    """What to say of the first child that failed; None when none has."""
    for key, outcome in children.items():
        if outcome.state is StepState.FAILED:
            return f"{key}: {outcome.error}" if outcome.error else f"{key} failed"
    return None


def result_of(steps: Sequence[BaseStep], outcome: Outcome) -> Json:
    """The first output of the last of `steps`; None when it was skipped."""
    outputs = outcome.outputs.get(steps[-1].id) if steps else None
    return None if outputs is None else steps[-1].first_output(outputs)


def to_limit(value: Any) -> int:
    """`max_concurrency` as a plan says it: 0 is no limit."""
    return int(value or 0)

"""Which steps of a scope may start now, and which never will. Pure; a true ready queue.

A step is ready the moment its last dependency has ended. Rules, so that nothing ever hangs:

- a dependency that failed makes its dependents skipped (unless the failed step said `continue`);
- a dependency that was skipped makes its dependents skipped, unless they say `on_skipped: run`;
- steps without dependencies are ready at once, in file order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from llm_orchestrator.model import StepState

ENDED_WELL = StepState.COMPLETED


class Graph:
    """The steps of one scope. Feed it ends, ask it for starts."""

    def __init__(
        self, dependencies: Mapping[str, Sequence[str]], *, run_if_skipped: Iterable[str] = ()
    ) -> None:
        self._left = {step: len(set(needs)) for step, needs in dependencies.items()}
        self._dependents: dict[str, list[str]] = {step: [] for step in dependencies}
        for step, needs in dependencies.items():
            for need in set(needs):
                self._dependents[need].append(step)
        self._run_if_skipped = frozenset(run_if_skipped)
        self._doomed: dict[str, str] = {}
        self._ready = [step for step, left in self._left.items() if left == 0]
        self._open = set(dependencies)

    @property
    def is_done(self) -> bool:
        """True when every step has ended."""
        return not self._open

    def take_ready(self) -> list[tuple[str, str]]:
        """Steps that may start, each with the reason to skip it ("" to run it). Given out once."""
        ready, self._ready = self._ready, []
        return [(step, self._doomed.get(step, "")) for step in ready]

    def end(self, step: str, state: StepState) -> None:
        """`step` ended as `state`; its dependents come one nearer."""
        self._open.discard(step)
        for dependent in self._dependents[step]:
            if state is StepState.FAILED:
                self._doomed.setdefault(dependent, f"{step} failed")
            elif state is StepState.SKIPPED and dependent not in self._run_if_skipped:
                self._doomed.setdefault(dependent, f"{step} was skipped")
            self._left[dependent] -= 1
            if self._left[dependent] == 0:
                self._ready.append(dependent)

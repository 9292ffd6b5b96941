"""What a step type is: a leaf executes, a control step only plans.

A leaf gets a context and its configuration (already rendered and validated) and returns its natural
outputs, an ordered dict; `output: [a, b]` in a workflow binds them by position. It never writes to
the journal, never retries, never sleeps: the engine does, by the step's `Policy`.

A control step is pure. `plan(config, children)` looks at the outcomes of its children so far and
says what comes next: more children, a wait, or the end. The engine calls it again whenever a child
ends, and at replay, so the same children must always give the same plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from llm_orchestrator.clock import Clock
from llm_orchestrator.model import Effect, Json, StepState, Usage
from llm_orchestrator.providers.base import Partial, Providers

Outputs = dict[str, Json]


class StepContext(Protocol):
    """All that a leaf may know of the engine."""

    run_id: str
    step: str
    """Path of the step in the run, e.g. `summaries/3/summarise`."""
    attempt: int
    idempotency_key: str
    """Stable over attempts and takeovers; hand it to whoever takes one."""
    clock: Clock
    providers: Providers
    partial: Partial | None
    """What an earlier, interrupted attempt of this step had received."""

    async def emit(self, text: str) -> None:
        """Show a piece of a streamed answer to readers and keep it for a resume."""
        ...

    async def reset_stream(self) -> None:
        """Void what was emitted: readers see a reset to offset 0, text and handle are forgotten.

        Called before another answer begins in the same attempt (a fallback, a re-ask), and when a
        partial answer cannot be continued.
        """
        ...

    def keep_handle(self, handle: Mapping[str, Json]) -> None:
        """Keep what the provider needs to go on with this answer."""
        ...

    def add_usage(self, usage: Usage) -> None:
        """Book tokens and dollars on this attempt, also when it fails later."""
        ...

    def note(self, key: str, value: Json) -> None:
        """Put a fact beside the result (resumed_from_tokens, fallback used, ...)."""
        ...

    async def post_outbox(self, name: str, payload: Json) -> None:
        """Write a durable entry that somebody outside fetches, once per step and name."""
        ...


class Leaf(Protocol):
    """A step type that does something."""

    type: ClassVar[str]
    outputs: ClassVar[tuple[str, ...]]
    """Natural output names in binding order."""
    is_paid: ClassVar[bool]

    def effect(self, config: Any) -> Effect:
        """The default effect for this configuration (an http GET is repeatable, a POST is not)."""
        ...

    async def execute(self, context: StepContext, config: Any) -> Outputs:
        """Do it once. Raises OrchestratorError subclasses; anything else counts as a defect."""
        ...


@dataclass(frozen=True, slots=True)
class Child:
    """A scope to run: `key` is its place under the step's path, `steps` its definitions."""

    key: str
    steps: Sequence[Any]
    names: Mapping[str, Json] = field(default_factory=dict)
    """Extra template names inside: item, index."""
    is_shared: bool = False
    """True: steps around see its steps (parallel, branch); False: they do not (map, loop)."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a child scope ended. `outputs` maps step id to its outputs, skipped ones absent."""

    state: StepState
    outputs: Mapping[str, Outputs] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True, slots=True)
class Timer:
    """Wait until a moment: `seconds` from the first time it was planned, or `until` (epoch us)."""

    seconds: float | None = None
    until_us: int | None = None


@dataclass(frozen=True, slots=True)
class Signal:
    """Wait for a message by name. `payload_schema` is checked before it is taken."""

    name: str
    timeout_s: float | None = None
    payload_schema: Mapping[str, Json] | None = None
    is_approval: bool = False


@dataclass(frozen=True, slots=True)
class ChildRun:
    """Start a run of its own and wait for its end."""

    workflow: str
    version: str | None
    inputs: Mapping[str, Json]


@dataclass(frozen=True, slots=True)
class Plan:
    """What comes next. Exactly one of the three is meant: `outputs`, `wait`, or `children`.

    `children` lists all that should exist by now, finished ones included; the engine starts those
    that it does not know yet, at most `max_concurrency` at a time (0: no limit).
    """

    children: Sequence[Child] = ()
    max_concurrency: int = 0
    wait: Timer | Signal | ChildRun | None = None
    outputs: Outputs | None = None
    error: str | None = None


class Names(Protocol):
    """Evaluates an expression with everything the step can see, plus `extra`."""

    def evaluate(self, expression: str, extra: Mapping[str, Json] | None = None) -> Json: ...


class Control(Protocol):
    """A step type that only plans. `waited` is the wait's result once it is over, never None then.

    After a timer it is {}; after a signal {payload, timed_out} (payload may be null); after a
    child run {run_id, state, output, error}. An approval's payload is {approved, form, by}.
    """

    type: ClassVar[str]
    outputs: ClassVar[tuple[str, ...]]

    def plan(
        self,
        config: Any,
        names: Names,
        children: Mapping[str, Outcome],
        *,
        waited: Json | None = None,
    ) -> Plan:
        """Pure. Called at first with no children and `waited` None."""
        ...

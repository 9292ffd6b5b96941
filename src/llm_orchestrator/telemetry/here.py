"""Where a task is in the work: its run, step and attempt. Logs and outgoing requests ask it.

The engine binds a run once per stay and a step once per attempt; tasks that these start inherit it.
Binding is one `ContextVar.set` of a tuple. Whatever costs more (formatting, hashing) is done when
somebody asks: when a line is logged or a request goes out.
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple, Protocol

from llm_orchestrator.telemetry.genai import Asked


@dataclass(frozen=True, slots=True)
class Stay:
    """A run while it is in this process, from its claim to the entry with which it leaves."""

    run_id: str
    epoch: int = 0
    node: str = ""
    traceparent: str = ""
    """The W3C trace context with which the run was accepted, or empty."""


class Recording(Protocol):
    """The span of what this task does (telemetry/tracing.py)."""

    trace_id: str
    span_id: str
    traceparent: str

    def asked(self, question: Asked, *, cost_usd: float, resumed_from_tokens: int) -> None:
        """What was asked of a model, and what is known of its answer."""
        ...


class Here(NamedTuple):
    """A step's name and attempt are "" and 0 outside of steps."""

    stay: Stay
    step: str
    attempt: int
    recording: Recording | None
    """None without tracing."""


_Bound = tuple[Stay, str, int, Recording | None]
Place = Token[_Bound | None]
_NOWHERE: _Bound = (Stay(""), "", 0, None)
bound: ContextVar[_Bound | None] = ContextVar("llm_orchestrator_here", default=None)
"""What `current` reads."""


def enter_run(stay: Stay, recording: Recording | None = None) -> Place:
    """From now on this task, and those that it starts, drive `stay`."""
    return bound.set((stay, "", 0, recording))


def enter_step(step: str, attempt: int, recording: Recording | None = None) -> Place:
    """From now on this task makes an attempt of a step, until `bound.reset`.

    Without a recording of its own it has that of the run.
    """
    now = bound.get() or _NOWHERE
    return bound.set((now[0], step, attempt, recording or now[3]))


def current() -> Here | None:
    """Where this task is; None outside of runs."""
    now = bound.get()
    return None if now is None else Here(*now)


def trace_id_of(stay: Stay) -> str:
    """32 hex digits: the accepting request's trace, or one that follows from the run's id.

    The id itself would do if samplers did not look at its low bits, of which two are not random.
    """
    if stay.traceparent:
        return stay.traceparent[3:35]
    return blake2b(f"trace {stay.run_id}".encode(), digest_size=16).hexdigest()

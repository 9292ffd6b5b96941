"""Trace context: taken from who asks, handed to whom we ask. Needs no part of OpenTelemetry.

`Trace` is what the engine holds of a run's trace; this one has no spans and only says where the
tasks of the run are. With an SDK it is `tracing.SpanTrace`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from llm_orchestrator.telemetry import genai, here

TRACEPARENT = "traceparent"
PREFIX = "llm_orchestrator."
ATTRIBUTES = {
    "run.id": "the run (all spans)",
    "workflow.name": "its workflow (run)",
    "workflow.version": "the workflow's version (run)",
    "run.state": "in which state the run, or this stay of it, ended (run, stay)",
    "run.reason": "why (run, stay)",
    "epoch": "the fencing token of the claim (stay)",
    "node": "the node that drove it (stay)",
    "step": "the step's whole path (step, attempt)",
    "attempts": "how many attempts the step took, lost ones included (step)",
    "attempt": "which attempt, counted from 1 (attempt)",
    "cost_usd": "dollars, by the prices of the time (attempt at `llm`, `embed`)",
    "resumed_from_tokens": "tokens that an interrupted attempt had already paid for (attempt)",
}
"""Our own span attributes, without the prefix; those of GenAI are in telemetry/genai.py."""
_FORM = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_incoming: ContextVar[str] = ContextVar("llm_orchestrator_traceparent", default="")


class Trace:
    """See the module's docstring. What the engine tells is told once its journal entry landed."""

    __slots__ = ()

    def enter(self, step: str, attempt: int, *, is_paid: bool = False) -> Any:
        """An attempt begins in this task; what comes back is for `leave`."""
        return here.enter_step(step, attempt)

    def leave(self, place: Any) -> None:
        """It has ended, one way or another."""
        here.bound.reset(place)

    def finished(self, step: str, attempt: int) -> None:
        """The step has a result."""

    def failed(self, step: str, attempt: int, error: Mapping[str, Any], *, is_final: bool) -> None:
        """An attempt has failed, and the step too if `is_final`."""

    def left(self, state: str, reason: str, error: Any, *, is_final: bool) -> None:
        """The run has left this process."""


UNTRACED = Trace()


def incoming(value: str) -> None:
    """Runs that this task accepts from now on belong to the trace of this `traceparent` header.

    What is not of the W3C's form is ignored, as that document asks.
    """
    value = value.strip()
    _incoming.set(value if _FORM.fullmatch(value) else "")


def accepting() -> str:
    """The traceparent that a run accepted now is stored with; empty: it begins a trace."""
    if value := _incoming.get():
        return value
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:  # then no span can be current
        return ""
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return ""
    ids = f"{context.trace_id:032x}", f"{context.span_id:016x}"
    return header(*ids, is_sampled=context.trace_flags.sampled)


def outgoing() -> dict[str, str]:
    """The header of a request that this task sends: {} outside of traces."""
    now = here.current()
    if now is None:
        return {}
    value = now.recording.traceparent if now.recording else now.stay.traceparent
    return {TRACEPARENT: value} if value else {}


def asked(question: genai.Asked, *, cost_usd: float = 0.0, resumed_from_tokens: int = 0) -> None:
    """Say what this task's attempt asked of a model, on its span if it has one."""
    now = here.current()
    if now is not None and now.recording is not None:
        now.recording.asked(question, cost_usd=cost_usd, resumed_from_tokens=resumed_from_tokens)


def header(trace_id: str, span_id: str, *, is_sampled: bool) -> str:
    """A `traceparent` of version 00."""
    return f"00-{trace_id}-{span_id}-{'01' if is_sampled else '00'}"

"""Traces: one span per run, per stay of it in a process, per step and per attempt.

Two rules make a run one trace, whatever dies under it:

1. Ids are computed, not drawn. The trace is that of the request that accepted the run, or follows
   from the run's id; the spans of a run, of a stay and of a step follow from run, epoch and step.
   Any life of any node makes the same span again without having been told of it.
2. The journal decides who exports. A span is ended, which exports it, by whoever wrote the entry
   that ends what it stands for; the others drop theirs. So nothing appears twice. What a node had
   in flight when it died left no entry and no span; the stay that it broke off is exported by the
   one that takes over, with an error.

Only OpenTelemetry's API is needed, and without an SDK a run's `Trace` has no spans: it only says
where its tasks are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextvars import Token
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    TracerProvider,
    set_span_in_context,
)

from llm_orchestrator.telemetry import genai, here
from llm_orchestrator.telemetry.here import Stay
from llm_orchestrator.telemetry.propagation import PREFIX, UNTRACED, Trace, header
from llm_orchestrator.telemetry.redact import redact

logger = logging.getLogger(__name__)
_NANOSECONDS = 1_000
"""In a microsecond: the engine's times are microseconds, OpenTelemetry's are nanoseconds."""


@dataclass(frozen=True, slots=True)
class Past:
    """What the journal says of a run as this stay begins."""

    workflow: str
    version: str
    created_at: int
    """Microseconds."""
    stay_epoch: int = 0
    """Of the stay before this one; 0 for none."""
    stay_at: int = 0
    """When that one began, microseconds."""
    lost_node: str = ""
    """Who drove it, if it was broken off."""
    ends: int = 0
    """How often the run had ended before it was retried or rewound."""
    mark: Callable[[str], str] = lambda _: ""
    """Tells a step from the one that a rewind took back."""


class Tracing:
    """Makes the spans of one process. Raises ValueError for a tracer that draws its own ids."""

    def __init__(self, provider: TracerProvider, *, names: genai.Version = "latest") -> None:
        self.names = names
        self._tracer: Any = provider.get_tracer("llm_orchestrator")
        if not hasattr(self._tracer, "id_generator"):
            raise ValueError(
                f"{type(provider).__name__} is no SDK of OpenTelemetry, or is disabled"
            )
        self._ids = _Ids(self._tracer.id_generator)
        self._tracer.id_generator = self._ids

    def begin(self, stay: Stay, past: Past) -> Trace:
        """A run comes into this process; this task drives it.

        One that is not sampled costs one span: its steps ask no sampler again.
        """
        run = self._start_run(stay, past)
        if run.is_recording():
            return SpanTrace(self, stay, past, run=run)
        here.enter_run(stay, SpanRecording(run, self.names))
        return UNTRACED

    def _start_run(self, stay: Stay, past: Past) -> Span:
        """The same in each life; whoever ends the run exports it."""
        before = context_of(stay, run_span_id(stay, past.ends - 1)) if past.ends else None
        return self.start(
            f"run {past.workflow}",
            _parsed(stay.traceparent),
            span_id=run_span_id(stay, past.ends),
            trace_id=here.trace_id_of(stay),
            attributes={
                "run.id": stay.run_id,
                "workflow.name": past.workflow,
                "workflow.version": past.version,
            },
            links=(before,) if before is not None else (),
            start_us=0 if past.ends else past.created_at,
        )

    def start(
        self,
        name: str,
        parent: Span | SpanContext | None,
        *,
        span_id: str = "",
        trace_id: str = "",
        attributes: Mapping[str, Any] | None = None,
        links: tuple[SpanContext, ...] = (),
        start_us: int = 0,
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> Span:
        """A span that is exported when it is ended, and never if it is not. Ids are hex."""
        above = NonRecordingSpan(parent) if isinstance(parent, SpanContext) else parent
        self._ids.span_id = int(span_id or "0", 16)
        self._ids.trace_id = int(trace_id or "0", 16)
        tracer: Tracer = self._tracer
        return tracer.start_span(
            name,
            otel_context.Context() if above is None else set_span_in_context(above),
            kind=kind,
            attributes={PREFIX + key: value for key, value in (attributes or {}).items()},
            links=[Link(each) for each in links],
            start_time=start_us * _NANOSECONDS if start_us else None,
        )


class _Ids:
    """An SDK's generator of ids that can be told the next ones. Used by one thread."""

    def __init__(self, drawn: Any) -> None:
        self._drawn = drawn
        self.trace_id = self.span_id = 0

    def generate_trace_id(self) -> int:
        """Called for a span without a parent."""
        chosen, self.trace_id = self.trace_id, 0
        return chosen or int(self._drawn.generate_trace_id())

    def generate_span_id(self) -> int:
        """Called for each span."""
        chosen, self.span_id = self.span_id, 0
        return chosen or int(self._drawn.generate_span_id())

    def is_trace_id_random(self) -> bool:
        """A hash of a random id is as good."""
        return True


class SpanRecording:
    """`here.Recording`: the span of a task, and under which names it speaks of models."""

    __slots__ = ("names", "span", "span_id", "trace_id", "traceparent")

    def __init__(self, span: Span, names: genai.Version) -> None:
        self.span = span
        self.names = names
        context = span.get_span_context()
        self.trace_id = f"{context.trace_id:032x}"
        self.span_id = f"{context.span_id:016x}"
        self.traceparent = header(
            self.trace_id, self.span_id, is_sampled=context.trace_flags.sampled
        )

    def asked(self, question: genai.Asked, *, cost_usd: float, resumed_from_tokens: int) -> None:
        """See propagation.asked."""
        span = self.span
        span.update_name(f"{question.operation} {question.request_model}")
        span.set_attributes(genai.attributes(question, self.names))
        if cost_usd:
            span.set_attribute(f"{PREFIX}cost_usd", cost_usd)
        if resumed_from_tokens:
            span.set_attribute(f"{PREFIX}resumed_from_tokens", resumed_from_tokens)


class SpanTrace(Trace):
    """The spans of one stay: the run's, the stay's, and those of the steps that are open."""

    def __init__(self, tracing: Tracing, stay: Stay, past: Past, *, run: Span) -> None:
        self._tracing = tracing
        self._stay = stay
        self._past = past
        self._steps: dict[str, tuple[Span, Span]] = {}
        """By step: its span and that of the attempt in flight."""
        self._run = run
        self._span = self._start_stay(stay.epoch, stay.node, previous=past.stay_epoch)
        if past.lost_node:
            self._end_lost()
        here.enter_run(stay, SpanRecording(self._span, tracing.names))

    def _start_stay(self, epoch: int, node: str, *, previous: int = 0, start_us: int = 0) -> Span:
        before = context_of(self._stay, self._stay_span_id(previous)) if previous else None
        return self._tracing.start(
            f"stay {self._past.workflow}",
            self._run,
            span_id=self._stay_span_id(epoch),
            attributes={"run.id": self._stay.run_id, "epoch": epoch, "node": node},
            links=(before,) if before is not None else (),
            start_us=start_us,
        )

    def _end_lost(self) -> None:
        """Export the stay before this one for the node that cannot any more."""
        past = self._past
        lost = self._start_stay(past.stay_epoch, past.lost_node, start_us=past.stay_at)
        _fail(lost, {"kind": "node_lost", "message": f"node {past.lost_node} was lost"})
        lost.end()

    # -- what the engine tells ----------------------------------------------------------------

    def enter(self, step: str, attempt: int, *, is_paid: bool = False) -> Any:
        """An attempt begins in this task; an earlier one of the step that left no entry is void."""
        run_id = self._stay.run_id
        if step in self._steps:
            whole, _ = self._steps[step]
        else:
            whole = self._tracing.start(
                f"step {step.rpartition('/')[2]}",
                self._span,
                span_id=_span_id("step", run_id, self._past.mark(step) + step, self._past.ends),
                attributes={"run.id": run_id, "step": step},
            )
        tried = self._tracing.start(
            f"attempt {step.rpartition('/')[2]}",
            whole,
            attributes={"run.id": run_id, "step": step, "attempt": attempt},
            kind=SpanKind.CLIENT if is_paid else SpanKind.INTERNAL,
        )
        self._steps[step] = whole, tried
        place = here.enter_step(step, attempt, SpanRecording(tried, self._tracing.names))
        return place, otel_context.attach(set_span_in_context(tried))

    def leave(self, place: Any) -> None:
        """The task is where it was before."""
        bound: here.Place
        token: Token[otel_context.Context]
        bound, token = place
        otel_context.detach(token)
        here.bound.reset(bound)

    def finished(self, step: str, attempt: int) -> None:
        """The entry of a step's result has landed."""
        if (open_spans := self._steps.pop(step, None)) is not None:
            whole, tried = open_spans
            tried.end()
            whole.set_attribute(f"{PREFIX}attempts", attempt)
            whole.end()

    def failed(self, step: str, attempt: int, error: Mapping[str, Any], *, is_final: bool) -> None:
        """The entry of a failed attempt has landed."""
        if step not in self._steps:
            return
        whole, tried = self._steps[step]
        _fail(tried, error)
        tried.end()
        if is_final:
            del self._steps[step]
            _fail(whole, error)
            whole.set_attribute(f"{PREFIX}attempts", attempt)
            whole.end()

    def left(self, state: str, reason: str, error: Any, *, is_final: bool) -> None:
        """The entry with which the run leaves this process has landed."""
        for span in (self._span, self._run) if is_final else (self._span,):
            span.set_attribute(f"{PREFIX}run.state", str(state))
            if reason:
                span.set_attribute(f"{PREFIX}run.reason", str(reason))
            if isinstance(error, Mapping):
                _fail(span, error)
            span.end()

    def _stay_span_id(self, epoch: int) -> str:
        return _span_id("stay", self._stay.run_id, epoch)


def run_span_id(stay: Stay, ends: int) -> str:
    """The span of a run that had ended so often before."""
    return _span_id("run", stay.run_id, ends)


def context_of(stay: Stay, span_id: str) -> SpanContext:
    """A span of the run's trace, for links."""
    flags = TraceFlags(TraceFlags.SAMPLED)
    return SpanContext(int(here.trace_id_of(stay), 16), int(span_id, 16), True, flags)


def _span_id(*words: object) -> str:
    """16 hex digits that follow from `words`."""
    return blake2b(" ".join(map(str, words)).encode(), digest_size=8).hexdigest()


def _parsed(traceparent: str) -> SpanContext | None:
    if not traceparent:
        return None
    _, trace_id, span_id, flags = traceparent.split("-")[:4]
    return SpanContext(int(trace_id, 16), int(span_id, 16), True, TraceFlags(int(flags, 16)))


def _fail(span: Span, error: Mapping[str, Any]) -> None:
    """As the journal says it: kind and message, no traceback (it may show values)."""
    span.set_attribute("error.type", str(error.get("kind", "error")))
    span.set_status(Status(StatusCode.ERROR, redact(str(error.get("message", "")))))

"""Where the spans go: the process's own OpenTelemetry SDK, or OTLP over HTTP as configured.

A provider that the process has set up is used as it is. Else, with an endpoint, one is made here
out of the extra `otel`; the SDK reads the other `OTEL_*` variables (service name, headers,
sampler, batch sizes) by itself. Spans are sent by a thread of the SDK, from a bounded queue: an
endpoint that is down costs spans, never a run.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from llm_orchestrator import __version__
from llm_orchestrator.config import Config, without_password

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    from llm_orchestrator.telemetry.genai import Version
    from llm_orchestrator.telemetry.tracing import Tracing

logger = logging.getLogger(__name__)
FLUSH_S = 3.0
"""What the last spans get at the end."""


@dataclass(frozen=True, slots=True)
class Telemetry:
    """What a process traces with; `tracing` None is nothing. `close` sends what is left."""

    tracing: Tracing | None = None
    own: TracerProvider | None = None

    async def close(self) -> None:
        """Bounded in time: what cannot be sent by then is lost."""
        if self.own is None:
            return
        loop, is_sent = asyncio.get_running_loop(), asyncio.Event()
        own = self.own

        def flush() -> None:
            own.shutdown()
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(is_sent.set)

        # Not the loop's executor, for whose threads the loop waits however long they take.
        threading.Thread(target=flush, name="telemetry-flush", daemon=True).start()
        try:
            async with asyncio.timeout(FLUSH_S):
                await is_sent.wait()
        except TimeoutError:
            logger.warning("the last spans could not be sent within %g s", FLUSH_S)


def set_up(config: Config, node_id: str) -> Telemetry:
    """Never fails: a process without traces is better than none."""
    provider: Any = _of_process()
    own = None
    if provider is None and config.otel_endpoint:
        provider = own = _make(config, node_id)
    if provider is None:
        return Telemetry()
    from llm_orchestrator.telemetry.tracing import Tracing  # noqa: PLC0415 (a slow import)

    try:
        return Telemetry(Tracing(provider, names=cast("Version", config.otel_genai)), own)
    except ValueError as error:
        logger.warning("nothing is traced: %s", error)
        return Telemetry()


def _of_process() -> Any:
    """The provider that somebody has set for the whole process, if anybody has."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:  # nobody can have
        return None
    provider = trace.get_tracer_provider()
    nothing = (trace.ProxyTracerProvider, trace.NoOpTracerProvider)
    return None if isinstance(provider, nothing) else provider


def _make(config: Config, node_id: str) -> TracerProvider | None:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415 (extra)
            OTLPSpanExporter,
        )
        from opentelemetry.sdk.resources import (  # noqa: PLC0415 (extra)
            OTELResourceDetector,
            Resource,
        )
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415 (extra)
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415 (extra)
    except ImportError:
        logger.warning(
            "spans should go to %s, but the SDK is not installed: pip install "
            "'llm-orchestrator[otel]'",
            config.otel_endpoint,
        )
        return None
    facts = {
        "service.name": "llm-orchestrator",
        "service.version": __version__,
        "service.instance.id": node_id,
        "deployment.region": config.region,
    }
    resource = Resource.create().merge(Resource(facts)).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = Announced(OTLPSpanExporter(endpoint=config.otel_endpoint), config.otel_endpoint)
    provider.add_span_processor(BatchSpanProcessor(cast("SpanExporter", exporter)))
    return provider


class Announced:
    """An exporter that says once that it cannot send, why, and once that it can again."""

    def __init__(self, exporter: SpanExporter, place: str) -> None:
        self._exporter = exporter
        self._place = without_password(place)
        self._is_down = False
        # Its retries are its own affair; its errors say why, and once is enough.
        theirs = logging.getLogger(type(exporter).__module__)
        theirs.setLevel(logging.ERROR)
        theirs.addFilter(lambda _: not self._is_down)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Called by the SDK's thread."""
        result = self._exporter.export(spans)
        is_down = result.name != "SUCCESS"
        if is_down and not self._is_down:
            logger.warning("spans cannot be sent to %s; until they can they are lost", self._place)
        elif self._is_down and not is_down:
            logger.warning("spans are sent to %s again", self._place)
        self._is_down = is_down
        return result

    def shutdown(self) -> None:
        """Send no more."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Send now."""
        return self._exporter.force_flush(timeout_millis)

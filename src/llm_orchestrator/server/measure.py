"""Counts HTTP requests as they end. The outermost part of ours: refusals count, too.

A request is told by the route that took it, never by its path; what no route took is `other`. The
time of a stream says how long somebody listened, so streams are counted and not timed.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm_orchestrator.clock import Clock
from llm_orchestrator.telemetry.metrics import OTHER, Metrics, Sample

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Measure:
    """See the module's docstring."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, clock: Clock) -> None:
        self._app = app
        self._metrics = metrics
        self._clock = clock
        self._streams = 0
        metrics.watch(lambda: [Sample("streams_open", (), self._streams)])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = self._clock.monotonic()
        status, is_stream = 500, False

        async def watched(message: Message) -> None:
            nonlocal status, is_stream
            if message["type"] == "http.response.start":
                status = message["status"]
                is_stream = _is_stream(message)
                self._streams += is_stream
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            self._streams -= is_stream
            method = scope["method"] if scope["method"] in _METHODS else OTHER
            route = self._metrics.routes(_route(scope))
            self._metrics.count("http_requests_total", method, route, str(status))
            if not is_stream:
                took_s = self._clock.monotonic() - began
                self._metrics.observe("http_request_duration_seconds", took_s, method, route)


def _route(scope: Scope) -> str:
    """The path of the route that took the request, its prefix included; "" when none did.

    (In newer versions of FastAPI the route itself knows its path without the prefix.)
    """
    found = scope.get("fastapi", {}).get("effective_route_context") or scope.get("route")
    return str(getattr(found, "path", ""))


def _is_stream(message: Message) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream")
        for name, value in message.get("headers", ())
    )

"""The trace of whoever asks: runs that a request accepts belong to it."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from llm_orchestrator.telemetry.propagation import incoming


class TraceContext:
    """Reads the `traceparent` header (W3C Trace Context) of each request. Two are none."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            found = [value for name, value in scope["headers"] if name == b"traceparent"]
            incoming(found[0].decode("latin-1") if len(found) == 1 else "")
        await self._app(scope, receive, send)

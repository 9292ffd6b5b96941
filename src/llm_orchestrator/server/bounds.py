"""Bounds on what a request may bring: body, query, number and size of headers.

A body is counted as it comes; one that says that it is too large is refused before it is read.
(protocol.py bounds the head as a whole.)
"""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm_orchestrator.server.problems import problem

BODY_BYTES_MAX = 16 * 1024 * 1024
QUERY_BYTES_MAX = 8 * 1024
HEADERS_MAX = 100
HEADER_BYTES_MAX = 16 * 1024


class _TooLarge(Exception):
    """More came than was allowed."""


class Bounds:
    """See the module's docstring."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = _refusal(scope)
        if refusal:
            await problem(413 if "body" in refusal else 431, "too_large", refusal)(
                scope, receive, send
            )
            return
        seen = 0
        is_begun = False

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > BODY_BYTES_MAX:
                    raise _TooLarge
            return message

        async def watched(message: Message) -> None:
            nonlocal is_begun
            is_begun = True
            await send(message)

        try:
            await self._app(scope, counted, watched)
        except _TooLarge:
            if not is_begun:
                await problem(413, "too_large", _body())(scope, receive, send)


def _body() -> str:
    return f"the body is larger than {BODY_BYTES_MAX} bytes"


def _refusal(scope: Scope) -> str:
    headers = scope["headers"]
    if len(scope.get("query_string", b"")) > QUERY_BYTES_MAX:
        return f"the query is longer than {QUERY_BYTES_MAX} bytes"
    if len(headers) > HEADERS_MAX:
        return f"there are more than {HEADERS_MAX} headers"
    for name, value in headers:
        if len(name) + len(value) > HEADER_BYTES_MAX:
            return f"a header is longer than {HEADER_BYTES_MAX} bytes"
        if name == b"content-length" and value.isdigit() and int(value) > BODY_BYTES_MAX:
            return _body()
    return ""

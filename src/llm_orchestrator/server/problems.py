"""Our errors as RFC 9457 problem details: stable `type` and `code`, the hint, what to do next."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from llm_orchestrator import errors
from llm_orchestrator.model import Json
from llm_orchestrator.server.auditing import went_wrong
from llm_orchestrator.server.openapi import MEDIA_TYPE, methods_at
from llm_orchestrator.telemetry.redact import redact_json

logger = logging.getLogger(__name__)
BASE = "urn:llm-orchestrator:problem:"
RETRY_AFTER_S = 2
_STATUS: tuple[tuple[type[errors.OrchestratorError], int], ...] = (
    (errors.Unauthenticated, 401),
    (errors.Denied, 403),
    (errors.NotFound, 404),
    (errors.TooLarge, 413),
    (errors.KeyReused, 422),
    (errors.AuthorError, 422),
    (errors.Refused, 409),
    (errors.RunPaused, 409),
    (errors.StoreUnavailable, 503),
    (errors.StoreFull, 503),
    (errors.StoreReadOnly, 503),
    (errors.StoreLocked, 503),
)
"""First match wins; a `retryable` error is 503 and everything else 500."""
_CODES = {404: "not_found", 405: "method_not_allowed", 415: "unsupported_media_type"}
_TITLES = {
    400: "The request makes no sense",
    401: "Who are you?",
    403: "Not allowed",
    404: "Not found",
    405: "This method is not known here",
    409: "It does not fit the state that the thing is in",
    413: "Too large",
    415: "This media type is not known here",
    422: "The content is wrong",
    503: "Not at the moment",
    500: "Something broke on our side",
}


def status_of(error: errors.OrchestratorError) -> int:
    """The HTTP status of one of our errors."""
    for kind, status in _STATUS:
        if isinstance(error, kind):
            return status
    return 503 if error.retryable else 500


def problem(
    status: int,
    code: str,
    detail: str,
    *,
    retryable: bool = False,
    headers: Mapping[str, str] | None = None,
    **more: Json,
) -> JSONResponse:
    """One problem document, without the secrets that this process knows."""
    body: dict[str, Json] = {
        "type": BASE + code,
        "title": _TITLES.get(status, "The request failed"),
        "status": status,
        "code": code,
        "detail": detail,
        "retryable": retryable,
    }
    body |= {key: value for key, value in more.items() if value is not None}
    return JSONResponse(
        redact_json(body), status, headers=dict(headers or {}), media_type=MEDIA_TYPE
    )


def problem_of(error: errors.OrchestratorError) -> JSONResponse:
    """One of our errors as a problem document."""
    status = status_of(error)
    headers: dict[str, str] = {}
    if status == 503:
        after = getattr(error, "retry_after_s", None) or RETRY_AFTER_S
        headers["retry-after"] = str(max(1, math.ceil(after)))
    if status == 401:
        headers["www-authenticate"] = 'Bearer realm="llm-orchestrator"'
    if status == 500:
        logger.error("request failed: %s", error.message)
    more: dict[str, Json] = {"hint": error.hint}
    for name in ("run_id", "epoch", "reason", "state"):
        more[name] = getattr(error, name, None)
    if isinstance(error, errors.DefinitionError):
        more["problems"] = [dict(each._asdict(), path=None) for each in error.problems]
    return problem(
        status, error.kind, error.message, retryable=error.retryable, headers=headers, **more
    )


def install(app: FastAPI) -> None:
    """Every error that leaves a route becomes a problem document."""

    @app.exception_handler(errors.OrchestratorError)
    async def ours(request: Request, error: errors.OrchestratorError) -> JSONResponse:
        went_wrong(error)
        return problem_of(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        found = [
            {"place": [str(part) for part in each["loc"]], "message": each["msg"]}
            for each in error.errors()
        ]
        return problem(422, "invalid_request", "the request does not fit", problems=found)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        code = _CODES.get(error.status_code, "http")
        headers = dict(error.headers or {})
        if error.status_code == 405:  # the framework names one operation's methods only
            headers = {"allow": ", ".join(methods_at(app, request.url.path))}
        return problem(error.status_code, code, str(error.detail), headers=headers)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        what = f"{request.method} {request.url.path}"
        logger.error("a request broke: %s", what, exc_info=error)
        return problem(500, "internal", "something broke on our side; the log has it")

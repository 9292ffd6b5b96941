"""The document of the API: what FastAPI knows of the routes, and what all of them share.

Every operation may answer with problem details (RFC 9457); the statuses that it shares with all the
others are added here, once. `llmo`'s repository keeps the document (docs/reference/openapi.json);
tests/test_docs.py compares.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from llm_orchestrator.server.problems import MEDIA_TYPE
from llm_orchestrator.server.strict import StrictRoute

Json = dict[str, Any]
_DESCRIPTION = """Durable workflows of LLM calls.

Errors are problem details (RFC 9457) with a stable `type` and `code`; `retryable` says whether the
same request may help later, `hint` what to do. Unknown query parameters and fields are refused.
Lists are read page by page: hand `next` back as `cursor`."""
_ALWAYS = {
    "401": "No valid token came with the request.",
    "403": "Whoever asks may not do this.",
    "413": "The body is too large.",
    "422": "The request does not fit: `problems` says where.",
    "431": "The query or the headers are too large.",
    "500": "Something broke on our side, or stored bytes fail their check.",
    "503": "Not at the moment; Retry-After says when to ask again.",
}
_PUBLIC = {"401", "403"}
TAGS = (
    ("workflows", "Definitions, and starting runs of them."),
    ("runs", "Looking at runs and changing them."),
    ("earlier names", "The same under the earlier system's paths."),
    ("admin", "The server, its nodes, its settings."),
    ("health", "Whether it works; without a token, at the root."),
)


class Problem(BaseModel):
    """An error (RFC 9457)."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    retryable: bool
    hint: str | None = None
    run_id: str | None = None
    epoch: int | None = None
    reason: str | None = None
    state: str | None = None
    problems: list[dict[str, Any]] | None = None


def install(app: FastAPI) -> None:
    """Let the application give this document instead of FastAPI's own."""

    def document() -> Json:
        if app.openapi_schema is None:
            app.openapi_schema = make(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def make(app: FastAPI) -> Json:
    """The whole document."""
    document = get_openapi(
        title=app.title,
        version=app.version,
        description=_DESCRIPTION,
        routes=app.routes,
        tags=[{"name": name, "description": text} for name, text in TAGS],
    )
    components: Json = document.setdefault("components", {})
    schemas: Json = components.setdefault("schemas", {})
    schemas.pop("HTTPValidationError", None)
    schemas.pop("ValidationError", None)
    models: list[type[BaseModel]] = [Problem]
    for route in app.routes:
        if isinstance(route, StrictRoute):
            models += [body.model for body in route.bodies]
            for method in route.methods or ():
                operation = document["paths"][route.path_format][method.lower()]
                _complete(operation, route)
    _, found = models_json_schema(
        [(model, "validation") for model in dict.fromkeys(models)],
        ref_template="#/components/schemas/{model}",
    )
    schemas.update(found["$defs"])
    components["securitySchemes"] = {
        "token": {"type": "http", "scheme": "bearer", "description": "LLM_ORCHESTRATOR_TOKEN"}
    }
    return document


def _complete(operation: Json, route: StrictRoute) -> None:
    is_public = route.path_format.startswith("/health")
    if not is_public:
        operation["security"] = [{"token": []}]
    for body in route.bodies:
        reference = {"$ref": f"#/components/schemas/{body.model.__name__}"}
        operation["requestBody"] = {
            "required": body.is_required,
            "content": {"application/json": {"schema": reference}},
        }
    answers: Json = operation["responses"]
    shared = {**_ALWAYS, "415": "Another media type is wanted."}
    for status, text in shared.items():
        if status == "415" and "requestBody" not in operation:
            continue
        if is_public and status in _PUBLIC:
            continue
        answers[status] = {"description": text}
    for status, answer in answers.items():
        if int(status) >= 400 and not answer.get("content"):
            reference = {"$ref": "#/components/schemas/Problem"}
            answer["content"] = {MEDIA_TYPE: {"schema": reference}}
    operation["responses"] = dict(sorted(answers.items()))


def answers(*statuses: int, **models: type[BaseModel]) -> Any:
    """`responses=` of a route: problem statuses, and models by status (`_200=RunFacts`)."""
    words = {
        201: "Created.",
        202: "Accepted; it goes on without the caller.",
        200: "Done.",
        503: "Not healthy.",
        404: "There is no such thing.",
        409: "It does not fit the state that the thing is in.",
    }
    found: dict[int, Json] = {}
    for name, model in models.items():
        status = int(name.lstrip("_"))
        found[status] = {"model": model, "description": words.get(status, "")}
    for status in statuses:
        found[status] = {"description": words[status]}
    return found

"""The document of the API: what FastAPI knows of the routes, and what all of them share.

Every operation may answer with problem details (RFC 9457); the statuses that it shares with all the
others are added here, once. `llmo`'s repository keeps the document (docs/reference/openapi.json);
tests/test_docs.py compares.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

Json = dict[str, Any]
MEDIA_TYPE = "application/problem+json"
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
    ("streams", "A run as it moves: server-sent events, WebSocket, plain text."),
    ("earlier names", "The same under the earlier system's paths."),
    ("audit", "Who did what; that nobody has changed it."),
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
    schemas["Problem"] = Problem.model_json_schema()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _complete(operation, schemas, is_public=not path.startswith(("/api", "/v1")))
    components["schemas"] = dict(sorted(schemas.items()))
    components["securitySchemes"] = {
        "token": {"type": "http", "scheme": "bearer", "description": "LLM_ORCHESTRATOR_TOKEN"}
    }
    return document


def methods_at(app: FastAPI, path: str) -> list[str]:
    """The methods that the document has for a path; what Allow says."""
    found: set[str] = set()
    paths: Json = app.openapi()["paths"]
    for template, operations in {path: paths[path]}.items() if path in paths else paths.items():
        if _pattern(template).fullmatch(path):
            found |= {method.upper() for method in operations}
    return sorted(found)


@cache
def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"(\{\w+\})", template)
    return re.compile("".join("[^/]+" if part[:1] == "{" else re.escape(part) for part in parts))


def _complete(operation: Json, schemas: Json, *, is_public: bool) -> None:
    if not is_public:
        operation["security"] = [{"token": []}]
    for parameter in operation.get("parameters", ()):
        _never_null(parameter)
    for content in operation.get("requestBody", {}).get("content", {}).values():
        _hoist(content, schemas)
    answers: Json = operation["responses"]
    shared = dict(_ALWAYS)
    if "requestBody" in operation:
        shared["415"] = "Another media type is wanted."
    for status, text in shared.items():
        if is_public and status in _PUBLIC:
            continue
        if not answers.get(status, {}).get("content") or status == "422":
            answers[status] = {"description": text}
    for status, answer in answers.items():
        if int(status) >= 400 and not answer.get("content"):
            reference = {"$ref": "#/components/schemas/Problem"}
            answer["content"] = {MEDIA_TYPE: {"schema": reference}}
    operation["responses"] = dict(sorted(answers.items()))


def _never_null(parameter: Json) -> None:
    """A parameter that is left out is left out; nobody can send null in a query or a header."""
    schema: Json = parameter["schema"]
    kinds = [kind for kind in schema.pop("anyOf", ()) if kind != {"type": "null"}]
    if len(kinds) == 1:
        parameter["schema"] = {**kinds[0], **schema}
    elif kinds:
        schema["anyOf"] = kinds


def _hoist(content: Json, schemas: Json) -> None:
    """Move a body's schema, and those that it stands on, to the document's components."""
    schema: Json = content["schema"]
    found = dict(schema.pop("$defs", {}))
    if "title" in schema and "properties" in schema:
        found[schema["title"]] = schema
        content["schema"] = {"$ref": f"#/components/schemas/{schema['title']}"}
    for name, each in found.items():
        assert schemas.setdefault(name, each) == each, f"two models are called {name}"


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

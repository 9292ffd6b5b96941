"""Requests are taken at their word or refused: nothing in them is ignored, nothing is guessed.

`StrictRoute` refuses query parameters that the operation does not have (or that come twice), and a
body that it does not take. `JsonBody` reads a body straight into its model: 415 for another media
type, 422 with the place of each mistake.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from fastapi import HTTPException, Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

M = TypeVar("M", bound=BaseModel)
_NO_BODY = (b"", b"{}")
Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class JsonBody(Generic[M]):
    """A dependency: the request's JSON body as a model. Without `is_required` it may be absent."""

    def __init__(self, model: type[M], *, is_required: bool = True) -> None:
        self.model = model
        self.is_required = is_required
        self._validate = model.__pydantic_validator__.validate_json

    def document(self) -> dict[str, Any]:
        """The body in OpenAPI's words; openapi.py moves the schema to where the others are."""
        schema = self.model.model_json_schema(ref_template="#/components/schemas/{model}")
        return {
            "required": self.is_required,
            "content": {"application/json": {"schema": schema}},
        }

    async def __call__(self, request: Request) -> M:
        """Raises HTTPException 415, RequestValidationError."""
        content = await request.body()
        if not content and not self.is_required:
            content = b"{}"
        elif not is_json(request.headers.get("content-type")):
            raise HTTPException(415, "send application/json")
        if b"NaN" in content or b"Infinity" in content:
            _refuse_constants(content)
        try:
            found: M = self._validate(content, strict=True)
        except ValidationError as error:
            raise wrong(error, "body") from error
        return found


def _refuse_constants(content: bytes) -> None:
    """NaN and Infinity are no JSON, though the parser would take them; as words they may stand."""

    def refuse(name: str) -> None:
        raise invalid("body", "", f"{name} is no JSON")

    with contextlib.suppress(ValueError):  # whatever else is wrong, the parser says better
        json.loads(content, parse_constant=refuse)


def is_json(content_type: str | None) -> bool:
    """True for `application/json`, whatever stands behind it."""
    return (content_type or "").partition(";")[0].strip().lower() == "application/json"


def wrong(error: ValidationError, *where: str) -> RequestValidationError:
    """What is wrong with a part of a request, in FastAPI's words."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    return RequestValidationError([{**each, "loc": (*where, *each["loc"])} for each in found])


def invalid(where: str, name: str, message: str) -> RequestValidationError:
    """One thing that is wrong with a request."""
    return RequestValidationError([{"loc": (where, name), "msg": message, "type": "value_error"}])


class StrictRoute(APIRoute):
    """See the module's docstring."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        for body in _bodies(self.dependant):
            self.openapi_extra = {**(self.openapi_extra or {}), "requestBody": body.document()}

    def get_route_handler(self) -> Handler:
        """FastAPI's handler behind the checks of the query and of a body that is not wanted."""
        handler = super().get_route_handler()
        known = _query_names(self.dependant) | {
            each["name"]: False
            for each in (self.openapi_extra or {}).get("parameters", ())
            if each["in"] == "query"
        }
        is_anything = not self.include_in_schema
        takes_body = any(_bodies(self.dependant)) or bool(
            (self.openapi_extra or {}).get("requestBody")
        )

        async def strict(request: Request) -> Response:
            if is_anything:
                return await handler(request)
            if request.scope["query_string"]:
                _check_query(request, known)
            if not takes_body and await request.body() not in _NO_BODY:
                raise invalid("body", "", "this operation takes no body")
            return await handler(request)

        return strict


def _bodies(dependant: Dependant) -> list[JsonBody[Any]]:
    return [each.call for each in dependant.dependencies if isinstance(each.call, JsonBody)]


def _query_names(dependant: Dependant) -> dict[str, bool]:
    """Every query parameter's name, and whether it may come more than once."""
    found: dict[str, bool] = {}
    for field in dependant.query_params:
        kind = field.field_info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            for name, inner in kind.model_fields.items():
                found[inner.alias or name] = "list[" in str(inner.annotation)
        else:
            found[field.alias] = "list[" in str(kind)
    for each in dependant.dependencies:
        found |= _query_names(each)
    return found


def _check_query(request: Request, known: dict[str, bool]) -> None:
    seen: set[str] = set()
    for name, _ in request.query_params.multi_items():
        if name not in known:
            names = ", ".join(sorted(known)) or "none"
            raise invalid("query", name, f"unknown parameter; there is: {names}")
        if name in seen and not known[name]:
            raise invalid("query", name, "given twice")
        seen.add(name)

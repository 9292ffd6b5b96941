"""Check a value against a JSON Schema, without ever fetching one from elsewhere.

Kept apart because the validator takes long to import: only a step with a schema pays for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jsonschema.exceptions import SchemaError, best_match
from jsonschema.validators import Draft202012Validator, validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from llm_orchestrator.errors import AuthorError
from llm_orchestrator.language import sandbox
from llm_orchestrator.language.sandbox import TooMuch
from llm_orchestrator.model import Json

PROBLEMS_MAX = 5
_WORDS_MAX = 200
_MEETINGS_MAX = 20_000
_DEAR = frozenset(
    {"pattern", "patternProperties", "uniqueItems", "unevaluatedItems", "unevaluatedProperties"}
    | {"$ref", "$dynamicRef", "$recursiveRef"}
)
"""Words that look at a value more than once."""


def find_problems(value: Json, schema: Mapping[str, Json]) -> list[str]:
    """What is wrong with `value`, at most five lines; empty when it fits.

    Raises AuthorError when the schema itself is wrong, points outside itself, or takes too long.
    """
    if _is_light(value, schema):
        return _find_problems(value, schema)
    try:
        said = sandbox.ask(f"{__name__}:answer", {"value": value, "schema": dict(schema)})
    except TooMuch as error:
        raise AuthorError(f"checking the schema is too much: {error.message}") from error
    if "error" in said:
        raise AuthorError(said["error"], hint=said["hint"])
    problems: list[str] = said["problems"]
    return problems


def answer(question: Mapping[str, Any]) -> Json:
    """In a child: {"problems"} or {"error", "hint"}."""
    try:
        return {"problems": list(_find_problems(question["value"], question["schema"]))}
    except AuthorError as error:
        return {"error": error.message, "hint": error.hint}


def _is_light(value: Json, schema: Mapping[str, Json]) -> bool:
    """True if each part of the schema meets each part of the value once at most, and both few."""
    words, size = 0, 1
    left: list[Any] = [schema]
    while left and words <= _WORDS_MAX:
        inner = left.pop()
        words += 1
        if isinstance(inner, Mapping):
            if not _DEAR.isdisjoint(inner):
                return False
            left += inner.values()
        elif isinstance(inner, list):
            left += inner
    left = [value]
    while left and words * size <= _MEETINGS_MAX:
        inner = left.pop()
        size += 1
        if isinstance(inner, Mapping | list):
            left += inner.values() if isinstance(inner, Mapping) else inner
    return words <= _WORDS_MAX and words * size <= _MEETINGS_MAX


def _find_problems(value: Json, schema: Mapping[str, Json]) -> list[str]:
    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(dict(schema))
        validator = kind(dict(schema), registry=Registry())
        errors = [
            best_match(error.context) if error.context else error
            for error in validator.iter_errors(value)
        ]
    except SchemaError as error:
        raise AuthorError(f"the schema is wrong at {error.json_path}: {error.message}") from error
    except Unresolvable as error:
        raise AuthorError(
            f"the schema refers to {error.ref!r}, which it does not hold",
            hint="put what it refers to under $defs in the same schema",
        ) from error
    return [f"{error.json_path}: {error.message}" for error in errors[:PROBLEMS_MAX] if error]

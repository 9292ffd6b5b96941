"""Check a value against a JSON Schema, without ever fetching one from elsewhere.

Kept apart because the validator takes long to import: only a step with a schema pays for it.
"""

from __future__ import annotations

from collections.abc import Mapping

from jsonschema.exceptions import SchemaError, best_match
from jsonschema.validators import Draft202012Validator, validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from llm_orchestrator.errors import AuthorError
from llm_orchestrator.model import Json

PROBLEMS_MAX = 5


def find_problems(value: Json, schema: Mapping[str, Json]) -> list[str]:
    """What is wrong with `value`, at most five lines; empty when it fits.

    Raises AuthorError when the schema itself is wrong or points outside itself.
    """
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

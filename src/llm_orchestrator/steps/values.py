"""Small pure helpers on JSON values that several step types share.

JSON's own rules hold, not Python's: true is not 1, 1 is 1.0, nothing but a number is a number.
Nothing here changes what it is given, and no message holds a value, only what kind of thing it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping
from typing import Any, NoReturn

from llm_orchestrator.errors import AuthorError
from llm_orchestrator.model import Json


def describe(value: Json) -> str:
    """What a value is, for error messages: `a list of 3`, `text of 12 characters`, `null`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return f"text of {len(value)} characters"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return f"an object of {len(value)} keys"
    return f"a {type(value).__name__}, which is no JSON"


def is_number(value: Json) -> bool:
    """True for a JSON number; a boolean is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def fingerprint(value: Json) -> Hashable:
    """Equal for equal JSON values only, and fit for a set."""
    if isinstance(value, bool):
        return ("boolean", value)
    if isinstance(value, Mapping):
        return ("object", frozenset((key, fingerprint(item)) for key, item in value.items()))
    if isinstance(value, list | tuple):
        return ("list", tuple(fingerprint(item) for item in value))
    return ("scalar", value)


def is_same(left: Json, right: Json) -> bool:
    """True when two values are the same JSON."""
    return fingerprint(left) == fingerprint(right)


def look_up(value: Json, path: str | int, default: Json = None) -> Json:
    """What stands at a dotted path (`a.b.0.c`) in a value; `default` when there is nothing.

    A key that holds dots itself is found as a whole before it is taken apart.
    """
    text = str(path)
    if isinstance(value, Mapping) and text in value:
        return value[text]
    for part in text.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.lstrip("-").isdecimal():
            index = int(part)
            if not -len(value) <= index < len(value):
                return default
            value = value[index]
        else:
            return default
    return value


def to_text(value: Json) -> str:
    """A value as text: texts as they are, null as nothing, everything else as compact JSON."""
    if isinstance(value, str):
        return value
    return "" if value is None else to_json(value)


def to_json(value: Json, *, indent: int | None = None) -> str:
    """Compact (or indented) JSON. Raises AuthorError for what JSON cannot hold."""
    separators = (",", ": ") if indent else (",", ":")
    try:
        return json.dumps(
            value, ensure_ascii=False, allow_nan=False, indent=indent, separators=separators
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise AuthorError(f"this is no JSON: {error}") from error


def parse_json(text: str, *, what: str = "the text") -> Json:
    """Parse strict JSON, also out of one Markdown fence, as models like to answer.

    `what` names the text in the AuthorError that is raised when it does not parse.
    """
    try:
        return json.loads(_without_fence(text), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise AuthorError(f"{what} ({describe(text)}) is not JSON: {error}") from error


def plain_json(value: Json, *, what: str) -> Json:
    """`value` as a JSON copy of its own (tuples become lists), or an AuthorError naming `what`."""
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise AuthorError(f"{what} is no JSON: {error}") from error
    return json.loads(text)


def first_output(outputs: Mapping[str, Json] | None) -> Json:
    """The first of a step's outputs; None when the step was skipped or has none."""
    return next(iter(outputs.values()), None) if outputs else None


def is_finite(value: Json) -> bool:
    """True for a number that JSON can hold."""
    return is_number(value) and math.isfinite(value)


def _without_fence(text: str) -> str:
    stripped = text.strip()
    if not (stripped.startswith("```") and stripped.endswith("```") and "\n" in stripped):
        return stripped
    return stripped.split("\n", 1)[1].removesuffix("```")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def further_options(config: Any) -> dict[str, Json]:
    """What a step was given beyond its declared fields: a provider's or an action's parameters."""
    return dict(getattr(config, "model_extra", None) or {})

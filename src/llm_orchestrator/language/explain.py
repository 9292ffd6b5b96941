"""Pydantic's errors in plain words, each once, at its place in the data as it was written."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from llm_orchestrator.language.base import BaseStep
from llm_orchestrator.language.compat import STEP_ALIASES, Loc
from llm_orchestrator.language.names import nearest

_PLAIN = {
    "too_short": "should not be empty",
    "tuple_type": "should be a list",
    "dict_type": "should be a mapping",
    "model_type": "should be a mapping",
    "string_type": "should be text",
    "int_type": "should be a whole number",
    "int_parsing": "should be a whole number",
    "int_from_float": "should be a whole number",
    "float_type": "should be a number",
    "float_parsing": "should be a number",
    "bool_type": "should be true or false",
    "bool_parsing": "should be true or false",
}
"""Our words for what pydantic says with Python's."""


def explain(error: ValidationError, cls: type[BaseModel], data: Any) -> Iterator[tuple[Loc, str]]:
    """Each problem of a pydantic error once, in plain words, at its place in the data."""
    grouped: dict[Loc, list[str]] = {}
    for item in error.errors(include_url=False, include_context=True):
        place = _clean(item["loc"], data, keep_last=item["type"] in {"missing", "extra_forbidden"})
        grouped.setdefault(place, []).append(_say(item, place, cls=cls, data=data))
    for place, messages in grouped.items():
        yield place, _join(list(dict.fromkeys(messages))).replace("`switch`", "`condition`")


def _join(messages: list[str]) -> str:
    """`x` should be text or a list, rather than the same beginning twice."""
    start = messages[0].partition(" should be ")[0] + " should be "
    if not all(message.startswith(start) for message in messages):
        return " or ".join(messages)
    ends = [message.removeprefix(start) for message in messages]
    values = {end.partition(", not ")[2] for end in ends}
    if len(ends) > 1 and len(values) == 1:
        shown = f", not {values.pop()}" if "" not in values else ""
        ends = [end.partition(", not ")[0] for end in ends]
        return start + " or ".join(ends) + shown
    return start + " or ".join(ends)


def _clean(loc: Loc, data: Any, *, keep_last: bool) -> Loc:
    """Pydantic names union members and validators in a place; keep what is in the data."""
    place: list[str | int] = []
    for number, part in enumerate(loc):
        is_last = number == len(loc) - 1
        if _has(data, part):
            data = data[part]
        elif not (keep_last and is_last):
            continue
        place.append(part)
    return tuple(place)


def _has(data: Any, part: str | int) -> bool:
    if isinstance(data, Mapping):
        return part in data
    return isinstance(data, list | tuple) and isinstance(part, int) and part < len(data)


def _say(item: Any, place: Loc, *, cls: type[BaseModel], data: Any) -> str:
    loc = item["loc"]
    key = next((part for part in reversed(place) if isinstance(part, str)), "")
    if item["type"] == "missing":
        unknown = set(map(str, data)) - set(cls.model_fields) if len(loc) == 1 else set()
        return f"missing key `{key}`{meant_by(key, unknown)}"
    if item["type"] == "extra_forbidden":
        if STEP_ALIASES.get(key) in data:
            return f"`{key}` is another word for `{STEP_ALIASES[key]}`: keep one of them"
        return f"unknown key `{key}`{nearest(key, _fields_at(cls, loc[:-1]))}"
    message = str(item["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    message = _PLAIN.get(item["type"], message.partition(", unable to")[0])
    if not place:
        return message
    value = item["input"]
    shown = f", not {value!r}" if isinstance(value, str | int | float) else ""
    if value is None:
        shown = ", not null"
    if item["type"] == "string_pattern_mismatch":
        message = f"should match {item['ctx']['pattern']}"
    if item["type"] == "literal_error" and isinstance(value, str):
        shown += nearest(value, re.findall(r"'([^']*)'", item["ctx"]["expected"]))
    return f"`{key}` {message}{shown if len(shown) < 100 else ''}"


def meant_by(key: str, written: set[str]) -> str:
    """`; did you mean it by ...` with the written key nearest to a missing one, or nothing."""
    close = difflib.get_close_matches(key, sorted(written), n=1, cutoff=0.6)
    return f"; did you mean it by `{close[0]}`?" if close else ""


def _fields_at(cls: type[BaseModel], loc: Loc) -> list[str]:
    """The keys that are known where an unknown one was found."""
    fields = dict(cls.model_fields)
    for part in loc:
        if isinstance(part, str) and part in fields:
            inner = _model_in(fields[part].annotation)
            fields = dict(inner.model_fields) if inner else {}
    if fields == dict(cls.model_fields) and issubclass(cls, BaseStep):
        return [*fields, *STEP_ALIASES]
    return list(fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _model_in(inner)
        if found is not None:
            return found
    return None

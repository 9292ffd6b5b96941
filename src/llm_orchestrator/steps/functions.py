"""The functions of step type `transform`: pure, total on what they accept, in one table.

Each takes the step's inputs by name and its further parameters. What it cannot use it refuses with
an AuthorError that says which input it was and what was found there, never the value itself.

Paths (`key`, `path`, the values of `fields`) are dotted: `user.address.0.city`. Something that is
not there counts as null. `true` is not 1; 1 is 1.0. Where a `key` may stand, an `expression` may
stand instead: it comes in ready to be called with an item and its place (see `Evaluate`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llm_orchestrator.errors import AuthorError
from llm_orchestrator.language import patterns
from llm_orchestrator.language.templates import is_true
from llm_orchestrator.model import Json
from llm_orchestrator.steps.values import (
    describe,
    fingerprint,
    is_number,
    is_same,
    look_up,
    parse_json,
    to_json,
    to_text,
)

Inputs = Mapping[str, Json]
Parameters = Mapping[str, Json]
Evaluate = Callable[[Json, int], Json]
"""What the parameter `expression` is here: from an item and its place in the list to a value."""

_PLACEHOLDER = re.compile(r"\{([A-Za-z_][\w-]*(?:\.[\w-]+)*)\}")


@dataclass(frozen=True, slots=True)
class Function:
    """A function and the parameters that it knows."""

    apply: Callable[[Inputs, Parameters], Json]
    parameters: frozenset[str] = frozenset()
    required: tuple[str, ...] = ()


def merge(inputs: Inputs, parameters: Parameters) -> Json:
    """Objects: one object, later keys win. Lists: one list. Anything else: an object by name."""
    values = list(inputs.values())
    if values and all(isinstance(value, Mapping) for value in values):
        return {key: item for value in values for key, item in value.items()}
    if values and all(isinstance(value, list) for value in values):
        return [item for value in values for item in value]
    return dict(inputs)


def filter_items(inputs: Inputs, parameters: Parameters) -> Json:
    """Items of a list whose `key` fits `op` and `value`; an object stays whole or becomes null."""
    name, value = _single(inputs)
    keep = _predicate(name, parameters)
    if isinstance(value, Mapping):
        return value if keep(value, 0) else None
    items = _list(name, value, alternative="an object")
    return [item for place, item in enumerate(items) if keep(item, place)]


def concat(inputs: Inputs, parameters: Parameters) -> Json:
    """Lists chained to one list, or texts and numbers to one text with `separator` between."""
    values = list(inputs.values())
    if values and all(isinstance(value, list) for value in values):
        return [item for value in values for item in value]
    for name, value in inputs.items():
        if isinstance(value, list | Mapping):
            raise _wrong(name, value, "text or a number, or else every input must be a list")
    return _text_parameter(parameters, "separator", "").join(to_text(value) for value in values)


def map_items(inputs: Inputs, parameters: Parameters) -> Json:
    """Of each item what stands at `key`, an object of `fields`, or what `expression` makes."""
    name, value = _single(inputs)
    pick = _picker(parameters)
    return [pick(item, place) for place, item in enumerate(_list(name, value))]


def select(inputs: Inputs, parameters: Parameters) -> Json:
    """Like map, on an object or on each object of a list."""
    name, value = _single(inputs)
    pick = _picker(parameters)
    if isinstance(value, Mapping):
        return pick(value, 0)
    items = _list(name, value, alternative="an object")
    return [pick(item, place) for place, item in enumerate(items)]


def sort(inputs: Inputs, parameters: Parameters) -> Json:
    """A list in order, by `key` if given, `reverse` if true. Stable; nulls come last either way."""
    name, value = _single(inputs)
    items = _list(name, value)
    pairs = [(_at(item, place, parameters), item) for place, item in enumerate(items)]
    known = [pair for pair in pairs if pair[0] is not None]
    for place, (found, _) in enumerate(pairs):
        if found is not None and not _is_comparable(found, known[0][0]):
            first = describe(known[0][0])
            raise _wrong(f"{name}[{place}]", found, f"of one kind with the first ({first})")
    ordered = sorted(known, key=lambda pair: pair[0], reverse=_flag(parameters, "reverse"))
    return [item for _, item in ordered] + [item for found, item in pairs if found is None]


def unique(inputs: Inputs, parameters: Parameters) -> Json:
    """A list without repeats (by `key` if given); the first of equals stays."""
    name, value = _single(inputs)
    seen: set[Hashable] = set()
    result = []
    for place, item in enumerate(_list(name, value)):
        mark = fingerprint(_at(item, place, parameters))
        if mark not in seen:
            seen.add(mark)
            result.append(item)
    return result


def split(inputs: Inputs, parameters: Parameters) -> Json:
    """A text cut at `separator` (default: line ends); `trim` strips parts and drops empty ones."""
    name, value = _single(inputs)
    text = _text(name, value)
    separator = _text_parameter(parameters, "separator", "\n")
    if not separator:
        raise AuthorError("the parameter 'separator' is empty")
    parts = text.split(separator)
    if _flag(parameters, "trim"):
        parts = [part.strip() for part in parts if part.strip()]
    return parts


def join(inputs: Inputs, parameters: Parameters) -> Json:
    """The items of a list as one text, `separator` (default: line end) between them."""
    name, value = _single(inputs)
    items = enumerate(_list(name, value))
    texts = [to_text(_at(item, place, parameters)) for place, item in items]
    return _text_parameter(parameters, "separator", "\n").join(texts)


def format_text(inputs: Inputs, parameters: Parameters) -> Json:
    """`template` with each {name} or {name.path} replaced by that input; other braces stay."""
    missing = object()

    def replace(match: re.Match[str]) -> str:
        name, _, path = match[1].partition(".")
        value = inputs.get(name, missing)
        if path and value is not missing:
            value = look_up(value, path, missing)
        if value is missing:
            known = ", ".join(inputs) or "none"
            raise AuthorError(f"nothing stands at {{{match[1]}}}; the inputs are {known}")
        return to_text(value)

    return _PLACEHOLDER.sub(replace, _text_parameter(parameters, "template", ""))


def extract(inputs: Inputs, parameters: Parameters) -> Json:
    """What stands at `path`, or the first match of `pattern` (every one when `all` is true).

    A match is its `group` (number or name) if given, else group 1 if there is one, else the whole.
    """
    name, value = _single(inputs)
    if ("path" in parameters) == ("pattern" in parameters):
        raise AuthorError("give either the parameter 'path' or the parameter 'pattern'")
    if "path" in parameters:
        return look_up(value, parameters["path"], parameters.get("default"))
    text, is_all = _text(name, value), _flag(parameters, "all")
    pattern, group = _text_parameter(parameters, "pattern", ""), parameters.get("group")
    try:
        found = patterns.find(pattern, text, group=group, is_all=is_all)
    except AuthorError as error:
        raise AuthorError(f"the parameter 'pattern': {error.message}", hint=error.hint) from error
    return list(found) if is_all else next(iter(found), parameters.get("default"))


def parse(inputs: Inputs, parameters: Parameters) -> Json:
    """The JSON that a text holds; one Markdown fence around it is taken off."""
    name, value = _single(inputs)
    return parse_json(_text(name, value), what=f"the input {name!r}")


def dump(inputs: Inputs, parameters: Parameters) -> Json:
    """The input as JSON text, compact or with `indent` spaces (at most 8). Several: an object."""
    indent = parameters.get("indent")
    if indent is not None and not (type(indent) is int and 0 <= indent <= 8):
        raise AuthorError("the parameter 'indent' must be a number from 0 to 8")
    value = _single(inputs)[1] if len(inputs) == 1 else dict(inputs)
    return to_json(value, indent=indent)


def template(inputs: Inputs, parameters: Parameters) -> Json:
    """`template`, which was rendered like every text field before the step began."""
    return parameters["template"]


def expression(inputs: Inputs, parameters: Parameters) -> Json:
    """`value`, which was evaluated before the step began."""
    return parameters["value"]


def length(inputs: Inputs, parameters: Parameters) -> Json:
    """How many characters, items or keys the input has."""
    name, value = _single(inputs)
    if not isinstance(value, str | list | Mapping):
        raise _wrong(name, value, "text, a list or an object")
    return len(value)


def total(inputs: Inputs, parameters: Parameters) -> Json:
    """The sum of a list's numbers (at `key` if given), or of several number inputs."""
    numbers: list[tuple[str, Json]] = []
    for name, value in inputs.items():
        if isinstance(value, list):
            for place, item in enumerate(value):
                numbers.append((f"{name}[{place}]", _at(item, place, parameters)))
        else:
            numbers.append((name, value))
    for name, value in numbers:
        if not is_number(value):
            raise _wrong(name, value, "a number")
    values = [value for _, value in numbers]
    try:
        return sum(values) if all(type(value) is int for value in values) else math.fsum(values)
    except OverflowError as error:
        raise AuthorError("the sum is larger than a number can be") from error


def _single(inputs: Inputs) -> tuple[str, Json]:
    if len(inputs) != 1:
        names = ", ".join(inputs) or "none"
        raise AuthorError(f"it takes one input and was given {len(inputs)}: {names}")
    return next(iter(inputs.items()))


def _wrong(name: str, value: Json, wanted: str) -> AuthorError:
    return AuthorError(f"the input {name!r} is {describe(value)}; it must be {wanted}")


def _list(name: str, value: Json, *, alternative: str = "") -> list[Json]:
    if not isinstance(value, list):
        raise _wrong(name, value, f"a list or {alternative}" if alternative else "a list")
    return value


def _text(name: str, value: Json) -> str:
    if not isinstance(value, str):
        raise _wrong(name, value, "text")
    return value


def _text_parameter(parameters: Parameters, name: str, default: str) -> str:
    value = parameters.get(name, default)
    if not isinstance(value, str):
        raise AuthorError(f"the parameter {name!r} is {describe(value)}; it must be text")
    return value


def _flag(parameters: Parameters, name: str) -> bool:
    value = parameters.get(name, False)
    if not isinstance(value, bool):
        raise AuthorError(f"the parameter {name!r} is {describe(value)}; it must be true or false")
    return value


def _at(item: Json, place: int, parameters: Parameters) -> Json:
    """What `expression` makes of the item, what stands at `key` in it, or the item itself."""
    if "expression" in parameters:
        return parameters["expression"](item, place)
    key = parameters.get("key")
    return item if key is None else look_up(item, key)


def _is_comparable(left: Json, right: Json) -> bool:
    both_text = isinstance(left, str) and isinstance(right, str)
    return both_text or (is_number(left) and is_number(right))


def _picker(parameters: Parameters) -> Callable[[Json, int], Json]:
    """What to take of an item: `key`, `expression`, or `fields` (paths, or new name: path)."""
    if sum(name in parameters for name in ("key", "fields", "expression")) != 1:
        raise AuthorError("give one of the parameters 'key', 'fields' and 'expression'")
    if "expression" in parameters:
        return parameters["expression"]  # type: ignore[no-any-return]
    if "key" in parameters:
        return lambda item, _: look_up(item, parameters["key"], parameters.get("default"))
    fields = parameters["fields"]
    if isinstance(fields, list | tuple):
        fields = {str(path): path for path in fields}
    if not isinstance(fields, Mapping):
        raise AuthorError(f"the parameter 'fields' is {describe(fields)}, not a list or an object")
    missing = object()

    def pick(item: Json, place: int) -> Json:
        found = {name: look_up(item, path, missing) for name, path in fields.items()}
        return {name: value for name, value in found.items() if value is not missing}

    return pick


def _predicate(name: str, parameters: Parameters) -> Callable[[Json, int], bool]:
    if "expression" in parameters and "value" not in parameters:
        return lambda item, place: is_true(parameters["expression"](item, place))
    if "value" not in parameters:
        raise AuthorError("it needs the parameter 'value' or the parameter 'expression'")
    operator = parameters.get("op", "eq")
    if operator not in _OPERATORS:
        raise AuthorError(f"there is no op {operator!r}; use one of {', '.join(_OPERATORS)}")
    compare, wanted = _OPERATORS[operator], parameters["value"]

    def keep(item: Json, place: int) -> bool:
        found = _at(item, place, parameters)
        result = compare(found, wanted)
        if result is None:
            raise AuthorError(
                f"the input '{name}[{place}]' holds {describe(found)}, which {operator!r} cannot"
                f" compare with {describe(wanted)}"
            )
        return result

    return keep


def _order(test: Callable[[Any, Any], bool]) -> Callable[[Json, Json], bool | None]:
    """A comparison of two numbers or two texts. Null is in no order; None: cannot be compared."""

    def compare(found: Json, wanted: Json) -> bool | None:
        if found is None:
            return False
        return test(found, wanted) if _is_comparable(found, wanted) else None

    return compare


def _contains(found: Json, wanted: Json) -> bool | None:
    """True when `wanted` is in a text (a part), a list (an item) or an object (a key)."""
    if found is None:
        return False
    if isinstance(found, list):
        return any(is_same(item, wanted) for item in found)
    if isinstance(wanted, str) and isinstance(found, str | Mapping):
        return wanted in found
    return None


def _reverse_contains(found: Json, wanted: Json) -> bool | None:
    return _contains(wanted, found) if wanted is not None else None


_OPERATORS: dict[str, Callable[[Json, Json], bool | None]] = {
    "eq": is_same,
    "ne": lambda found, wanted: not is_same(found, wanted),
    "gt": _order(lambda found, wanted: bool(found > wanted)),
    "gte": _order(lambda found, wanted: bool(found >= wanted)),
    "lt": _order(lambda found, wanted: bool(found < wanted)),
    "lte": _order(lambda found, wanted: bool(found <= wanted)),
    "contains": _contains,
    "in": _reverse_contains,
}


def _function(
    apply: Callable[[Inputs, Parameters], Json], *optional: str, required: Iterable[str] = ()
) -> Function:
    needed = tuple(required)
    return Function(apply, frozenset((*optional, *needed)), needed)


FUNCTIONS: Mapping[str, Function] = {
    "merge": _function(merge),
    "filter": _function(filter_items, "key", "op", "value", "expression"),
    "concat": _function(concat, "separator"),
    "map": _function(map_items, "key", "fields", "default", "expression"),
    "select": _function(select, "key", "fields", "default", "expression"),
    "sort": _function(sort, "key", "reverse", "expression"),
    "unique": _function(unique, "key", "expression"),
    "split": _function(split, "separator", "trim"),
    "join": _function(join, "separator", "key", "expression"),
    "format": _function(format_text, required=["template"]),
    "extract": _function(extract, "path", "pattern", "group", "all", "default"),
    "parse_json": _function(parse),
    "to_json": _function(dump, "indent"),
    "template": _function(template, required=["template"]),
    "expression": _function(expression, required=["value"]),
    "length": _function(length),
    "sum": _function(total, "key", "expression"),
}

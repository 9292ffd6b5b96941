"""A run's inputs against the workflow's `inputs` section: defaults, types, every mistake at once.

Nothing is coerced but a whole number where a number is wanted: what is not of its type is refused,
with the name, what was expected and what came. Without a section any inputs are taken as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llm_orchestrator.errors import AuthorError, InputError
from llm_orchestrator.language import patterns
from llm_orchestrator.language.definition import Definition, InputSpec
from llm_orchestrator.language.names import DEPTH_MAX, copy, is_deep, nearest
from llm_orchestrator.model import Json

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list, tuple),
    "object": (Mapping,),
}
_PATTERN_LENGTH_MAX = 100_000


def check_inputs(definition: Definition, given: Mapping[str, Json]) -> dict[str, Json]:
    """The inputs with defaults filled in, as a copy. Raises InputError with every mistake."""
    specs = definition.inputs
    if is_deep(given):
        raise InputError(f"the inputs are nested deeper than {DEPTH_MAX}")
    if specs is None:
        return {str(key): copy(value) for key, value in given.items()}
    problems = [
        f"unknown input `{name}`{nearest(name, specs)}" for name in given if name not in specs
    ]
    values: dict[str, Json] = {}
    for name, spec in specs.items():
        if name in given and not (given[name] is None and not spec.required):
            problems.extend(f"input `{name}` {problem}" for problem in _check(spec, given[name]))
            values[name] = copy(given[name])
        elif spec.required:
            what = f" ({spec.description})" if spec.description else ""
            problems.append(f"missing input `{name}`, {_named(spec.type)}{what}")
        else:
            values[name] = copy(spec.default)
    if problems:
        raise InputError(
            "\n".join(problems),
            hint=f"the inputs of {definition.name}: {_summary(specs) or 'none'}",
        )
    return values


def check_default(spec: InputSpec) -> list[str]:
    """What is wrong with a default, as with any other value. None is always allowed."""
    try:
        return [] if spec.default is None else list(_check(spec, spec.default))
    except InputError as error:
        return [error.message]


def _check(spec: InputSpec, value: Json) -> Iterator[str]:
    if not _is_a(value, spec.type):
        yield f"should be {_named(spec.type)}, not {_show(value)}"
        return
    if spec.enum is not None and value not in spec.enum:
        choices = ", ".join(map(_show, spec.enum))
        hint = nearest(value, spec.enum) if isinstance(value, str) else ""
        yield f"should be one of {choices}, not {_show(value)}{hint}"
    if isinstance(value, str) and spec.pattern is not None:
        yield from _check_pattern(spec.pattern, value)
    if isinstance(value, str | list | tuple):
        yield from _check_range(spec, len(value), "characters" if value is str(value) else "items")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield from _check_range(spec, value, "")
    if spec.items is not None and isinstance(value, list | tuple):
        for number, item in enumerate(value):
            if not _is_a(item, spec.items):
                yield f"[{number}] should be {_named(spec.items)}, not {_show(item)}"


def _check_pattern(pattern: str, value: str) -> Iterator[str]:
    wanted = f"should match {_short(pattern)}"
    if len(value) > _PATTERN_LENGTH_MAX:
        yield f"{wanted} and so be at most {_PATTERN_LENGTH_MAX} characters, not {len(value)}"
        return
    try:
        if not patterns.find(pattern, value, group=0, cpu_s=patterns.INPUT_CPU_S_MAX):
            yield f"{wanted}, not {_show(value)}"
    except AuthorError as error:  # no further one is tried: each may take as long
        raise InputError(f"{wanted}, but {error.message}", hint=error.hint) from error


def _check_range(spec: InputSpec, size: float, unit: str) -> Iterator[str]:
    if spec.min is not None and size < spec.min:
        yield f"should be at least {_number(spec.min)} {unit}".rstrip() + f", not {_number(size)}"
    if spec.max is not None and size > spec.max:
        yield f"should be at most {_number(spec.max)} {unit}".rstrip() + f", not {_number(size)}"


def _is_a(value: Json, kind: str) -> bool:
    if kind == "any":
        return True
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[kind])


def _named(kind: str) -> str:
    return {"any": "any value", "integer": "an integer", "array": "a list"}.get(
        kind, f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
    )


def _number(value: float) -> str:
    return f"{value:g}" if abs(value) < 1e15 else str(value)


def _short(pattern: str) -> str:
    return pattern if len(pattern) <= 200 else f"{pattern[:197]}..."


def _show(value: Any) -> str:
    text = (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    )
    return text if len(text) <= 60 else f"{text[:57]}..."


def _summary(specs: Mapping[str, InputSpec]) -> str:
    return ", ".join(
        f"{name} ({spec.type}{'' if spec.required else ', optional'})"
        for name, spec in specs.items()
    )

"""Which step waits for which: `depends_on`, and what the templates mention.

Pure functions of a definition. Within one list of steps a step waits for a sibling when it names
it, or names a step that is seen through it (a task of a parallel, a step of a branch), whether in a
template of its own or of any step inside it. A fallback step waits for each step that names it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_orchestrator.errors import TemplateError
from llm_orchestrator.language.base import BaseStep
from llm_orchestrator.language.compat import LOOP_NAMES, Loc
from llm_orchestrator.language.definition import Definition, walk
from llm_orchestrator.language.lexer import is_template
from llm_orchestrator.language.templates import Templates

_NOT_RENDERED = frozenset(
    {
        "id", "type", "depends_on", "output", "timeout_seconds", "retry", "effect", "on_unknown",
        "probe", "on_error", "on_skipped", "description", "metadata", "condition",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Text:
    """A template or expression of a step. `names` are further names that it sees."""

    loc: Loc
    text: str
    is_expression: bool = False
    names: tuple[str, ...] = ()
    inner: BaseStep | None = None
    """The step whose own inside the text sees (a loop's `until`)."""
    inputs: tuple[str, ...] = ()
    """Names under `inputs` besides the run's own (a transform's, in its expression)."""

    @staticmethod
    def inside(value: Any, loc: Loc) -> Iterator[Text]:
        """The templates inside a JSON value."""
        if isinstance(value, str):
            if is_template(value):
                yield Text(loc, value)
        elif isinstance(value, Mapping):
            for key, item in value.items():
                yield from Text.inside(item, (*loc, key))
        elif isinstance(value, list | tuple):
            for number, item in enumerate(value):
                yield from Text.inside(item, (*loc, number))
        elif hasattr(value, "model_dump"):
            yield from Text.inside(dict(value), loc)


def rendered_fields(step: BaseStep) -> dict[str, Any]:
    """The fields whose templates are rendered before the step runs, with their values."""
    left_out = {*step.nested, *step.expressions, *step.verbatim}
    return {key: value for key, value in step if key not in left_out and key not in _NOT_RENDERED}


def texts_of(step: BaseStep) -> Iterator[Text]:
    """Every template and expression of the step itself, with its place under the step."""
    if step.condition is not None:
        yield Text(("condition",), step.condition, is_expression=True)
    for field in step.expressions:
        value = getattr(step, field)
        if not isinstance(value, str):
            yield from Text.inside(value, (field,))
            continue
        names = {"until": LOOP_NAMES, "expression": ("item", "index")}.get(field, ())
        inner = step if field == "until" else None
        own = getattr(step, "inputs", None) if field == "expression" else None
        inputs = tuple(own) if isinstance(own, Mapping) else ()
        yield Text((field,), value, True, names=names, inner=inner, inputs=inputs)
    for field, value in rendered_fields(step).items():
        yield from Text.inside(value, (field,))


def mentioned(step: BaseStep, templates: Templates) -> set[str]:
    """Ids of all steps that the step or any step inside it names, its own inside included."""
    found: set[str] = set()
    for _, inner, _ in walk((step,)):
        found.update(inner.depends_on)
        for text in texts_of(inner):
            try:
                paths = templates.references(text.text, is_expression=text.is_expression)
            except TemplateError:
                continue
            found.update(path[1] for path in paths if path[0] in {"steps", "outputs"} and path[1:])
            if ("steps",) in paths or ("outputs",) in paths:
                found.add("*")
    return found


def dependencies(
    step: BaseStep, siblings: Sequence[BaseStep], templates: Templates | None = None
) -> tuple[str, ...]:
    """Ids of the siblings that `step` waits for. `siblings` is the list that the step stands in.

    A template that takes a step by a computed name (`steps[inputs.which]`) waits for what
    `depends_on` says and no more.
    """
    return dependency_table(siblings, templates)[step.id]


def dependency_table(
    steps: Sequence[BaseStep], templates: Templates | None = None
) -> dict[str, tuple[str, ...]]:
    """For each step of one list, the ids of the others that it waits for, in their order.

    Whether a step may be seen from where it is named is validation's matter.
    """
    templates = templates or Templates()
    holder = {inner.id: step.id for step in steps for _, inner, _ in walk((step,))}
    order = {step.id: number for number, step in enumerate(steps)}
    waits: dict[str, set[str]] = {}
    for step in steps:
        names = mentioned(step, templates)
        waits[step.id] = {holder[name] for name in names if name in holder} - {step.id}
    for step in steps:
        if step.fallback_id in waits and step.fallback_id != step.id:
            waits[step.fallback_id].add(step.id)
    return {name: tuple(sorted(found, key=order.__getitem__)) for name, found in waits.items()}


def all_dependencies(
    definition: Definition, templates: Templates | None = None
) -> dict[str, tuple[str, ...]]:
    """`dependency_table` of every list in the definition, in one table by step id."""
    templates = templates or Templates()
    table = dependency_table(definition.steps, templates)
    for _, step, _ in walk(definition.steps):
        for _, nested in step.children():
            table.update(dependency_table(nested, templates))
    return table


def cycles(steps: Sequence[BaseStep], templates: Templates) -> Iterator[tuple[str, ...]]:
    """Each cycle among the steps of one list, at any depth, as the ids on its way."""
    yield from _cycles_of(dependency_table(steps, templates))
    for step in steps:
        for _, nested in step.children():
            yield from cycles(nested, templates)


def _cycles_of(table: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """One cycle per knot of steps. Iterative, for chains of thousands."""
    state: dict[str, int] = {}
    for start in table:
        way: list[str] = []
        stack = [(start, iter(table[start]))] if start not in state else []
        if stack:
            state[start] = 1
            way.append(start)
        while stack:
            name, following = stack[-1]
            nearby = next(following, None)
            if nearby is None:
                state[name] = 2
                stack.pop()
                way.pop()
            elif nearby not in state:
                state[nearby] = 1
                way.append(nearby)
                stack.append((nearby, iter(table[nearby])))
            elif state[nearby] == 1:
                found = way[way.index(nearby) :]
                yield tuple(reversed(found))

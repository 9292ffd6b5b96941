"""Turns plain data into a `Definition`, and says everything that is wrong with its shape.

One mistake never hides another: a step that does not fit stands in as `Broken`, so that all other
steps, and the links between them, are still checked. Issues carry the place as a path into the
data as it was written (also where a key was renamed on the way).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

from pydantic import Field, ValidationError

from llm_orchestrator.errors import TemplateError
from llm_orchestrator.language import compat
from llm_orchestrator.language.base import BaseStep, Steps
from llm_orchestrator.language.compat import Loc, Names, Rewriter
from llm_orchestrator.language.definition import Definition, InputSpec, StepTypes, registry
from llm_orchestrator.language.explain import explain, meant_by
from llm_orchestrator.language.lexer import is_template
from llm_orchestrator.language.names import nearest
from llm_orchestrator.language.templates import Templates

STEPS_MAX = 10_000


class Issue(NamedTuple):
    """Something wrong, or (as a warning) odd, at a place of the data."""

    loc: Loc
    message: str
    is_warning: bool = False


class Broken(BaseStep):
    """Stands in for a step that does not fit its type; its nested steps are still looked at."""

    nested: ClassVar[tuple[str, ...]] = ("steps",)
    steps: Steps = ()
    data: dict[str, Any] = Field(default_factory=dict)
    """What was written, without the nested steps."""


class BrokenLocal(Broken):
    """The same for a map or a loop."""

    is_local: ClassVar[bool] = True


class Built(NamedTuple):
    """The outcome. `definition` is whole only when no issue is an error."""

    definition: Definition
    issues: list[Issue]
    places: dict[int, Loc]
    """Where each step stands in the data, by the identity of the step."""


def build(
    data: Any,
    *,
    templates: Templates,
    step_types: StepTypes | None = None,
    steps_max: int = STEPS_MAX,
) -> Built | list[Issue]:
    """The definition in `data`, or a list of issues where nothing can be made of it."""
    if not isinstance(data, Mapping):
        return [Issue((), "should be a mapping with `name` and `steps`")]
    raw_steps = data.get("steps")
    if not isinstance(raw_steps, list | tuple) or not raw_steps:
        what = "missing key `steps`" if raw_steps is None else "`steps` should be a list of steps"
        hint = meant_by("steps", set(map(str, data)) - set(Definition.model_fields))
        return [Issue(("steps",) if "steps" in data else (), what + hint)]
    found = list(_walk_raw(raw_steps, steps_max))
    if len(found) > steps_max:
        return [Issue(("steps",), f"more than {steps_max} steps; split the workflow")]
    return _Builder(data, found, templates=templates, step_types=step_types).run(raw_steps)


def _walk_raw(steps: Any, limit: int) -> Iterator[Mapping[str, Any]]:
    """Every step-like mapping in the data, at most a few more than `limit`."""
    stack: list[Any] = list(reversed(list(steps)))
    count = 0
    while stack and count <= limit:
        step = stack.pop()
        if not isinstance(step, Mapping):
            continue
        count += 1
        yield step
        stack.extend(reversed([child for _, children in _nested_raw(step) for child in children]))


def _nested_raw(step: Mapping[str, Any]) -> Iterator[tuple[Loc, list[Any]]]:
    """The lists of nested steps in a step's data, with their places in it."""
    kind = step.get("type")
    if kind == "branch" and isinstance(step.get("branches"), Mapping):
        for key, steps in step["branches"].items():
            if isinstance(steps, list | tuple):
                yield ("branches", key), list(steps)
    field = {"parallel": "tasks", "map": "steps", "loop": "steps", "branch": "default"}.get(
        str(kind)
    )
    if field and isinstance(step.get(field), list | tuple):
        yield (field,), list(step[field])


class _Builder:
    def __init__(
        self,
        data: Mapping[str, Any],
        found: list[Mapping[str, Any]],
        *,
        templates: Templates,
        step_types: StepTypes | None,
    ) -> None:
        self._data = data
        self._types = registry(step_types)
        self._rewriter = Rewriter(templates)
        self._issues: list[Issue] = []
        self._places: dict[int, Loc] = {}
        inputs = data.get("inputs")
        self._names = Names(
            {str(step.get("id")): _bound_names(step) for step in found},
            None if inputs is None else frozenset(inputs if isinstance(inputs, Mapping) else ()),
        )

    def run(self, raw_steps: Any) -> Built:
        steps = self._steps(raw_steps, ("steps",), self._names)
        top = {**self._data, "steps": steps}
        top = _read_top(top, self._rewriter, self._names)
        definition = self._validate(Definition, top, loc=(), written={})
        if definition is None:
            safe: dict[str, Any] = {
                key: top[key] for key in ("inputs", "outputs", "secrets") if key in top
            }
            definition = self._salvage(safe, steps)
        assert isinstance(definition, Definition)
        return Built(definition, self._issues, self._places)

    def _salvage(self, top: dict[str, Any], steps: tuple[BaseStep, ...]) -> Definition:
        """What can be made of a broken file, so that its steps can still be checked."""
        kept: dict[str, Any] = {}
        for key, value in top.items():
            try:
                part = Definition.model_validate({"name": "x", "steps": steps, key: value})
                kept[key] = getattr(part, key)
            except ValidationError:
                pass  # named already
        if kept.get("inputs") is None and isinstance(top.get("inputs"), Mapping):
            kept["inputs"] = {str(name): InputSpec() for name in top["inputs"]}
        return Definition.model_construct(name="?", **{"inputs": None, **kept}, steps=steps)

    def _steps(self, raw: Any, loc: Loc, names: Names) -> tuple[BaseStep, ...]:
        steps = []
        for number, data in enumerate(raw):
            step = self._step(data, (*loc, number), names)
            self._places[id(step)] = (*loc, number)
            steps.append(step)
        return tuple(steps)

    def _step(self, raw: Any, loc: Loc, names: Names) -> BaseStep:
        if not isinstance(raw, Mapping):
            self._issues.append(Issue(loc, "should be a step: a mapping with `id` and `type`"))
            return _broken({}, (), is_local=False)
        data, written = compat.read_step(raw)
        kind = data.get("type")
        local = _local_names(data)
        nested: dict[Loc, tuple[BaseStep, ...]] = {}
        for place, steps in _nested_raw(data):
            nested[place] = self._steps(steps, (*loc, *place), names.within(*local))
            _put(data, place, nested[place])
        cls = self._types.get(kind) if isinstance(kind, str) else None
        if cls is None:
            self._issues.append(self._bad_type(data, loc))
        else:
            retry = data.get("retry")
            if isinstance(retry, Mapping):
                data["retry"], renamed = compat.read_retry(retry)
                written.update({f"retry.{key}": old for key, old in renamed.items()})
            self._rewrite(data, cls, names=names, loc=loc)
            step: BaseStep | None = self._validate(cls, data, loc=loc, written=written)
            self._find_misspelt(cls, data, loc=loc, written=written)
            if step is not None:
                return step
        flat = tuple(step for steps in nested.values() for step in steps)
        return _broken(data, flat, is_local=bool(local))

    def _bad_type(self, data: Mapping[str, Any], loc: Loc) -> Issue:
        if "type" not in data:
            return Issue(loc, "missing key `type`")
        known = ", ".join(self._types)
        hint = nearest(str(data["type"]), self._types) or f"; known are {known}"
        return Issue((*loc, "type"), f"unknown step type `{data['type']}`{hint}")

    def _rewrite(
        self, data: dict[str, Any], cls: type[BaseStep], *, names: Names, loc: Loc
    ) -> None:
        """Bring every template and expression of a step to our one syntax."""
        if data.get("type") == "transform":
            data["inputs"] = compat.read_transform_inputs(
                data.get("inputs", []), str(data.get("id")), names
            )
        inner = names.within("item", "index") if data.get("type") == "transform" else names
        skipped = {"id", "type", "depends_on", "output", "retry", *cls.nested, *cls.verbatim}
        for key in [key for key in data if key not in skipped]:
            value = data[key]
            try:
                if key == "condition" and isinstance(value, str):
                    data[key] = self._rewriter.expression(value, names)
                elif key in cls.expressions and isinstance(value, str):
                    seen = inner.within(*compat.LOOP_NAMES) if key == "until" else inner
                    data[key] = self._rewriter.expression(value, seen)
                else:
                    data[key] = self._rewriter.value(value, names)
            except TemplateError as error:
                self._issues.append(Issue((*loc, key), error.message))
        if data.get("function") == "expression" and isinstance(data.get("expression"), str):
            data["value"] = "{{ " + data.pop("expression") + " }}"

    def _validate(
        self, cls: type[Any], data: dict[str, Any], *, loc: Loc, written: Mapping[str, str]
    ) -> Any:
        try:
            return cls.model_validate(data, context={"step_types": self._types})
        except ValidationError as error:
            for place, message in explain(error, cls, data):
                self._issues.append(Issue((*loc, *_as_written(place, written)), message))
            return None

    def _find_misspelt(
        self, cls: type[BaseStep], data: Mapping[str, Any], *, loc: Loc, written: Mapping[str, str]
    ) -> None:
        """In a step with free parameters, a key that is nearly one of ours is taken for it."""
        if cls.model_config.get("extra") != "allow":
            return
        fields = [*cls.model_fields, *compat.STEP_ALIASES]
        for key in data:
            if key in fields or key in _FREE_NAMES:
                continue
            close = nearest(_SLIPS.get((str(data.get("type")), key), key), fields, cutoff=0.8)
            if close:
                free = " (a parameter of that name goes under `parameters`)"
                self._issues.append(
                    Issue((*loc, written.get(key, key)), f"unknown key `{key}`{close}{free}")
                )


_FREE_NAMES = frozenset({"input", "outputs", "top_p", "top_k", "field", "values", "keys", "time"})
"""Parameters that look like a key of ours and are none."""
_SLIPS = {("llm", "timeout"): "timeout_seconds"}
"""It would be sent to the provider, and bound nothing. (An action has a `timeout` of its own.)"""


def _local_names(data: Mapping[str, Any]) -> tuple[str, ...]:
    if data.get("type") == "map":
        return (str(data.get("item", "item")), "index")
    return compat.LOOP_NAMES if data.get("type") == "loop" else ()


def _bound_names(step: Mapping[str, Any]) -> tuple[str, ...]:
    output = step.get("output")
    if isinstance(output, str):
        return (output,)
    return tuple(map(str, output)) if isinstance(output, list | tuple | Mapping) else ()


def _put(data: dict[str, Any], place: Loc, steps: tuple[BaseStep, ...]) -> None:
    if len(place) == 1:
        data[str(place[0])] = steps
    else:
        data[str(place[0])] = {**data[str(place[0])], place[1]: steps}


def _broken(data: Mapping[str, Any], steps: tuple[BaseStep, ...], *, is_local: bool) -> BaseStep:
    depends_on = data.get("depends_on")
    known = isinstance(depends_on, list | tuple) and all(isinstance(d, str) for d in depends_on)
    return (BrokenLocal if is_local else Broken).model_construct(
        id=str(data.get("id", "")),
        type=str(data.get("type", "")),
        depends_on=tuple(depends_on or ()) if known else (),
        steps=steps,
        data={k: v for k, v in data.items() if k not in {"tasks", "steps", "branches", "default"}},
    )


def _read_top(data: dict[str, Any], rewriter: Rewriter, names: Names) -> dict[str, Any]:
    """The top level under the schema's forms. What does not fit stays for validation to name."""
    out = dict(data)
    if isinstance(out.get("version"), int | float) and not isinstance(out["version"], bool):
        out["version"] = str(out["version"])
    if isinstance(out.get("inputs"), Mapping):
        out["inputs"] = {
            key: {"type": spec} if isinstance(spec, str) else spec if spec is not None else {}
            for key, spec in out["inputs"].items()
        }
    if isinstance(out.get("labels"), Mapping):
        out["labels"] = {
            key: str(value)
            if isinstance(value, int | float) and not isinstance(value, bool)
            else value
            for key, value in out["labels"].items()
        }
    schedule = out.get("schedule")
    if isinstance(schedule, str):
        out["schedule"] = {"cron": schedule}
    elif isinstance(schedule, Mapping) and isinstance(schedule.get("backfill"), bool):
        out["schedule"] = {**schedule, "backfill": "all" if schedule["backfill"] else "none"}
    if isinstance(out.get("outputs"), Mapping):
        out["outputs"] = {
            key: _read_output(value, rewriter, names) for key, value in out["outputs"].items()
        }
    return out


def _read_output(value: Any, rewriter: Rewriter, names: Names) -> Any:
    """An output as `{value, fallback}`; text without a template is an expression."""
    is_spec = (
        isinstance(value, Mapping) and "value" in value and set(value) <= {"value", "fallback"}
    )
    spec = dict(value) if is_spec else {"value": value}
    text = spec["value"]
    if isinstance(text, str) and not is_template(text):
        spec["value"] = "{{ " + rewriter.expression(text, names) + " }}"
    else:
        spec["value"] = rewriter.value(text, names)
    return spec


def _as_written(place: Loc, written: Mapping[str, str]) -> Loc:
    """A place under the schema's keys as a place in the data."""
    if not place:
        return place
    head = written.get(str(place[0]), place[0])
    if len(place) > 1:
        return (head, written.get(f"{place[0]}.{place[1]}", place[1]), *place[2:])
    return (head,)

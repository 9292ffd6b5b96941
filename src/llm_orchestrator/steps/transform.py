"""Step type `transform`: one pure function from the table in functions.py on the step's inputs.

It never does I/O and never changes its inputs. By the time it runs, every name in `inputs` has
become a value and every template text: a value is never read as an expression.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from llm_orchestrator.errors import AuthorError, TemplateError
from llm_orchestrator.language.sandbox import aside
from llm_orchestrator.language.templates import Templates
from llm_orchestrator.model import Effect, Json
from llm_orchestrator.steps.base import Outputs, StepContext
from llm_orchestrator.steps.functions import FUNCTIONS, Evaluate, Function

_FIELDS = ("template", "key", "by", "fields", "path", "pattern", "separator", "descending")
_ALIASES = {"by": "key", "descending": "reverse"}


class Transform:
    """Applies `function` to `inputs`; `output` binds result."""

    type: ClassVar[str] = "transform"
    outputs: ClassVar[tuple[str, ...]] = ("result",)
    is_paid: ClassVar[bool] = False

    def __init__(self) -> None:
        self._templates = Templates()

    def effect(self, config: Any) -> Effect:
        """Pure."""
        return Effect.REPEATABLE

    async def execute(self, context: StepContext, config: Any) -> Outputs:
        """Raises AuthorError that names the input that does not fit, and what it is."""
        inputs = name_inputs(config.inputs)
        parameters = _given(config)
        if config.expression is not None:
            parameters["expression"] = self._evaluator(config, inputs)
        return {"result": await aside(partial(apply, config.function, inputs, parameters))}

    def _evaluator(self, config: Any, inputs: Mapping[str, Json]) -> Evaluate:
        """`inputs` are the run's, and over them the step's own of the same name."""
        outer = config.scope.get("inputs")
        own = {**outer, **inputs} if isinstance(outer, Mapping) else inputs
        scope = {**config.scope, "inputs": own}

        def evaluate(item: Json, place: int) -> Json:
            names = {**scope, "item": item, "index": place}
            return self._templates.evaluate(config.expression, names)

        return evaluate


def apply(name: str, inputs: Mapping[str, Json], parameters: Mapping[str, Json]) -> Json:
    """Apply one function of the table. Raises AuthorError."""
    function = FUNCTIONS.get(name)
    if function is None:
        nearest = difflib.get_close_matches(name, FUNCTIONS, 1)
        raise AuthorError(
            f"there is no transform function {name!r}",
            hint=f"did you mean {nearest[0]!r}?" if nearest else f"use one of {_names()}",
        )
    _check_parameters(name, function, parameters)
    try:
        return function.apply(inputs, parameters)
    except TemplateError:
        raise
    except AuthorError as error:
        raise AuthorError(f"transform {name}: {error.message}", hint=error.hint) from error
    except RecursionError as error:
        raise AuthorError(f"transform {name}: an input is nested too deeply") from error


def name_inputs(inputs: Json) -> dict[str, Json]:
    """Inputs by name; those that came as a bare list are called by their place, from 0."""
    if inputs is None:
        return {}
    if isinstance(inputs, Mapping):
        return dict(inputs)
    if isinstance(inputs, list | tuple):
        return {str(place): value for place, value in enumerate(inputs)}
    return {"0": inputs}


def _given(config: Any) -> dict[str, Json]:
    """What the file set, under one name each."""
    given = dict(config.free)
    for field in _FIELDS:
        value = getattr(config, field)
        if field in config.model_fields_set and value is not None and value is not False:
            given[_ALIASES.get(field, field)] = value
    if "value" in config.model_fields_set and "value" in FUNCTIONS[config.function].parameters:
        given["value"] = config.value
    return given


def _check_parameters(name: str, function: Function, parameters: Mapping[str, Json]) -> None:
    for key in parameters:
        if key not in function.parameters:
            known = ", ".join(sorted(function.parameters)) or "none"
            raise AuthorError(f"transform {name} has no parameter {key!r}; it knows {known}")
    for key in function.required:
        if key not in parameters:
            raise AuthorError(f"transform {name} needs the parameter {key!r}")


def _names() -> str:
    return ", ".join(sorted(FUNCTIONS))

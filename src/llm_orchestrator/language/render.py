"""A step's configuration for one execution: every template in it rendered, once, and checked.

The result is an instance of the same class whose fields have their own types, so a step type never
meets a template. Values that came from a run are in it as values: text that looks like a template
stays text. The step handed in is not changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from llm_orchestrator.errors import TemplateError
from llm_orchestrator.language.base import BaseStep
from llm_orchestrator.language.explain import explain
from llm_orchestrator.language.graph import Text, rendered_fields
from llm_orchestrator.language.steps import TransformStep
from llm_orchestrator.language.templates import Templates
from llm_orchestrator.model import Json

S = TypeVar("S", bound=BaseStep)


def render_step(step: S, templates: Templates, names: Mapping[str, Json]) -> S:
    """`step` with its templates rendered from `names`. Raises TemplateError.

    Conditions, expressions and nested steps stay as they are: whoever uses them evaluates them.
    """
    fields = {
        key: value
        for key, value in rendered_fields(step).items()
        if next(Text.inside(value, ()), None) is not None
    }
    rendered = _with(step, templates.render(_plain(fields), names)) if fields else step
    if isinstance(rendered, TransformStep) and rendered.expression is not None:
        rendered = rendered.with_scope(templates.copy_used(rendered.expression, names))
    return rendered


def _with(step: S, changed: dict[str, Any]) -> S:
    data = {**{key: getattr(step, key) for key in step.model_fields_set}, **changed}
    try:
        return type(step).model_validate(data, context={"rendered": True})
    except ValidationError as error:
        problems = "; ".join(message for _, message in explain(error, type(step), data))
        raise TemplateError(
            f"step {step.id}: once rendered, {problems}",
            hint="look at what the template refers to: `llmo runs show RUN` prints it",
        ) from error


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return {key: _plain(item) for key, item in value if key in value.model_fields_set}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value

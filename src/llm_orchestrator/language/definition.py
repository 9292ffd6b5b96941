"""A workflow as the engine knows it: one frozen, validated, hashable definition.

A `Definition` is made by `load.py` from a file, or read back with `from_canonical`. It never
changes, never looks at a run and never repairs anything: what is in its canonical bytes is what
runs. Invariant: `from_canonical(d.canonical())` equals `d` and has the same digest. The order of
mappings is part of the meaning (outputs bind by position), so it is part of the bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from llm_orchestrator.errors import NotFound, Problem
from llm_orchestrator.language.base import BaseStep, Name, Part, Seconds, Steps
from llm_orchestrator.language.steps import NATURAL_OUTPUTS, STEP_TYPES
from llm_orchestrator.model import Json

__all__ = ["NATURAL_OUTPUTS", "Definition", "Scope", "StepTypes", "registry", "walk"]

StepTypes = Mapping[str, type[BaseStep]]
"""Step types by name; plug-ins add theirs to the built-in ones."""

InputType = Literal["string", "integer", "number", "boolean", "array", "object", "any"]


class InputSpec(Part):
    """One input. Without `required` it is required unless it has a default (which may be null)."""

    type: InputType = "any"
    required: bool = True
    default: Json = None
    enum: tuple[Json, ...] | None = None
    pattern: str | None = None
    min: float | None = None
    """Least number, or least length of a string or an array."""
    max: float | None = None
    description: str | None = None
    items: InputType | None = None

    @model_validator(mode="before")
    @classmethod
    def _default_means_optional(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "default" in data:
            return {**data, "required": False}
        return data


class OutputSpec(Part):
    """One output of the run; `fallback` is its value where `value` cannot be evaluated."""

    value: Json
    fallback: Json = None
    has_fallback: bool = False
    """True when the file gives a fallback, be it null; set by loading."""

    @model_validator(mode="before")
    @classmethod
    def _note_fallback(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "fallback" in data:
            return {**data, "has_fallback": True}
        return data


class Schedule(Part):
    """When runs start by themselves. `backfill` says what happens to times missed while down."""

    cron: str
    timezone: str = "UTC"
    backfill: Literal["none", "latest", "all"] = "none"
    inputs: dict[str, Json] = Field(default_factory=dict)


class Budget(Part):
    """What one run may use."""

    max_usd: float | None = Field(None, gt=0)
    max_tokens: int | None = Field(None, gt=0)


class Scope(NamedTuple):
    """Where a step stands.

    `siblings` is its own list; `containers` the steps around it, outermost first; `local` the
    innermost map or loop around it, whose inside is invisible from outside.
    """

    siblings: tuple[BaseStep, ...]
    containers: tuple[BaseStep, ...] = ()
    local: BaseStep | None = None

    def inside(self, container: BaseStep, steps: tuple[BaseStep, ...]) -> Scope:
        """The scope of one of the container's own lists."""
        local = container if container.is_local else self.local
        return Scope(steps, (*self.containers, container), local)


def walk(
    steps: tuple[BaseStep, ...], prefix: str = "", scope: Scope | None = None
) -> Iterator[tuple[str, BaseStep, Scope]]:
    """Every step with its path (`outer/inner`) and its scope, containers before their content."""
    here = scope or Scope(steps)
    for step in steps:
        path = f"{prefix}{step.id}"
        yield path, step, here
        for _, nested in step.children():
            yield from walk(nested, f"{path}/", here.inside(step, nested))


class Definition(Part):
    """One workflow, immutable. `inputs` None means that the file has no such section: any input."""

    name: str = Field(min_length=1, max_length=200)
    version: str = Field("1.0", min_length=1, max_length=100)
    id: str | None = None
    description: str | None = None
    inputs: dict[Name, InputSpec] | None = None
    steps: Steps = Field(min_length=1)
    outputs: dict[Name, OutputSpec] | None = None
    timeout_seconds: Seconds | None = None
    on_failure: Literal["fail_fast", "continue"] = "fail_fast"
    concurrency: int | None = Field(None, ge=1, le=100_000)
    labels: dict[str, str] = Field(default_factory=dict)
    metadata: dict[str, Json] = Field(default_factory=dict)
    schedule: Schedule | None = None
    budget: Budget | None = None
    secrets: dict[Name, str] = Field(default_factory=dict)
    queue: str = Field("default", min_length=1, max_length=100)
    priority: int = Field(0, ge=-1000, le=1000)

    @cached_property
    def warnings(self) -> list[Problem]:
        """What loading found odd but allowed; no part of the digest. Loading fills it."""
        return []

    def canonical(self) -> bytes:
        """Compact JSON, fields in the order of the schema, defaults left out."""
        data = self.model_dump(mode="json", exclude_defaults=True, warnings=False)
        _restore_types(data["steps"], self.steps)
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        try:
            return text.encode()
        except UnicodeEncodeError:  # half a surrogate pair, which only an escape can carry
            return json.dumps(data, separators=(",", ":"), allow_nan=False).encode()

    @cached_property
    def digest(self) -> str:
        """Hex blake2b-256 of the canonical bytes: two equal definitions are one workflow."""
        return hashlib.blake2b(self.canonical(), digest_size=32).hexdigest()

    @classmethod
    def from_canonical(cls, data: bytes, step_types: StepTypes | None = None) -> Definition:
        """Read back what `canonical` wrote. Plug-ins' step types must be handed in."""
        value = json.loads(data)
        return cls.model_validate(value, context={"step_types": registry(step_types)})

    @cached_property
    def _by_id(self) -> dict[str, BaseStep]:
        return {step.id: step for _, step, _ in walk(self.steps)}

    def step(self, path: str) -> BaseStep:
        """The step at a path of the file or of a run (`summaries/3/summarise`): its last id."""
        found = self._by_id.get(path.rpartition("/")[2])
        if found is None:
            raise NotFound(f"workflow {self.name} has no step {path}")
        return found


def registry(extra: StepTypes | None = None) -> dict[str, type[BaseStep]]:
    """The built-in step types and `extra`, which may not replace a built-in one."""
    return {**(extra or {}), **STEP_TYPES}


def _restore_types(dumped: list[dict[str, Any]], steps: tuple[BaseStep, ...]) -> None:
    """Put `type` back, which is a default of each class, also into nested steps."""
    for data, step in zip(dumped, steps, strict=True):
        data["type"] = step.type
        for field in step.nested:
            nested = getattr(step, field)
            if isinstance(nested, Mapping):
                for key, inner in nested.items():
                    _restore_types(data[field][key], inner)
            elif nested:
                _restore_types(data[field], nested)

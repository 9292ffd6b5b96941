"""What every step of a workflow file has in common, whatever its type.

A step is a frozen pydantic model made from text that somebody wrote. It says what to do and how
(retries, limits, effects), never does it, and never looks at a run. Fields that may hold a template
are `Templated[...]`: before rendering they may be text with `{{ ... }}`, afterwards (validation
context `rendered`) only their own type. Invariant: what `render_step` hands to a step type has no
template left that would be read as one, so a value that came from a run is never rendered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializeAsAny,
    ValidationInfo,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from llm_orchestrator.language.lexer import is_template
from llm_orchestrator.model import Backoff, Effect, Json, OnUnknown, Policy, Retry

if TYPE_CHECKING:
    from llm_orchestrator.language.templates import Templates

T = TypeVar("T")

STEP_ID = r"^[A-Za-z0-9_][A-Za-z0-9_-]{0,127}$"
NAME = r"^[A-Za-z_][A-Za-z0-9_-]{0,127}$"


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("number", "should be a number, not true or false")
    return value


Name = Annotated[str, Field(pattern=NAME)]
StepId = Annotated[str, Field(pattern=STEP_ID)]
Seconds = Annotated[float, Field(gt=0, le=366 * 86_400), BeforeValidator(_no_bool)]
Count = Annotated[int, Field(ge=1, le=10_000_000), BeforeValidator(_no_bool)]
Limit = Annotated[int, Field(ge=1, le=100_000), BeforeValidator(_no_bool)]
Milliseconds = Annotated[int, Field(ge=0, le=86_400_000), BeforeValidator(_no_bool)]


class _AllowTemplate:
    """Lets a typed field hold a template until it is rendered."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        def check(value: Any, inner: Any, info: ValidationInfo) -> Any:
            if is_template(value) and not (info.context or {}).get("rendered"):
                return value
            return inner(value)

        return core_schema.with_info_wrap_validator_function(
            check, handler(source), serialization=core_schema.simple_ser_schema("any")
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        own = handler(schema)
        template = {"type": "string", "pattern": r"\{\{|\{%"}
        return own if own.get("type") == "string" else {"anyOf": [own, template]}


Templated = Annotated[T, _AllowTemplate()]
"""`T`, or text with a template that renders to `T`."""


class Part(BaseModel):
    """A frozen piece of a definition; unknown keys are mistakes."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class RetrySpec(Part):
    """When a failed try is followed by another. `max_attempts` counts every try."""

    max_attempts: Annotated[int, Field(ge=1, le=1000), BeforeValidator(_no_bool)] = 3
    backoff: Literal["exponential", "linear", "constant"] = "exponential"
    initial_delay_ms: Milliseconds = 100
    max_delay_ms: Milliseconds = 30_000
    multiplier: float = Field(2.0, ge=1, le=100)
    jitter: float = Field(0.25, ge=0, le=1)
    retry_on: tuple[str, ...] = ()

    def to_model(self) -> Retry:
        """The engine's own noun."""
        return Retry(
            max_attempts=self.max_attempts,
            backoff=Backoff(self.backoff),
            initial_delay_ms=self.initial_delay_ms,
            max_delay_ms=self.max_delay_ms,
            multiplier=self.multiplier,
            jitter=self.jitter,
            retry_on=self.retry_on,
        )


class Fallback(Part):
    """Another step of the same list that runs when this one has failed for good."""

    fallback: StepId


class Probe(Part):
    """How to find out whether an effect happened: ask a URL, or a Python function."""

    url: str | None = None
    expect: Json = None
    """What the answer must contain: a status (number) or a piece of its text."""
    function: str | None = Field(None, pattern=r"^[\w.]+:[\w.]+$")


def _as_step(value: Any, info: ValidationInfo) -> Any:
    if isinstance(value, BaseStep):
        return value
    registry = (info.context or {}).get("step_types") or {}
    if not isinstance(value, Mapping) or value.get("type") not in registry:
        raise PydanticCustomError("step", "should be a step: a mapping with a known `type`")
    return registry[value["type"]].model_validate(value, context=info.context)


class BaseStep(Part):
    """The common part of all step types; a plug-in's type is a subclass with its own `type`."""

    natural_outputs: ClassVar[tuple[str, ...]] = ()
    """Names of what the type returns, in binding order; empty: not known here."""
    nested: ClassVar[tuple[str, ...]] = ()
    """Fields that hold further steps."""
    is_local: ClassVar[bool] = False
    """True: nested steps are seen only through this step's outputs (map, loop)."""
    expressions: ClassVar[tuple[str, ...]] = ()
    """Fields that hold an expression: never rendered, evaluated by whoever uses them."""
    verbatim: ClassVar[tuple[str, ...]] = ()
    """Further fields that are never rendered."""
    waits: ClassVar[bool] = False
    """True: `timeout_seconds` bounds a wait, not an attempt."""

    id: StepId
    type: str
    depends_on: tuple[str, ...] = ()
    condition: str | None = None
    output: tuple[Name, ...] | dict[Name, str] | None = None
    timeout_seconds: Seconds | None = None
    retry: RetrySpec | None = None
    effect: Literal["repeatable", "once"] | None = None
    on_unknown: Literal["retry", "ask", "probe", "fail"] = "ask"
    probe: Probe | None = None
    on_error: Literal["fail", "continue"] | Fallback = "fail"
    on_skipped: Literal["skip", "run"] = "skip"
    description: str | None = None
    metadata: dict[str, Json] | None = None

    @property
    def fallback_id(self) -> str | None:
        """Id of the step that runs when this one has failed for good."""
        return self.on_error.fallback if isinstance(self.on_error, Fallback) else None

    def policy(self, default_effect: Effect, is_paid: bool) -> Policy:
        """How the engine performs this step. `default_effect` comes from the step's type."""
        return Policy(
            retry=self.retry.to_model() if self.retry else Retry(),
            timeout_s=None if self.waits else self.timeout_seconds,
            effect=Effect(self.effect) if self.effect else default_effect,
            on_unknown=OnUnknown(self.on_unknown),
            is_paid=is_paid,
        )

    def children(self) -> Iterator[tuple[str, tuple[BaseStep, ...]]]:
        """Every list of nested steps, with its key under this step."""
        for field in self.nested:
            value = getattr(self, field)
            if isinstance(value, Mapping):
                yield from value.items()
            elif value:
                yield field, value

    def natural_names(self) -> tuple[str, ...]:
        """What this step returns, in binding order; empty: not known here."""
        return self.natural_outputs

    def bound_names(self) -> tuple[str, ...]:
        """The names that `output` binds, in order."""
        return tuple(self.output) if self.output else ()

    def bind(
        self, natural: Mapping[str, Json], templates: Templates | None = None
    ) -> dict[str, Json]:
        """What templates see as `steps.ID`: the bound names first, the natural ones behind them.

        `natural` is what the step type returned. A mapping's templates see it as `result` (the
        whole of it, or its own `result` where it has one) and by its own names.
        """
        order = self.natural_names()
        if not set(order) & set(natural):
            order = tuple(natural)
        if isinstance(self.output, Mapping):
            bound = {
                name: self._pick(source, natural, templates) for name, source in self.output.items()
            }
        else:
            pairs = zip(self.output or (), order, strict=False)
            bound = {name: natural.get(source) for name, source in pairs}
        return {**bound, **{name: natural[name] for name in natural if name not in bound}}

    def _pick(self, source: str, natural: Mapping[str, Json], templates: Templates | None) -> Json:
        if not is_template(source):
            return natural.get(source)
        if templates is None:
            from llm_orchestrator.language.templates import Templates  # noqa: PLC0415 (heavy)

            templates = Templates()
        return templates.render(source, {**natural, "result": natural.get("result", dict(natural))})

    def first_output(self, outputs: Mapping[str, Json]) -> Json:
        """What templates see as `outputs.ID`. `outputs` is what `bind` returned."""
        names = self.bound_names() or tuple(n for n in self.natural_names() if n in outputs)
        return next((outputs.get(name) for name in names or outputs), None)


Steps = tuple[Annotated[SerializeAsAny[BaseStep], BeforeValidator(_as_step)], ...]
"""A list of steps of any known type."""

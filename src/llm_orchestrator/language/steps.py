"""The step types that come with the product: what each may say in a workflow file.

One model per type; none of them does anything (see the package `steps`). A plug-in adds a type by
a further subclass of `BaseStep`. Types that take free parameters (llm, transform, action) keep what
they do not know; `free` returns it.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, PrivateAttr, model_validator

from llm_orchestrator.language.base import (
    NAME,
    BaseStep,
    Count,
    Limit,
    Part,
    Steps,
    Templated,
)
from llm_orchestrator.model import Json

Temperature = Annotated[float, Field(ge=0, le=2)]
Pause = Annotated[float, Field(ge=0, le=10 * 366 * 86_400)]

_FREE = ConfigDict(extra="allow")


class FreeStep(BaseStep):
    """A step that takes parameters which we do not know by name."""

    model_config = _FREE
    parameters: Templated[dict[str, Json]] = Field(default_factory=dict)
    """Free parameters whose names would look like a mistake at the top."""

    @property
    def free(self) -> dict[str, Json]:
        """Every parameter that is no field of the type."""
        return {**self.parameters, **(self.model_extra or {})}


class Alternative(Part):
    """A provider and model to try when those before it are out."""

    model_config = _FREE
    provider: str
    model: str | None = None


class LLMStep(FreeStep):
    """Ask a language model."""

    natural_outputs = ("text", "model", "tokens", "metadata", "data", "tool_calls")
    type: Literal["llm"] = "llm"
    provider: str
    model: str
    prompt: str | None = None
    messages: Templated[tuple[dict[str, Json], ...]] | None = None
    system: str | None = None
    temperature: Templated[Temperature] | None = None
    max_tokens: Templated[Count] | None = None
    stream: Templated[bool] = True
    response_schema: Templated[dict[str, Json]] | None = None
    reask_max: int = Field(2, ge=0, le=10)
    """How often an answer that does not fit `response_schema` is sent back."""
    tools: Templated[tuple[dict[str, Json], ...]] = ()
    fallback: tuple[Alternative, ...] = ()

    @model_validator(mode="after")
    def _has_one_question(self) -> LLMStep:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("needs either `prompt` or `messages`")
        return self


class EmbedStep(BaseStep):
    """Turn one text, or a list of texts, into vectors."""

    natural_outputs = ("vector", "metadata")
    type: Literal["embed"] = "embed"
    provider: str
    model: str
    input: str | tuple[str, ...]
    dimensions: Templated[Limit] | None = None
    batch_size: Templated[Limit] | None = None
    parameters: Templated[dict[str, Json]] = Field(default_factory=dict)


class VectorSearchStep(BaseStep):
    """Find the nearest vectors."""

    natural_outputs = ("results", "metadata")
    type: Literal["vector_search"] = "vector_search"
    database: str
    index: str
    query: Templated[tuple[float, ...]]
    top_k: Templated[Limit] = 5
    filter: Templated[dict[str, Json]] | None = None
    namespace: str = ""
    include_metadata: Templated[bool] = True
    include_vectors: Templated[bool] = False


class VectorRecord(Part):
    """One vector to keep."""

    id: str
    vector: Templated[tuple[float, ...]]
    metadata: Templated[dict[str, Json]] = Field(default_factory=dict)


class VectorUpsertStep(BaseStep):
    """Keep vectors: `items`, or the columns `ids`, `vectors` and `metadatas` of equal length."""

    natural_outputs = ("count", "metadata")
    type: Literal["vector_upsert"] = "vector_upsert"
    database: str
    index: str
    namespace: str = ""
    items: Templated[tuple[Templated[VectorRecord], ...]] | None = None
    ids: Templated[tuple[str, ...]] | None = None
    vectors: Templated[tuple[Templated[tuple[float, ...]], ...]] | None = None
    metadatas: Templated[tuple[Templated[dict[str, Json]], ...]] | None = None

    @model_validator(mode="after")
    def _has_one_form(self) -> VectorUpsertStep:
        has_columns = self.ids is not None and self.vectors is not None
        if (self.items is None) != has_columns:
            raise ValueError("needs either `items` or both `ids` and `vectors`")
        return self


TransformFunction = Literal[
    "merge", "filter", "concat", "map", "select", "sort", "unique", "split", "join", "format",
    "extract", "parse_json", "to_json", "template", "length", "sum", "expression",
]  # fmt: skip


class TransformStep(FreeStep):
    """Compute something from what is there.

    `inputs` is a mapping of name to value, or a list of values; loading turns the list of bare
    names that the earlier system had into the mapping. `expression` is evaluated per item, with
    `item`, `index` and all that the step sees (`scope`); under `inputs` there are the transform's
    own inputs besides the run's. Without a function an
    expression is the result itself: loading turns it into `function: expression` with `value`.
    """

    natural_outputs = ("result",)
    expressions = ("expression",)
    type: Literal["transform"] = "transform"
    function: TransformFunction
    inputs: Templated[dict[str, Json] | tuple[Json, ...]] = ()
    expression: str | None = None
    template: str | None = None
    key: str | None = None
    value: Json = None
    by: str | None = None
    fields: Templated[tuple[str, ...]] | None = None
    path: str | None = None
    pattern: str | None = None
    separator: str | None = None
    descending: Templated[bool] = False

    _scope: dict[str, Json] = PrivateAttr(default_factory=dict)

    @property
    def scope(self) -> dict[str, Json]:
        """A copy of the names that `expression` uses besides item and index; set by rendering."""
        return self._scope

    def with_scope(self, scope: dict[str, Json]) -> Self:
        """The same step for one execution, with the names that `expression` uses."""
        copy = self.model_copy()
        copy._scope = scope  # noqa: SLF001 (its own)
        return copy


class ActionStep(FreeStep):
    """Do something outside. An unknown `action` becomes an outbox entry that somebody fetches."""

    type: Literal["action"] = "action"
    action: str = Field(min_length=1)

    @property
    def is_known(self) -> bool:
        """False: nobody here performs it, so it goes to the outbox."""
        return self.action in KNOWN_ACTIONS

    def natural_names(self) -> tuple[str, ...]:
        """Http and webhook return the answer's parts, all others one result."""
        return HTTP_OUTPUTS if self.action in HTTP_ACTIONS else ("result",)


KNOWN_ACTIONS = ("log", "http", "webhook", "notify", "publish", "file_write")
HTTP_ACTIONS = ("http", "webhook")
HTTP_OUTPUTS = ("body", "status", "headers")


class ParallelStep(BaseStep):
    """Run tasks side by side; they are seen from outside by their own ids."""

    natural_outputs = ("results",)
    nested = ("tasks",)
    type: Literal["parallel"] = "parallel"
    tasks: Steps = Field(min_length=1)
    max_concurrency: Templated[Limit] | None = None


class MapStep(BaseStep):
    """Run steps for each item of a list; inside, the item is `item` (or its given name)."""

    natural_outputs = ("results",)
    nested = ("steps",)
    is_local = True
    expressions = ("items",)
    type: Literal["map"] = "map"
    items: str | tuple[Json, ...]
    item: str = Field("item", pattern=NAME)
    steps: Steps = Field(min_length=1)
    max_concurrency: Templated[Limit] | None = None


class BranchStep(BaseStep):
    """Run the steps under the value of `switch`, else `default`; seen outside by their ids.

    A file says `condition` for the switch, as the earlier system did, and `when` for whether the
    step runs at all; loading sorts the two out.
    """

    natural_outputs = ("result", "branch")
    nested = ("branches", "default")
    expressions = ("switch",)
    type: Literal["branch"] = "branch"
    switch: str
    branches: dict[str, Steps] = Field(min_length=1)
    default: Steps = ()


class LoopStep(BaseStep):
    """Repeat steps until `until` holds, judged after each iteration.

    Inside: `iteration` (from 1) and `previous`, the outputs of the iteration before by step id
    (empty in the first). `until` also sees `steps.*` of the iteration that just ended.
    """

    natural_outputs = ("result", "iterations", "is_done")
    nested = ("steps",)
    is_local = True
    expressions = ("until",)
    type: Literal["loop"] = "loop"
    steps: Steps = Field(min_length=1)
    until: str | None = None
    max_iterations: Templated[Limit] = 10


class WaitStep(BaseStep):
    """Wait for time to pass, for a moment, or for a signal (with `timeout_seconds`)."""

    natural_outputs = ("payload",)
    waits = True
    type: Literal["wait"] = "wait"
    seconds: Templated[Pause] | None = None
    until: str | None = None
    signal: str | None = Field(None, min_length=1)
    payload_schema: dict[str, Json] | None = None

    @model_validator(mode="after")
    def _waits_for_one_thing(self) -> WaitStep:
        if sum(value is not None for value in (self.seconds, self.until, self.signal)) != 1:
            raise ValueError("needs exactly one of `seconds`, `until` and `signal`")
        return self


class ApprovalStep(BaseStep):
    """Wait for a person's yes or no. `form` is a JSON schema, or a mapping of field to type."""

    natural_outputs = ("approved", "form", "by")
    waits = True
    type: Literal["approval"] = "approval"
    message: str | None = None
    form: Templated[dict[str, Json]] | None = None
    on_timeout: Literal["approve", "reject", "fail"] = "reject"

    def form_schema(self) -> dict[str, Json] | None:
        """The form as a JSON schema."""
        if self.form is None or not {"type", "properties", "$ref"}.isdisjoint(self.form):
            return self.form
        fields = {
            name: {"type": field} if isinstance(field, str) else field
            for name, field in self.form.items()
        }
        return {"type": "object", "properties": fields, "required": list(fields)}


class WorkflowStep(BaseStep):
    """Run another workflow, by its registered name or by its file, and wait for its end."""

    natural_outputs = ("output", "run_id")
    verbatim = ("file",)
    type: Literal["workflow"] = "workflow"
    workflow: str | None = None
    file: str | None = None
    version: str | None = None
    inputs: Templated[dict[str, Json]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names_one_workflow(self) -> WorkflowStep:
        if (self.workflow is None) == (self.file is None):
            raise ValueError("needs either `workflow` or `file`")
        return self


class PythonStep(BaseStep):
    """Call a Python function, `module:name`, with `args` by name."""

    natural_outputs = ("result",)
    verbatim = ("function",)
    type: Literal["python"] = "python"
    function: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")
    args: Templated[dict[str, Json]] = Field(default_factory=dict)


STEP_TYPES: dict[str, type[BaseStep]] = {
    cls.model_fields["type"].default: cls
    for cls in (
        LLMStep, EmbedStep, VectorSearchStep, VectorUpsertStep, TransformStep, ActionStep,
        ParallelStep, MapStep, BranchStep, LoopStep, WaitStep, ApprovalStep, WorkflowStep,
        PythonStep,
    )
}  # fmt: skip
"""The built-in types by name."""

NATURAL_OUTPUTS: dict[str, tuple[str, ...]] = {
    **{name: cls.natural_outputs for name, cls in STEP_TYPES.items()},
    "action": ("result",),
}
"""What each type returns, in binding order; actions http and webhook return `HTTP_OUTPUTS`."""

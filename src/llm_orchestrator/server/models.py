"""What requests bring and what answers hold: the words of the API, each with its meaning.

Requests are refused when they bring more than a model has. Answers are made by hand from rows and
journals (`shapes.py`) and only described here; the tests compare both on every answer.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Literal

from fastapi import Header, Path
from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
)

from llm_orchestrator.model import Json, RunState, StepState
from llm_orchestrator.store.base import RunFilter

CONTROL = r"\x00-\x1f\x7f"
RUN_ID = r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"
YEAR_S = 366 * 24 * 3600.0
PAGE_MAX = 1_000
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
BULK_MAX = 1_000
WAIT_S_MAX = 300.0


def _in_words(value: object) -> object:
    """A moment is a text with a date, a T and a time; pydantic would also take numbers."""
    if not isinstance(value, str) or "T" not in value.upper():
        raise ValueError("write it as RFC 3339 says: 2027-01-31T08:00:00Z")
    return datetime.datetime.fromisoformat(value.upper())


def _whole(value: object) -> object:
    """1.0 is an integer in JSON Schema, and in JSON there is only one kind of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
Moment = Annotated[AwareDatetime, BeforeValidator(_in_words)]
Word = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=rf"^[^{CONTROL}]+$")]
Text = Annotated[str, StringConstraints(max_length=2_000, pattern=rf"^[^{CONTROL}]*$")]
RunId = Annotated[str, StringConstraints(pattern=RUN_ID)]
RunCursor = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
SeqCursor = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,11}$")]
NameCursor = Annotated[
    str, StringConstraints(min_length=2, max_length=1_600, pattern=r"^([0-9a-f]{2})+$")
]
RunPath = Annotated[str, Path(pattern=RUN_ID, description="A run's id.")]
NamePath = Annotated[
    str,
    Path(
        min_length=1,
        max_length=200,
        pattern=rf"^[^/{CONTROL}]+$",
        description="A workflow's name.",
    ),
]
Key = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=200,
        pattern=r"^[\x21-\x7e]+$",
        alias="Idempotency-Key",
        description=(
            "The same key with the same request starts nothing a second time and answers with the "
            "first run; with another request it is refused (422)."
        ),
    ),
]


SenderKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=200,
        pattern=r"^[\x21-\x7e]+$",
        alias="Idempotency-Key",
        description="The same key again delivers nothing a second time.",
    ),
]


class Given(BaseModel):
    """What a request brings."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Told(BaseModel):
    """What an answer holds."""

    model_config = ConfigDict(extra="forbid")


class Execute(Given):
    """A run to start."""

    inputs: dict[str, Json] | None = Field(None, description="The run's inputs, by name.")
    labels: dict[Word, Word] | None = Field(
        None, max_length=64, description="Added to the workflow's own labels."
    )
    priority: Annotated[Whole, Field(ge=-1000, le=1000)] | None = Field(
        None, description="Higher goes first; the workflow's own by default."
    )
    queue: Word | None = Field(None, description="The workflow's own by default.")
    delay_s: float | None = Field(
        None, ge=0, le=YEAR_S, allow_inf_nan=False, description="Start this much later, seconds."
    )
    is_async: bool | None = Field(
        None, alias="async", description="The earlier system's word: false waits for the end."
    )
    timeout_override: float | None = Field(
        None, gt=0, le=WAIT_S_MAX, allow_inf_nan=False, description="How long it then waits, s."
    )


class Outcome(Told):
    """Where a run stands; output and error once it has ended."""

    run_id: RunId
    state: RunState
    reason: str = Field(description="Why it is in this state, in one word; may be empty.")
    is_ended: bool = Field(description="It is at rest: final, or paused until somebody decides.")
    output: Json = Field(description="What it made; null until it is completed.")
    error: Json = Field(description="Why it failed or paused; null otherwise.")


class Executed(Outcome):
    """A run that was started, or had been started by the same request before."""

    workflow: str
    version: str = Field(description="The version that runs.")
    is_repeat: bool = Field(description="The idempotency key was known: this is the first run.")


class RunFacts(Told):
    """A run as lists show it."""

    run_id: RunId
    workflow: str
    version: str
    digest: str = Field(description="Of the definition that it runs.")
    state: RunState
    reason: str = Field(description="Why it is in this state, in one word; may be empty.")
    queue: str
    priority: int
    labels: dict[str, str]
    owner: str | None = Field(description="The node that drives it.")
    epoch: int = Field(description="The fencing token of its owner.")
    idempotency_key: str | None
    parent_run_id: RunId | None = Field(description="The run that started it as a step.")
    wake_at: AwareDatetime | None = Field(description="When it goes on by itself.")
    created_at: AwareDatetime | None
    started_at: AwareDatetime | None
    finished_at: AwareDatetime | None


class RunDetail(RunFacts):
    """A run with all that its journal says of it as a whole."""

    input: Json
    output: Json
    error: Json
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    cost_usd: float = Field(description="Of all attempts, at the prices of their time.")
    attempts: int
    repeats: int = Field(description="Attempts that were made again because of a crash.")
    rewinds: int
    entries: int = Field(description="How long its journal is.")
    origin: dict[str, Json] = Field(description="What it was forked from or started by.")


class RunSelect(Given):
    """Which runs; whoever asks for nothing gets all of them."""

    state: list[RunState] = Field([], max_length=7, description="Only these states.")
    workflow: Word | None = Field(None, description="Only runs of this workflow.")
    label: str | None = Field(
        None,
        pattern=rf"^[^={CONTROL}]+=[^{CONTROL}]+$",
        max_length=401,
        description="Only runs with this label: NAME=VALUE.",
    )
    queue: Word | None = Field(None, description="Only runs of this queue.")
    parent: RunId | None = Field(None, description="Only the runs that this one started.")
    since: Moment | None = Field(None, description="Accepted then or later.")
    until: Moment | None = Field(None, description="Accepted before.")

    def to_filter(self, limit: int, *, before: str | None = None) -> RunFilter:
        """As the store takes it."""
        name, _, value = (self.label or "").partition("=")
        return RunFilter(
            states=tuple(self.state),
            workflow=self.workflow,
            parent_run_id=self.parent,
            queue=self.queue,
            label=(name, value) if self.label else None,
            since=micros(self.since),
            until=micros(self.until),
            before=before,
            limit=limit,
        )


class RunQuery(RunSelect):
    """Which runs, and which page of them."""

    cursor: RunCursor | None = Field(None, description="`next` of the page before.")
    limit: int = Field(50, ge=1, le=PAGE_MAX, description="At most so many.")


class Page(Given):
    """Which page of a list."""

    cursor: SeqCursor | None = Field(None, description="`next` of the page before.")
    limit: int = Field(100, ge=1, le=PAGE_MAX, description="At most so many.")


class NamePage(Given):
    """Which page of a list by name."""

    cursor: NameCursor | None = Field(None, description="`next` of the page before.")
    limit: int = Field(100, ge=1, le=PAGE_MAX, description="At most so many.")


def micros(moment: datetime.datetime | None) -> int | None:
    """Microseconds since the epoch."""
    return None if moment is None else (moment - _EPOCH) // datetime.timedelta(microseconds=1)


class RunPage(Told):
    """Runs, the newest first."""

    items: list[RunFacts]
    next: str | None = Field(description="The cursor of the next page; null on the last one.")


class Answered(Told):
    """What came of a request to a run."""

    run_id: RunId
    state: RunState = Field(description="As it is now; not yet changed when it is not done.")
    is_done: bool = Field(description="False: whoever drives the run was asked, and will obey.")
    message: str


class WorkflowFacts(Told):
    """One version of a workflow."""

    name: str
    version: str
    digest: str = Field(description="Of the definition: two equal ones are one workflow.")
    kind: Literal["definition", "python"] = Field(description="A file's content, or code.")
    created_at: AwareDatetime | None


class WorkflowSummary(WorkflowFacts):
    """A workflow by its newest version."""

    versions: int = Field(description="How many definitions of that name there are.")


class WorkflowPage(Told):
    """Workflows by name."""

    items: list[WorkflowSummary]
    next: str | None = Field(description="The cursor of the next page; null on the last one.")


class WorkflowDetail(WorkflowFacts):
    """One version with its definition, and what other versions there are."""

    definition: dict[str, Json] = Field(description="As it runs.")
    versions: list[WorkflowFacts] = Field(description="Of that name, the oldest first.")


class Registered(WorkflowFacts):
    """A definition that is kept from now on, or was before."""

    is_new: bool
    warnings: list[str] = Field(description="What is odd but allowed, each with its place.")


class Deleted(Told):
    """Definitions that are gone."""

    name: str
    deleted: list[WorkflowFacts]


class Mistake(Told):
    """One thing that is wrong with a definition."""

    line: int
    column: int
    message: str


class Validated(Told):
    """What a definition would come to. Nothing was saved."""

    is_valid: bool
    name: str | None
    version: str | None
    digest: str | None
    problems: list[Mistake] = Field(description="Everything that is wrong.")
    warnings: list[str] = Field(description="What is odd but allowed, each with its place.")


class StepFacts(Told):
    """One step of a run."""

    step: str = Field(description="Its path in the run.")
    state: StepState
    attempts: int
    repeats: int
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    cost_usd: float
    ms: float | None = Field(description="What the last attempt took, milliseconds.")
    wait: str
    error: str
    is_copy: bool = Field(description="Taken over from the run that this one was forked from.")
    seq: int | None = Field(description="The checkpoint that it made.")


# -- requests to runs -----------------------------------------------------------------------------


class DecideFinished(Given):
    """A step whose outcome is unknown has finished."""

    step: Word
    outcome: Literal["finished"]
    result: Json = Field(None, description="What it made.")


class DecideAgain(Given):
    """A step whose outcome is unknown is to be done again, or has failed."""

    step: Word
    outcome: Literal["retry", "failed"]


class Resume(Given):
    """Let a paused run go on."""

    decide: DecideFinished | DecideAgain | None = Field(
        None, description="What became of a step whose outcome is unknown."
    )


class Fork(Given):
    """A new run that shares an older one's results."""

    step: Word | None = Field(
        None, description="Begin again with this step; without it only what is left is done."
    )
    inputs: dict[str, Json] | None = Field(None, description="Edited inputs, by name.")
    version: Word | None = Field(None, description="The origin's version by default.")
    dry_run: bool = Field(False, description="Only say what would be done again.")


class Forked(Told):
    """A fork, or with `dry_run` the plan of one."""

    run_id: RunId | None = Field(description="The new run; null for a plan.")
    fork_of: RunId
    step: str | None
    version: str
    kept: list[str] = Field(description="Steps whose results are taken over.")
    redone: list[StepFacts] = Field(
        description="Steps that are done again, with what they took the first time."
    )
    never_done: list[str] = Field(description="Top-level steps that the origin never began.")
    cost_usd: float = Field(description="What `redone` cost the first time.")
    input_tokens: int
    output_tokens: int


class Restore(Given):
    """Go back to a checkpoint."""

    checkpoint: str = Field(
        pattern=rf"{RUN_ID[:-1]}:[1-9][0-9]{{0,9}}$",
        description="RUN:SEQ, as `checkpoints` lists them. What came after is hidden, not deleted.",
    )


class Signal(Given):
    """A message to a run."""

    name: Word = Field(description="What the run waits for.")
    payload: Json = Field(None, description="What to hand over.")


class Approve(Given):
    """An answer to an approval step."""

    step: Word | None = Field(None, description="May be left out when it waits for one only.")
    approved: bool = Field(True, description="False rejects.")
    form: dict[str, Json] | None = Field(None, description="The fields that the step asks for.")


class Reject(Given):
    """A no to an approval step."""

    step: Word | None = Field(None, description="May be left out when it waits for one only.")
    form: dict[str, Json] | None = Field(None, description="The fields that the step asks for.")


class CheckpointFacts(Told):
    """An entry that records a finished step: a point to which a run can go back."""

    checkpoint: str = Field(description="RUN:SEQ; what `restore` takes.")
    seq: int
    step: str = Field(description="Empty for the beginning.")
    recorded_at: AwareDatetime | None
    is_hidden: bool = Field(description="A later restore took it back; it can be restored, too.")


class CheckpointPage(Told):
    """Checkpoints, the oldest first."""

    items: list[CheckpointFacts]
    next: str | None = Field(description="The cursor of the next page; null on the last one.")


class EntryFacts(Told):
    """One entry of a journal."""

    id: str = Field(description="RUN:SEQ.")
    seq: int
    epoch: int
    kind: str
    step: str
    attempt: int
    payload: dict[str, Json] = Field(description="What it records, decoded.")
    digest: str = Field(description="Of the chain up to here, hex.")
    recorded_at: AwareDatetime | None


class FlawFacts(Told):
    """Something in a journal that does not fit its check."""

    seq: int
    what: str
    is_mendable: bool


class JournalPage(Told):
    """Entries in order, and what is wrong with the whole journal."""

    items: list[EntryFacts]
    flaws: list[FlawFacts] = Field(description="Empty when every byte fits the chain.")
    next: str | None = Field(description="The cursor of the next page; null on the last one.")


class Explained(Told):
    """Why a run does not move, and what moves it."""

    run_id: RunId
    state: RunState
    reason: str
    sentence: str
    command: str


class StepsView(Told):
    """A run's steps, in the order in which they were first heard of."""

    items: list[StepFacts]
    planned: list[str] = Field(description="Top-level steps that have not begun.")


class Bulk(Given):
    """One action on every run that a filter finds, at most 1000 of them."""

    filter: RunSelect = Field(description="Without `state`: the runs that take the action.")
    action: Literal["cancel", "pause", "resume", "retry"]
    preview: bool = Field(True, description="True only says which runs; false does it.")
    limit: Whole = Field(BULK_MAX, ge=1, le=BULK_MAX, description="At most so many, newest first.")


class BulkItem(Told):
    """What came, or would come, of one run."""

    run_id: RunId
    state: RunState
    is_done: bool
    message: str
    code: str | None = Field(description="Why nothing came of it; null otherwise.")


class BulkResult(Told):
    """What came of each run."""

    action: str
    preview: bool
    count: int
    has_more: bool = Field(description="The filter finds more: ask again.")
    items: list[BulkItem]

"""The words of health and of the admin routes; see models.py."""

from __future__ import annotations

from typing import Literal

from pydantic import AwareDatetime, Field

from llm_orchestrator.model import Json, RunState
from llm_orchestrator.server.models import Given, Text, Told, Word

Status = Literal["healthy", "degraded", "unhealthy"]


class Life(Told):
    """Whether it lives."""

    status: Status


class Readiness(Told):
    """Whether requests and new work may come here."""

    status: Status
    reasons: list[str] = Field(description="Why not; empty when they may.")


class Component(Told):
    """How one part does."""

    status: Status
    latency_ms: float | None = Field(description="What asking it took, milliseconds.")
    detail: str


class Health(Told):
    """How all of it does: the worst of its parts."""

    status: Status
    version: str
    region: str
    node: str | None = Field(description="The node of this process, if it executes runs.")
    components: dict[str, Component]


# -- admin ----------------------------------------------------------------------------------------


class SettingFacts(Told):
    """One setting, secrets masked."""

    name: str
    value: Json
    origin: str = Field(description="flag, the environment's or the file's name, or default.")


class Settings(Told):
    """Every setting of this process."""

    items: list[SettingFacts]


class QueueFacts(Told):
    """Runs of a queue that are due and that nobody drives."""

    queue: str
    depth: int
    oldest_age_s: float


class RunCount(Told):
    """So many runs of a workflow are in a state."""

    state: RunState
    workflow: str
    count: int


class Stats(Told):
    """What is in the store, and what this process does."""

    runs: list[RunCount] = Field(description="All runs, the most frequent first.")
    queues: list[QueueFacts]
    waiting: int = Field(description="Runs that are due and that nobody drives.")
    stalled: int = Field(description="Runs that are driven and have not moved for five minutes.")
    nodes: dict[str, int] = Field(description="How many nodes are in which state.")
    driven: int = Field(description="Runs in this process.")
    epoch: int = Field(description="The store's generation: it grows with each restore.")
    version: str


class NodeFacts(Told):
    """A node: one engine process life."""

    node_id: str
    region: str
    state: Literal["alive", "leaving", "left", "dead"]
    is_connected: bool
    is_drained: bool = Field(description="An operator wants it empty.")
    beat: int
    started_at: AwareDatetime | None
    heartbeat_at: AwareDatetime | None
    info: Json = Field(description="What it tells of itself: host, pid, runs, room, memory.")


class Nodes(Told):
    """The nodes that there are and lately were, newest first."""

    items: list[NodeFacts]


class Why(Given):
    """Why an operator wants this; everybody who is refused reads it."""

    reason: Text = Field("", description="Shown to whoever is refused.")


class Maintain(Why):
    """Maintenance mode."""

    mode: Literal["keep", "drain"] = Field(
        "keep", description="keep: what was accepted goes on; drain: nodes let their runs go."
    )
    retry_after_s: float = Field(
        30.0, gt=0, le=86_400, allow_inf_nan=False, description="When to ask again."
    )


class Maintained(Told):
    """Maintenance mode as it stands."""

    enabled: bool
    mode: Literal["keep", "drain"]
    by: str
    reason: str
    since: AwareDatetime | None
    retry_after_s: float
    drained: list[str] = Field(description="Nodes that an operator wants empty.")


class Drained(Told):
    """A node that was told."""

    node_id: str
    is_drained: bool


class BreakerFacts(Told):
    """A provider's circuit breaker, shared by all nodes."""

    name: str
    provider: str
    model: str
    state: Literal["closed", "open", "half_open"]
    retry_in_s: float = Field(description="How long an open one lets nothing pass.")
    openings: int = Field(description="In a row, since it was closed last.")
    wave: int = Field(description="Half open: how many calls may pass at a time.")
    succeeded: int


class Breakers(Told):
    """Every breaker that was ever open."""

    items: list[BreakerFacts]


class Reset(Given):
    """Which breaker to close."""

    name: Word = Field(description="PROVIDER/MODEL, as the list says.")


class ResetDone(Told):
    """What came of it."""

    name: str
    was_open: bool = Field(description="False: it was closed already.")
    woken: int = Field(description="Parked runs that waited for it and go on now.")

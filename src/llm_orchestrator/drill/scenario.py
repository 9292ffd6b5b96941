"""A scenario is data: the load, the fault, what is expected, what it may cost.

Nothing here acts. A file that says something unknown is refused whole, so that a misspelt objective
can never pass for one that was met. Overrides (`load.in_flight=20`) are for trials; a result that
was made with them says so and is no measurement of the scenario.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML

from llm_orchestrator.errors import ConfigError, NotFound

Json = Any
CLASSES = (
    "database",
    "application",
    "network",
    "data",
    "backup",
    "region",
    "provider",
    "clock",
)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Load(_Part):
    """What is under way when the fault comes. A run: a call, an effect, then a stream."""

    in_flight: int = Field(200, ge=1, description="Runs under way at a time.")
    ask_ms: int = Field(2_000, ge=0, description="How long the first call takes.")
    words: int = Field(20, ge=1, description="Words of the streamed answer.")
    word_ms: int = Field(500, ge=0, description="Milliseconds between two of them.")
    probe_ms: int = Field(100, ge=20, description="A small run for checking begins so often.")
    model: str = Field("fake", description="The model that is asked; one with a price costs.")
    fallback: str = Field("", description="PROVIDER/MODEL that every step falls back on.")

    client: Literal["plain", "library"] = Field(
        "plain", description="Who asks: the witness's own client, or our client library."
    )

    @property
    def run_s(self) -> float:
        """How long a run takes, seconds, when nothing is in its way."""
        return (self.ask_ms + self.words * self.word_ms) / 1000


class System(_Part):
    """What the target makes for it. Numbers of regions and disks are the lab's matter."""

    regions: int = Field(1, ge=1, le=3)
    policy: Literal["active-active", "active-passive"] = Field(
        "active-active", description="Which regions work; active-passive: a, the others stand by."
    )
    names: int = Field(
        0, ge=0, le=2, description="Clients know regions by so many names; 0: nodes by address."
    )
    disk_mb: int = Field(0, ge=0, description="Each database on a disk of so many MiB; 0: no.")
    providers: int = Field(1, ge=1, le=2, description="2: Anthropic's has a server of its own.")
    shim: bool = Field(
        default=False, description="Databases whose disks can be made to fail and to be slow."
    )
    buffers_mb: int = Field(
        0, ge=0, description="Each database keeps so many MiB in memory; 0: as cluster.toml says."
    )
    memory_mb: int = Field(
        0, ge=0, description="The node of `single` may use so many MiB, by a control group; 0: any."
    )
    archive: Literal["", "sync", "async"] = Field("", description="The stream archive's mode.")
    archive_on_failure: Literal["", "stall", "degrade"] = Field(
        "", description="As the setting of that name; single only, as all that follow."
    )
    object_store: Literal["", "backup", "archive"] = Field(
        "", description="Keep these in an object store of the target's own."
    )
    backup_schedule: str = Field("", description="As the setting of that name.")
    is_sealed: bool = Field(default=False, description="Seal backups with a key of the target's.")
    sabotage: str = Field(
        "",
        description="For tests of the drill itself: a folder whose sitecustomize.py takes a guard"
        " out of every process of ours. No scenario's file names one.",
    )


class Baseline(_Part):
    """What must be true before the fault, else the drill is inconclusive and touches nothing."""

    seconds: float = Field(3.0, gt=0)
    cpu_percent_max: float = Field(80.0, gt=0)


class Fault(_Part):
    """One injected failure. `after_s` counts from the fault before it."""

    kind: str
    on: str = "node"
    after_s: float = Field(0.0, ge=0)
    options: dict[str, str | int | float | bool] = Field(default_factory=dict)


class Heal(_Part):
    """When the fault is undone. None of it: what recovers does so by itself."""

    after_s: float = Field(ge=0)


class Seen(_Part):
    """What the product must say by itself on /metrics: `metric` is above `above`, as an alert's.

    Names are without our prefix, with their labels as on the page.
    """

    metric: str
    above: float | str = Field(0.0, description="A number, or another metric's name.")
    within_s: float = Field(gt=0, description="One cycle: so soon after the fault.")
    ends: bool = Field(default=True, description="And as soon after the healing it is over.")


class Expect(_Part):
    """What must be true besides: nothing lost, nothing twice, nothing wrong is always expected."""

    has_outage: bool | None = Field(
        None, description="false: no request may be refused. None: it is not looked at."
    )
    node_deaths: int | None = None
    claimed_again: int | None = Field(
        None, description="So many runs may be let go (parked) or lost, and claimed again."
    )
    touched_may_pause: bool = Field(
        default=False,
        description="A run whose record was damaged may stop for a person's decision.",
    )
    seen: Seen | None = Field(None, description="What must be said of the fault before it heals.")


class Objectives(_Part):
    """What it may cost. `recovery_point_s` is the age of lost work that is promised to nobody."""

    recovery_time_s: float = Field(gt=0)
    recovery_point_entries: int = Field(0, ge=0)
    recovery_point_s: float = Field(0.0, ge=0)


class Limits(_Part):
    """When the drill stops waiting, seconds."""

    recover_s: float = Field(60.0, gt=0)
    drain_s: float = Field(120.0, gt=0)


class Scenario(_Part):
    """One scenario. `id` is the word that alerts, procedures, results and tests use for it."""

    id: str = Field(pattern=r"^[a-z][a-z0-9]*(_[a-z0-9]+)*$")
    category: Literal[
        "database", "application", "network", "data", "backup", "region", "provider", "clock"
    ] = Field(alias="class")
    title: str
    needs: list[Literal["single", "lab", "root"]] = Field(
        description="Targets that it can be carried out against; `root` besides."
    )
    repeat: int = Field(1, ge=1, description="So many runs, unless more are asked for.")
    system: System = Field(default_factory=System)  # type: ignore[arg-type]
    load: Load = Field(default_factory=Load)  # type: ignore[arg-type]
    baseline: Baseline = Field(default_factory=Baseline)  # type: ignore[arg-type]
    faults: list[Fault] = Field(min_length=1)
    measure_from: Literal["fault", "heal"] = "fault"
    heal: Heal | None = None
    failback: bool = Field(
        default=False, description="Redundant again, the work is moved home, in order, under load."
    )
    expect: Expect = Field(default_factory=Expect)  # type: ignore[arg-type]
    objectives: Objectives
    limits: Limits = Field(default_factory=Limits)  # type: ignore[arg-type]

    def model_post_init(self, _: Any, /) -> None:
        """A time that is measured from the healing needs one."""
        if self.measure_from == "heal" and self.heal is None:
            raise ValueError("measure_from: heal needs `heal`")
        if self.load.fallback and self.system.providers < 2:
            raise ValueError("load.fallback needs `system: {providers: 2}`")

    def plain(self) -> dict[str, Json]:
        """The scenario as JSON, with the words of its file."""
        return self.model_dump(mode="json", by_alias=True)


def parse(text: str, name: str, overrides: Iterable[str] = ()) -> Scenario:
    """Read a scenario. `overrides`: `part.field=value`. Raises ConfigError."""
    try:
        data = YAML(typ="safe", pure=True).load(text)
        for override in overrides:
            _put(data, override)
        return Scenario.model_validate(data)
    except ValidationError as error:
        what = "; ".join(
            ".".join(map(str, found["loc"])) + f": {found['msg']}" for found in error.errors()
        )
        raise ConfigError(f"scenario {name}: {what}", hint="llmo drill show NAME") from error


def _put(data: dict[str, Json], override: str) -> None:
    path, equals, value = override.partition("=")
    *parts, last = path.split(".")
    if not equals or not all((*parts, last)):
        raise ConfigError(f"{override!r} is no override", hint="load.in_flight=20")
    for part in parts:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise ConfigError(f"{override!r}: {part} has no parts", hint="load.in_flight=20")
    data[last] = YAML(typ="safe", pure=True).load(value)


def load_all(folder: Path | None = None) -> dict[str, str]:
    """The text of every scenario by its id, in the order of their classes, then names."""
    place = folder or files("llm_orchestrator.drill.scenarios")
    texts = {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in place.iterdir()
        if entry.name.endswith(".yaml")
    }
    return {
        name: texts[name]
        for name in sorted(texts, key=lambda name: (CLASSES.index(_class(texts[name])), name))
    }


def _class(text: str) -> str:
    found = YAML(typ="safe", pure=True).load(text).get("class")
    return found if found in CLASSES else CLASSES[-1]


def load_one(name: str, overrides: Iterable[str] = (), folder: Path | None = None) -> Scenario:
    """A scenario by its id. Raises NotFound, ConfigError."""
    texts = load_all(folder)
    if name not in texts:
        raise NotFound(f"no scenario {name}", hint="llmo drill list")
    found = parse(texts[name], name, overrides)
    if found.id != name:
        raise ConfigError(f"scenario {name}: its id is {found.id}", hint="name the file after it")
    return found

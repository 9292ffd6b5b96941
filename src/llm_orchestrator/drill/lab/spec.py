"""What a lab is to be: which hosts, what runs on them, where each listens.

Everything that can be said before anything is made is decided here and written into the lab's state
file (state.py), so that whoever comes later, also after a crash, knows what there may be to clear.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Self


@cache
def settings() -> dict[str, Any]:
    """`cluster.toml`: the layouts, the ports, and how etcd and Patroni are tuned."""
    text = files("llm_orchestrator.drill.lab").joinpath("cluster.toml").read_text("utf-8")
    return tomllib.loads(text)


@dataclass(frozen=True, slots=True)
class LabSpec:
    """What was asked for. `regions` 1 to 3; `postgres` a major version, 0 for what there is.

    `is_single`: one node on SQLite, no database servers. `has_network`: each host is a network
    namespace (root only); without it, a loopback address. `disk_mb`: each database has a disk of
    so many MiB, in memory, that can be filled (root only); 0: the machine's own. `has_shim`: the
    databases' disks can be made to fail and to be slow (io_shim.py). `buffers_mb`: so little of the
    database is in memory that pages are read from its disk all the time; 0: as cluster.toml says.
    `imports`: files of Python workflows that every node executes. `sabotage`: see scenario.System.
    `has_barman`: Barman keeps base backups and the log of the cluster.
    """

    regions: int = 1
    postgres: int = 0
    is_single: bool = False
    has_network: bool = False
    disk_mb: int = 0
    has_shim: bool = False
    buffers_mb: int = 0
    imports: tuple[str, ...] = ()
    sabotage: str = ""
    has_barman: bool = False

    @property
    def shown(self) -> str:
        """In a few words."""
        where = "network namespaces" if self.has_network else "loopback addresses"
        if self.is_single:
            return f"one node on SQLite, {where}"
        regions = f"{self.regions} region{'s' if self.regions > 1 else ''}"
        barman = " with Barman" if self.has_barman else ""
        return f"{regions}, PostgreSQL {self.postgres or 'as found'}{barman}, {where}"


@dataclass(frozen=True, slots=True)
class Place:
    """One host: its name, where it is, what runs there. `namespace` "" is the machine itself."""

    name: str
    region: str
    address: str
    namespace: str
    runs: tuple[str, ...]
    tags: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `asdict`."""
        return cls(**{**data, "runs": tuple(data["runs"]), "tags": tuple(data["tags"])})


@dataclass(frozen=True, slots=True)
class Plan:
    """A lab on paper. `subnet` is where all its addresses lie; `ports` by what listens there."""

    spec: LabSpec
    places: tuple[Place, ...]
    subnet: str
    ports: Mapping[str, int]
    password: str

    def to_json(self) -> dict[str, Any]:
        """As the state file keeps it."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse."""
        places = tuple(Place.from_json(each) for each in data["places"])
        spec = LabSpec(**{**data["spec"], "imports": tuple(data["spec"]["imports"])})
        return cls(spec, places, data["subnet"], data["ports"], data["password"])

    def running(self, what: str) -> list[Place]:
        """The hosts on which `what` runs, in order."""
        return [place for place in self.places if what in place.runs]

    def url(self, place: Place, what: str) -> str:
        """Where `what` answers HTTP."""
        return f"http://{place.address}:{self.ports[what]}"

    @property
    def database_url(self) -> str:
        """Of the cluster: every host, for the race for the leader."""
        port = self.ports["postgres"]
        hosts = ",".join(f"{place.address}:{port}" for place in self.running("patroni"))
        return f"postgresql://{DATABASE}:{self.password}@{hosts}/{DATABASE}"


DATABASE = "orchestrator"
"""The database's name, and its owner's."""


def make_plan(
    spec: LabSpec, lab_id: str, *, net: int, ports: Mapping[str, int], password: str
) -> Plan:
    """Put the lab on paper. `net` numbers the loopback network; namespaces have their own."""
    base = "10.77.0" if spec.has_network else f"127.77.{net}"
    places = tuple(
        Place(
            name=each["name"],
            region=each["region"],
            address=f"{base}.{number}",
            namespace=f"{lab_id}-{each['name']}" if spec.has_network else "",
            runs=tuple(each["runs"]),
            tags=tuple(each.get("tags", ())),
        )
        for number, each in enumerate(_layout(spec), 11)
    )
    return Plan(
        spec, places, f"{base}.0/24" if spec.has_network else "127.0.0.0/8", ports, password
    )


def _layout(spec: LabSpec) -> Sequence[Mapping[str, Any]]:
    layouts = settings()["layouts"]
    if spec.is_single:
        return list(layouts["single"])
    more = layouts["barman"] if spec.has_barman else []
    return [*layouts["services"], *more, *layouts[str(spec.regions)]]

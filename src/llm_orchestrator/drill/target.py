"""What a drill is carried out against: the protocol, and what injecting a fault gives back.

A target is a system that serves the API: one supervised process, the lab's cluster, or a user's
staging system. The drill asks it for faults and for healing only; whether the system kept its
promises is the witness's matter, who never asks the target.

A fault counts from the moment that it is *confirmed* effective. A target that cannot confirm it
raises NotConfirmed, undoes what it has begun, and the drill is inconclusive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from llm_orchestrator.drill.scenario import Fault
from llm_orchestrator.errors import OperatorError

Json = Any


class NotConfirmed(OperatorError):
    """The fault had no effect that could be seen."""


class Broken(OperatorError):
    """While the fault was made the system did what it must never do."""


class NotPossible(OperatorError):
    """The target cannot do that; the message says what it would need."""


class UndoFailed(OperatorError):
    """The fault could not be taken away: the system is still broken."""


@dataclass(frozen=True, slots=True)
class Looks:
    """Where the witness looks besides the API. What is empty is out of sight, and so not judged."""

    store_url: str
    """The database, for plain SQL."""
    llm: Sequence[str]
    """What each fake LLM server was asked: its ledger's path, or the server's address."""
    first_run: str = ""
    """In a store that has others' runs as well: the lowest id that a run of the drill can have."""
    token: str = field(default="", repr=False)
    """What requests to the API carry."""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """What the witness finds in its environment besides."""


@dataclass(frozen=True, slots=True)
class Injected:
    """A fault that works. `at_s`: when it was confirmed, on the steady clock (clock.py)."""

    at_s: float
    evidence: str
    touched: frozenset[str] = field(default_factory=frozenset)
    """Runs whose own record was damaged: their steps may run again, their entries be replaced."""
    kept_until_us: int | None = None
    """A restore: what was acknowledged after this (wall clock, us) is promised to nobody."""


@dataclass(frozen=True, slots=True)
class Sight:
    """Something that the target saw itself: `mark` as in marks.py, on the steady clock."""

    at_s: float
    mark: str
    text: str


class Target(Protocol):
    """A running system. Everything raises OperatorError when the system does not do as told."""

    @property
    def name(self) -> str:
        """`single`, `lab`, or the name of a configuration."""
        ...

    @property
    def endpoints(self) -> Sequence[str]:
        """Where the API answers."""
        ...

    @property
    def client_host(self) -> str:
        """The address of the host where clients are, the witness among them."""
        ...

    def command(self, *words: str) -> Sequence[str]:
        """`words` as a command that runs on that host."""
        ...

    @property
    def looks(self) -> Looks:
        """Where the witness looks besides. Only after `start`."""
        ...

    @property
    def llm_ledgers(self) -> Sequence[Path]:
        """The files of what each fake LLM server was asked, as the evidence keeps them."""
        ...

    async def start(self) -> None:
        """Make it ready, with nothing in its store."""
        ...

    async def stop(self) -> None:
        """Leave nothing behind but its logs."""
        ...

    async def inject(self, fault: Fault) -> Injected:
        """Let it happen and see that it has. Raises NotConfirmed, NotPossible."""
        ...

    async def undo(self) -> None:
        """Take every fault away. Safe to repeat."""
        ...

    async def is_redundant(self) -> bool | None:
        """Whether everything that is to run runs again; None where there is nothing to spare."""
        ...

    def undo_commands(self) -> Sequence[Sequence[str]]:
        """What a dead-man timer runs when the drill is gone: the same as `undo`, from outside."""
        ...

    def sights(self) -> Sequence[Sight]:
        """What the target saw so far, in order."""
        ...

    def facts(self) -> dict[str, Json]:
        """Versions and settings, without secrets; `node_deaths` so far, None if nobody counts.

        `not_judged`, where it is there: what this target cannot tell, in words.
        """
        ...

    def logs(self) -> Sequence[Path]:
        """Raw logs, for the evidence."""
        ...


@runtime_checkable
class HasHome(Protocol):
    """A target whose work can be moved home again."""

    async def fail_back(self, limit_s: float) -> str:
        """Do so, in order; what was done. Raises OperatorError."""
        ...

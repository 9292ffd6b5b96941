"""A user's own staging system, as a file says: where it is, how it is broken and mended.

Nothing here acts. A file that says something unknown is refused whole, and so is one whose owner
has not written `may_be_broken = true`: a drill must never meet a system by mistake.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llm_orchestrator.drill.cluster_faults import FAULTS as CLUSTER_FAULTS
from llm_orchestrator.drill.cluster_network_faults import NETWORK_FAULTS
from llm_orchestrator.drill.deadman import COMMAND_S
from llm_orchestrator.drill.scenario import Fault, Scenario, load_all, parse
from llm_orchestrator.drill.single_faults import FAULTS as SINGLE_FAULTS
from llm_orchestrator.errors import ConfigError

_OWN = frozenset({"journal_damage", "rows_deleted", "store_lost", "backup_damaged"})
"""Only who does these knows which runs were hit, or to which moment a restore went back."""
KINDS = frozenset({*CLUSTER_FAULTS, *NETWORK_FAULTS, *SINGLE_FAULTS} - _OWN)
"""The faults that commands can make."""
_PLACE = re.compile(r"\{\{(\w+)\}\}|\{(\w+)\}")
_HOOKS = ("inject", "confirm", "undo")
UNDO_S = COMMAND_S
"""The dead-man timer gives a command no more; so nobody else does."""
Command = Annotated[list[str], Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Check(_Part):
    """A command whose exit code 0 means yes."""

    command: Command
    limit_s: float = Field(30.0, gt=0)


class Hooks(_Part):
    """How one kind of fault is made, seen and taken away. No shell: argument by argument.

    `{on}` and `{OPTION}` of the scenario's fault are filled in, "" where it has none of that name;
    `{{word}}` is `{word}`.
    """

    inject: list[str] = []
    confirm: list[str] = []
    undo: list[str] = []
    limit_s: float = Field(
        30.0, gt=0, le=120, description="For `inject`, then for `confirm`, seconds."
    )

    def filled(self, hook: str, fault: Fault) -> list[str]:
        """The command of one hook for this fault."""
        given = {"on": fault.on, **fault.options}

        def fill(found: re.Match[str]) -> str:
            return f"{{{found[1]}}}" if found[1] else str(given.get(found[2], ""))

        command: Sequence[str] = getattr(self, hook)
        return [_PLACE.sub(fill, word) for word in command]

    def places(self, *hooks: str) -> set[str]:
        """The words to be filled in, in these commands."""
        words = [word for hook in hooks for word in getattr(self, hook)]
        return {found for _, found in _PLACE.findall(" ".join(words)) if found}


_NONE = Hooks.model_validate({})


class Staging(_Part):
    """One staging system."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]*$")
    may_be_broken: Literal[True]
    endpoints: list[str] = Field(min_length=1, description="Where its API answers.")
    token: str = Field("", pattern=r"^(env:\w+|file:.+)?$", description="env:NAME or file:PATH.")
    store_url: str = Field("", description="For plain SQL; reading is enough. Empty: none.")
    store_password: str = Field("", pattern=r"^(env:\w+|file:.+)?$")
    llm_ledger: str = Field("", description="The fake LLM server's: a path, or its address.")
    client_host: str = Field("127.0.0.1", description="Where its nodes reach this machine.")
    ready: Check | None = None
    redundant: Check | None = None
    failback: Check | None = None
    faults: dict[str, Hooks] = {}

    def model_post_init(self, _: object, /) -> None:
        """What has a meaning only together."""
        unknown = sorted(self.faults.keys() - KINDS)
        if unknown:
            raise ValueError(f"there is no fault {unknown[0]}: {', '.join(sorted(KINDS))}")
        for kind, hooks in self.faults.items():
            if strange := sorted(hooks.places(*_HOOKS) - _words_of_scenarios()):
                word = f"{{{strange[0]}}}"
                raise ValueError(f"faults.{kind}: no scenario says {word}; literally: {{{word}}}")
        if self.name in ("single", "lab"):
            raise ValueError(f"{self.name} is the name of a target that the drill makes itself")
        if urlsplit(self.store_url).password:
            raise ValueError("store_url has a password: give it as store_password = 'env:NAME'")

    def missing(self, scenario: Scenario) -> list[str]:
        """What the file would have to say before `scenario` can be carried out, in words."""
        return list(dict.fromkeys(self._missing(scenario)))

    def _missing(self, scenario: Scenario) -> Iterator[str]:
        if scenario.failback:
            yield from ("failback",) if self.failback is None else ()
            yield from ("redundant",) if self.redundant is None else ()
        for fault in scenario.faults:
            if fault.kind in _OWN:
                yield f"{fault.kind} can be done only to a system that the drill makes itself"
                continue
            hooks = self.faults.get(fault.kind, _NONE)
            for hook in _HOOKS:
                if not getattr(hooks, hook):
                    yield f"faults.{fault.kind}.{hook}"
            told = hooks.places("inject")
            places = {*fault.options} | ({"on"} if fault.on != "node" else set())
            for place in sorted(places - told) if hooks.inject else ():
                yield f"{{{place}}} in faults.{fault.kind}.inject (the scenario says what it is)"

    def undo_commands(self, scenario: Scenario) -> list[list[str]]:
        """What takes every fault of `scenario` away; the last one is to be run first.

        Only when nothing is `missing`.
        """
        found = [self.faults[fault.kind].filled("undo", fault) for fault in scenario.faults]
        return [command for command in found if command]


def _words_of_scenarios() -> set[str]:
    """What any scenario says of a fault."""
    faults = (fault for name, text in load_all().items() for fault in parse(text, name).faults)
    return {"on"}.union(*(fault.options for fault in faults))


def read(path: Path) -> Staging:
    """The system that a file describes. Raises ConfigError."""
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}", hint="docs/how-to/drill.md has an example") from error
    if data.get("may_be_broken") is not True:
        raise ConfigError(
            f"{path} does not say `may_be_broken = true`: a drill breaks the system for real",
            hint="say so only in the file of a system on which nobody relies",
        )
    try:
        return Staging.model_validate(data)
    except ValidationError as error:
        what = "; ".join(
            ".".join(map(str, found["loc"])) + f": {found['msg']}" for found in error.errors()
        )
        raise ConfigError(f"{path}: {what}", hint="docs/how-to/drill.md has an example") from error

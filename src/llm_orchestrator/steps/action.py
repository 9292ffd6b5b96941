"""Step type `action`: something done outside, by name.

Built in are log, http, webhook and file_write; plug-ins add theirs (entry points
`llm_orchestrator.actions`). `notify`, `publish` and every name that nobody here performs become a
durable outbox entry that somebody fetches. It never retries and never hides what happened: an
action whose outcome is unknown says so, and the engine decides by the step's policy.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any, ClassVar, Protocol, cast

from llm_orchestrator.errors import AuthorError
from llm_orchestrator.model import Effect, Json
from llm_orchestrator.steps.base import Outputs, StepContext

PLUG_INS = "llm_orchestrator.actions"
_BUILT_IN = {
    "log": ("llm_orchestrator.steps.action_log", "Log"),
    "http": ("llm_orchestrator.steps.action_http", "Http"),
    "webhook": ("llm_orchestrator.steps.action_http", "Webhook"),
    "file_write": ("llm_orchestrator.steps.action_file", "FileWrite"),
}
_OUTGOING = frozenset({"http", "webhook"})
"""These are told where requests may go (outgoing.py)."""


class Handler(Protocol):
    """Performs one kind of action. `parameters` arrive rendered."""

    def effect(self, parameters: Mapping[str, Json]) -> Effect:
        """The default: may it be done again when nobody knows whether it was done."""
        ...

    async def execute(
        self, context: StepContext, parameters: Mapping[str, Json], *, effect: Effect
    ) -> Outputs:
        """Do it once. `effect` is what holds for this step, after the file's own word."""
        ...


class Actions:
    """Actions by name: built-in, handed in, or plug-ins. Each is loaded when first used."""

    def __init__(
        self,
        extra: Mapping[str, Callable[[], Handler]] | None = None,
        *,
        outgoing_allow: Sequence[str] = (),
    ) -> None:
        self._extra = dict(extra or {})
        self._outgoing_allow = outgoing_allow
        self._loaded: dict[str, Handler] = {}
        self._has_looked = False

    def find(self, name: str) -> Handler:
        """The action of that name; the outbox for a name that nobody here performs."""
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def allow(self, outgoing_allow: Sequence[str]) -> None:
        """Other places from now on; a request that is on its way goes by the old ones."""
        self._outgoing_allow = outgoing_allow
        for name in _OUTGOING:
            self._loaded.pop(name, None)

    def names(self) -> list[str]:
        """Every name that is performed here, sorted; all others go to the outbox."""
        self._look_for_plug_ins()
        return sorted({*_BUILT_IN, *self._extra})

    def _load(self, name: str) -> Handler:
        if name in _BUILT_IN:
            module, attribute = _BUILT_IN[name]
            make = getattr(import_module(module), attribute)
            given = (self._outgoing_allow,) if name in _OUTGOING else ()
            return cast("Handler", make(*given))
        if name not in self._extra:
            self._look_for_plug_ins()
        return self._extra[name]() if name in self._extra else Outbox(name)

    def _look_for_plug_ins(self) -> None:
        if self._has_looked:
            return
        from importlib.metadata import entry_points  # noqa: PLC0415 (slow, rarely needed)

        for found in entry_points(group=PLUG_INS):
            self._extra.setdefault(found.name, partial(_make, found))
        self._has_looked = True


def _make(found: Any) -> Handler:
    return cast("Handler", found.load()())


class Action:
    """Performs `action`; http and webhook bind body, status, headers, all others result."""

    type: ClassVar[str] = "action"
    outputs: ClassVar[tuple[str, ...]] = ("result",)
    is_paid: ClassVar[bool] = False

    def __init__(self, actions: Actions | None = None) -> None:
        self._actions = actions or Actions()

    def effect(self, config: Any) -> Effect:
        """The action's own default."""
        return self._actions.find(config.action).effect(config.free)

    async def execute(self, context: StepContext, config: Any) -> Outputs:
        """Raises what the action raises; AuthorError for parameters that it cannot use."""
        effect = Effect(config.effect) if config.effect else self.effect(config)
        action = self._actions.find(config.action)
        return await action.execute(context, config.free, effect=effect)


class Outbox:
    """Leaves an entry for somebody outside. Kept once per step, so repeating it changes nothing."""

    def __init__(self, name: str) -> None:
        self._name = name

    def effect(self, parameters: Mapping[str, Json]) -> Effect:
        """Our own store takes our own key: a repeat is no second entry."""
        return Effect.REPEATABLE

    async def execute(
        self, context: StepContext, parameters: Mapping[str, Json], *, effect: Effect
    ) -> Outputs:
        """Post the parameters as they are."""
        await context.post_outbox(self._name, dict(parameters))
        return {"result": {"outbox": self._name}}


def check_parameters(
    action: str,
    parameters: Mapping[str, Json],
    known: Iterable[str],
    *,
    required: Iterable[str] = (),
) -> None:
    """Raise AuthorError for a parameter that the action does not know, or lacks."""
    names = list(known)
    for name in parameters:
        if name not in names:
            nearest = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"it knows {', '.join(names)}"
            raise AuthorError(f"action {action} has no parameter {name!r}", hint=hint)
    for name in required:
        if parameters.get(name) is None:
            raise AuthorError(f"action {action} needs the parameter {name!r}")

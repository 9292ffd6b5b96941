"""Planted bugs of the engine (see plants.py)."""

from __future__ import annotations

import itertools
from typing import Any

from llm_orchestrator.clock import derived_run_id
from llm_orchestrator.engine import driver, machine, schedule
from llm_orchestrator.engine.claims import Claims
from llm_orchestrator.engine.execution import Execution
from llm_orchestrator.engine.heart import Heart
from llm_orchestrator.engine.lease import Lease, Verdict
from llm_orchestrator.engine.node import Node
from llm_orchestrator.model import Json, NewRun
from llm_orchestrator.store.base import Batch, Pulse, lives

_ENGINE = "llm_orchestrator.engine"


def lease_on_wall_clock() -> dict[str, Any]:
    """The lease ends by what hour this machine thinks it is."""

    def holds(self: Heart) -> bool:
        now_us = self._clock._clock.now_us()  # type: ignore[attr-defined]
        told_us = self._lease.__dict__.get("told_us", now_us)
        return not self._lease._is_fenced and now_us < told_us + 2_500_000

    original = Lease.answered

    def answered(self: Lease, sent_at: float | None, now: float, pulse: Pulse) -> Verdict:
        self.__dict__["told_us"] = pulse.now_us
        return original(self, sent_at, now, pulse)

    return {f"{_ENGINE}.heart.Heart.holds": holds, f"{_ENGINE}.lease.Lease.answered": answered}


def takeover_without_epoch() -> dict[str, Any]:
    """A new owner under the old epoch."""
    raises = machine._RAISES_EPOCH - {machine.Event.TAKEOVER}
    return {f"{_ENGINE}.machine._RAISES_EPOCH": raises}


def once_reissued() -> dict[str, Any]:
    """An unknown outcome counts as nothing done."""

    async def decide(self: Execution, job: Any, attempt: int) -> dict[str, Json] | None:
        return None

    return {f"{_ENGINE}.execution.Execution._decide_unknown": decide}


def fenced_goes_on() -> dict[str, Any]:
    """A node whose lease is over, or that is dead to the others, goes on with effects."""
    return {f"{_ENGINE}.heart.Heart.holds": lambda self: True}


def verdict_ignored() -> dict[str, Any]:
    """A node that is told that it is dead takes no notice."""
    told, answered = Node._told, Lease.answered

    def deaf(self: Node, verdict: Verdict) -> None:
        told(self, verdict._replace(is_fenced=False))

    def kept(self: Lease, sent_at: float | None, now: float, pulse: Pulse) -> Verdict:
        own = [m for m in pulse.members if m.node_id == self.node_id]
        if own and not lives(own[0]):
            others = [m for m in pulse.members if m.node_id != self.node_id]
            mine = [own[0]._replace(state="alive")]
            pulse = pulse._replace(members=[*others, *mine])
        return answered(self, sent_at, now, pulse)

    return {f"{_ENGINE}.node.Node._told": deaf, f"{_ENGINE}.lease.Lease.answered": kept}


def cancel_unheard() -> dict[str, Any]:
    """A cancel in the inbox of a run that is driven is read, and that is all."""
    original = driver.happening_of

    def deaf(message: Any) -> Any:
        return None if message.kind == "cancel" else original(message)

    return {f"{_ENGINE}.driver.happening_of": deaf}


def child_started_twice() -> dict[str, Any]:
    """A child's id is a new one at each replay."""
    numbers = itertools.count()

    def fresh(parent_run_id: str, step: str) -> str:
        return derived_run_id(parent_run_id, f"{step}/{next(numbers)}")

    return {f"{_ENGINE}.execution.derived_run_id": fresh}


def fold_forgets_rewind() -> dict[str, Any]:
    """The entries that a rewind took back are replayed all the same."""
    return {f"{_ENGINE}.replay.hidden": lambda entries: set()}


def plan_fired_twice() -> dict[str, Any]:
    """A planned time is fired by whoever sees it, under an id of its own."""
    original = schedule._planned
    numbers = itertools.count()

    def planned(name: str, value: dict[str, Json], moment: int) -> NewRun:
        new = original(name, value, moment)
        fields = {key: getattr(new, key) for key in new.__dataclass_fields__}
        fields["run_id"] = derived_run_id(new.run_id, str(next(numbers)))
        return NewRun(**fields)

    accept = schedule.Scheduler._accept

    async def alone(self: schedule.Scheduler, new: NewRun, moved: Any = None) -> None:
        await accept(self, new)
        if moved is not None:
            await self._store.commit(Batch(changes=(moved,)))

    return {
        f"{_ENGINE}.schedule._planned": planned,
        f"{_ENGINE}.schedule.Scheduler._accept": alone,
    }


def key_survives_rewind() -> dict[str, Any]:
    """A step that asks for something else after a rewind does so under its old key."""
    return {f"{_ENGINE}.execution.Execution.idempotency_key": lambda s, key: f"{s.run_id}/{key}"}


def lost_run_left_alone() -> dict[str, Any]:
    """A run that the store's trouble made leave is taken back only once."""
    return {f"{_ENGINE}.claims._passes": lambda error: False}


def orphans_unclaimed() -> dict[str, Any]:
    """Nobody takes over what a dead node left."""

    async def nothing(self: Claims) -> None:
        return

    return {f"{_ENGINE}.claims.Claims.take_over": nothing}

"""The breakers of all providers as an operator sees them: a list, and a way to close one by hand.

Their state is one record each (providers/guard.py); every node reads it at most a second late, so
a reset closes a breaker everywhere within that second. A reset never loses to a probe that is under
way: the wave's number moves on, and late answers of an older wave change nothing.

Runs that wait for the provider need not wait for their time then. Those that are parked are told by
whoever closed it (`wake_parked`), those in memory by their nodes (engine/upkeep.py); both in waves
that grow as those of a recovery do, and only while the breaker stays closed.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from llm_orchestrator.clock import Clock
from llm_orchestrator.engine.gate import PROVIDER
from llm_orchestrator.errors import NotFound, Refused
from llm_orchestrator.model import MICROSECONDS, Entry, Json, RunState
from llm_orchestrator.providers.breaker import State, Verdict
from llm_orchestrator.store.base import Batch, Post, PutRecord, RunFilter, Shelf, Store
from llm_orchestrator.store.journal import decode

logger = logging.getLogger(__name__)
KIND = "breaker"
WAKE = "wake"
"""The kind of message that a run gets whose provider may be asked again; by the breaker's name."""
WAVE_MAX = 64
WAVE_PAUSE_S = 0.1
_PAGE = 200
_TRIES = 20


@dataclass(frozen=True, slots=True)
class BreakerView:
    """One breaker. `retry_in_s`: how long an open one lets nothing pass; 0 when it may be tried."""

    name: str
    state: State
    retry_in_s: float = 0.0
    openings: int = 0
    """In a row, since it was closed last."""
    wave: int = 0
    """Half open: how many calls may pass at a time."""
    succeeded: int = 0

    @property
    def provider(self) -> str:
        """What stands before the first slash."""
        return self.name.partition("/")[0]

    def to_json(self) -> dict[str, Json]:
        """For HTTP and for printing."""
        provider, _, model = self.name.partition("/")
        return {
            "name": self.name,
            "provider": provider,
            "model": model,
            "state": self.state.value,
            "retry_in_s": self.retry_in_s,
            "openings": self.openings,
            "wave": self.wave,
            "succeeded": self.succeeded,
        }


async def list_breakers(shelf: Shelf, now_us: int) -> list[BreakerView]:
    """Every breaker that was ever open, by name. `now_us` is the store's time."""
    found = await shelf.records(KIND)
    return [_view(name, found[name], now_us) for name in sorted(found) if found[name] is not None]


async def waves(shelf: Shelf, name: str, clock: Clock) -> AsyncIterator[int]:
    """How many may go on now: 1, 2, 4, ... with a pause between, while the breaker is closed."""
    size = 1
    while await is_closed(shelf, name):
        yield size
        size = min(size * 2, WAVE_MAX)
        await clock.sleep(WAVE_PAUSE_S)


async def is_closed(shelf: Shelf, name: str) -> bool:
    """True for a breaker that is closed now, and that was ever open."""
    value, _ = await shelf.record(KIND, name)
    return value is not None and Verdict.from_json(value).state is State.CLOSED


async def wake_parked(store: Store, name: str, clock: Clock) -> int:
    """Tell parked runs that a provider may be asked again, the oldest first; how many were told.

    Ends early when the breaker opens again: the others keep their time. Raises StoreError.
    """
    left = await _parked(store, name)
    woken = 0
    if not left:
        return 0
    async for size in waves(store.shelf, name, clock):
        some, left = left[:size], left[size:]
        posts = tuple(Post(run_id, WAKE, name) for run_id in some)
        await store.commit(Batch(changes=posts))
        woken += len(some)
        if not left:
            break
    return woken


async def _parked(store: Store, name: str) -> list[str]:
    """Runs that left memory while they waited for this provider, the oldest first."""
    found: list[str] = []
    before: str | None = None
    while True:
        wanted = RunFilter(states=(RunState.WAITING,), before=before, limit=_PAGE)
        page = await store.look.runs(wanted)
        some = [run.run_id for run in page if run.reason == PROVIDER]
        for run_id, journal in (await store.look.load(some)).items() if some else ():
            if journal.entries and name in _waits_for(journal.entries[-1]):
                found.append(run_id)
        if len(page) < _PAGE:
            return sorted(found)
        before = page[-1].run_id


def _waits_for(last: Entry) -> Sequence[str]:
    names: Sequence[str] = decode(last.payload).get("breakers", ())
    return names


async def reset_breaker(store: Store, name: str, *, by: str = "operator") -> bool:
    """Close a breaker on every node. False when it was closed already.

    Raises NotFound when there is none of that name, Refused when its nodes keep changing it.
    """
    for _ in range(_TRIES):
        value, version = await store.shelf.record(KIND, name)
        if value is None:
            known = ", ".join(sorted(await store.shelf.records(KIND))) or "none"
            raise NotFound(
                f"no breaker {name!r} was ever open; there is: {known}", hint="llmo breakers list"
            )
        before = Verdict.from_json(value)
        if before.state is State.CLOSED:
            return False
        closed = Verdict(wave_id=before.wave_id + 1).to_json()
        change = PutRecord(KIND, name, closed, version)
        if not (await store.commit(Batch(changes=(change,)))).is_refused:
            logger.warning("breaker %s was %s; %s closed it", name, before.state, by)
            return True
    raise Refused(f"breaker {name} changes again and again; try again")


def _view(name: str, value: Json, now_us: int) -> BreakerView:
    verdict = Verdict.from_json(value)
    wait_s = verdict.until - now_us / MICROSECONDS if verdict.state is State.OPEN else 0.0
    return BreakerView(
        name,
        verdict.state,
        round(max(0.0, wait_s), 3),
        verdict.openings,
        verdict.wave,
        verdict.succeeded,
    )

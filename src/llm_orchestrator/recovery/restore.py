"""Restoring: verify, put aside, check, swap. What is live is touched last, and kept.

    base (a verified dump, or nothing) -> aside, of the live store's kind
    -> filled from the stream archive up to the wanted point, where there is one
    -> checked as a proof is (prove.py), an engine included
    -> new incarnation, and a generation above every one that anybody has seen
    -> nobody writes to the live store any more; what it knows beyond the point is carried over
    -> the copy is live, the old store has another name

A failure at any place leaves the live store as it was, and serving.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import ConfigError, StoreDamaged
from llm_orchestrator.model import stamp
from llm_orchestrator.recovery.beyond import Tail
from llm_orchestrator.recovery.carry import Carriage, Under, carry_over
from llm_orchestrator.recovery.manifest import Manifest
from llm_orchestrator.recovery.prove import Checks, check_copy
from llm_orchestrator.store.base import Batch, Database, PutRecord
from llm_orchestrator.store.copying import Aside, Copier, Identity
from llm_orchestrator.store.spool import ANCESTOR
from llm_orchestrator.store.tables import copy


class Base(NamedTuple):
    """What a restore begins with: a backup's dump, unpacked and verified."""

    manifest: Manifest
    dump: Path
    copier: Copier
    """Of the dump's kind: what can put it down. The live store's own, if the kinds are the same."""


class Filled(NamedTuple):
    """What the stream archive gave."""

    tails: Sequence[Tail]
    """What it knows beyond the wanted point."""
    generation: int
    """The highest one that it has seen."""
    point_us: int
    """The last batch that is in, microseconds on the store's clock; 0: none was needed."""
    applied: int = 0
    """Appends and changes that went in."""
    dropped: int = 0
    """Those that nobody was told of, and that did not fit."""
    flaws: Sequence[str] = ()
    """What is missing; only where the request takes it."""
    incarnation: str = ""
    """Whose streams they were."""


Fill = Callable[[Database], Awaitable[Filled]]
"""Applies segments to a store that was put aside."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be restored, and how."""

    base: Base | None
    fill: Fill | None = None
    why: str = ""
    """For people: `backup ID`, `2026-11-23T03:00:00Z`."""
    generation: int | None = None
    """Where nothing tells which generations there were."""
    may_flaw: bool = False
    """Go on although the copy has flaws (they are in the report)."""
    hold: bool = False
    """Hold unfinished runs where nobody can say what they did since."""


@dataclass(slots=True)
class Restored:
    """What came of it."""

    identity: Identity
    runs: int
    old: str
    """Under which name the old store is kept."""
    carried: Carriage
    flaws: list[str] = field(default_factory=list)
    took_s: float = 0.0
    filled: Filled | None = None


async def restore(
    live: Copier,
    request: Request,
    *,
    checks: Checks,
    clock: Clock,
    say: Callable[[str], None] = lambda _: None,
) -> Restored:
    """Do it. Raises StoreError's subclasses, StoreDamaged when the copy is no good.

    `say` is told what is done now, for people.
    """
    begun = clock.monotonic()
    known = await _generations(live, request)  # before anything is moved
    say("putting the copy beside the live store")
    aside = await _put_aside(live, request.base)
    try:
        filled = await _fill(aside, request.fill, say)
        say("checking every chain of the copy, and starting an engine on it")
        is_exact = request.fill is None and request.base is not None
        manifest = request.base.manifest if is_exact and request.base else None
        runs, flaws = await check_copy(aside, manifest, checks)
        flaws += filled.flaws if filled else ()
        if flaws and not request.may_flaw:
            raise StoreDamaged(
                f"the copy is not whole, so nothing was changed: {'; '.join(flaws[:3])}",
                hint="llmo backup list, and restore another one",
            )
        generation = 1 + max(known, filled.generation if filled else 0)
        identity = Identity(clock.random_bytes(16).hex(), generation)
        await _remember(aside, await _ancestors(live, request, filled))
        under = Under(generation, clock.now_us(), request.why)
        carried = Carriage()

        async def last(store: Database) -> None:
            nonlocal carried
            carried = await _carry(store, aside, filled, under=under, hold=request.hold)

        if await live.identity() is None:
            carried = await _carry(None, aside, filled, under=under, hold=request.hold)
            if filled is None and request.base is not None:
                since = stamp(request.base.manifest.taken_at)
                carried.trouble.append(f"what was done after {since}: nothing here knows it")
        say("swapping")
        old = await aside.take_over(identity, last=last)
    except BaseException:
        await aside.discard()
        raise
    took_s = clock.monotonic() - begun
    return Restored(identity, runs, old, carried, flaws, took_s, filled)


# -- how ------------------------------------------------------------------------------------------


async def _generations(live: Copier, request: Request) -> int:
    """The highest generation that the live store and the backup know of."""
    found = [request.generation] if request.generation is not None else []
    if request.base is not None:
        found.append(request.base.manifest.generation)
    identity = await live.identity()
    if identity is not None:
        found.append(identity.generation)
    if not found and request.fill is None:
        raise ConfigError(
            "nothing tells which generation the store had", hint="llmo restore --generation N"
        )
    return max(found, default=0)


async def _ancestors(live: Copier, request: Request, filled: Filled | None) -> set[str]:
    """The incarnations whose work is in the restored store: results in spools are for it."""
    found = {filled.incarnation} if filled is not None else set()
    if request.base is not None:
        found.add(request.base.manifest.incarnation)
    identity = await live.identity()
    if identity is not None:
        found.add(identity.incarnation)
    return found - {""}


async def _remember(aside: Aside, ancestors: set[str]) -> None:
    store = aside.store()
    await store.open_as_client()
    try:
        known = await store.shelf.records(ANCESTOR)
        new = [PutRecord(ANCESTOR, name, {}, 0) for name in sorted(ancestors - set(known))]
        if new:
            await store.commit(Batch(changes=new))
    finally:
        await store.close()


async def _put_aside(live: Copier, base: Base | None) -> Aside:
    """A copy of the base beside the live store, of the live store's kind."""
    if base is None:
        return await live.empty()
    if base.copier.kind == live.kind:
        return await live.load(base.dump)
    source = await base.copier.load(base.dump)
    try:
        target = await live.empty()
        try:
            await copy(source.tables(), target.tables())
        except BaseException:
            await target.discard()
            raise
    finally:
        await source.discard()
    return target


async def _fill(aside: Aside, fill: Fill | None, say: Callable[[str], None]) -> Filled | None:
    if fill is None:
        return None
    say("applying the stream archive")
    store = aside.store()
    await store.open_as_engine()
    try:
        return await fill(store)
    finally:
        await store.close()


async def _carry(
    live: Database | None, aside: Aside, filled: Filled | None, *, under: Under, hold: bool
) -> Carriage:
    """Into the copy: what the live store and the archive know beyond the point."""
    tails = filled.tails if filled is not None else ()
    restored = aside.store()
    await restored.open_as_client()
    try:
        must_hold = hold and filled is None  # the archive knows what was done
        return await carry_over(live, restored, under, tails=tails, hold=must_hold)
    finally:
        await restored.close()

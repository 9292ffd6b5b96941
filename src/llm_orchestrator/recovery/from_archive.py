"""Choosing what a restore out of the stream archive goes by: which life, up to when, on what base.

The base is the newest backup of that life that was made before the wanted moment; without one, and
where the archive holds everything from the beginning, segments alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llm_orchestrator.errors import NotFound, OrchestratorError
from llm_orchestrator.recovery.archive_read import Incarnation, check_base, choose, find_entry
from llm_orchestrator.recovery.catalogue import Catalogue, Item
from llm_orchestrator.recovery.manifest import Manifest
from llm_orchestrator.recovery.places import Place
from llm_orchestrator.recovery.rebuild import rebuild
from llm_orchestrator.recovery.restore import Fill, Filled
from llm_orchestrator.store.base import Database

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A point: a moment (microseconds on the store's clock), an entry, or (nothing) the end."""

    until_us: int | None = None
    run_id: str = ""
    seq: int = 0


@dataclass(frozen=True, slots=True)
class Chosen:
    """What to restore from."""

    place: Place
    one: Incarnation
    until_us: int | None
    """None: everything."""
    item: Item | None = None
    """The base."""
    manifest: Manifest | None = None

    def fill(self, keys: Sequence[Any], *, may_miss: bool) -> Fill:
        """What applies the segments."""
        base_us = self.manifest.taken_at if self.manifest else 0

        async def work(store: Database) -> Filled:
            done = await rebuild(
                self.place,
                store,
                until_us=self.until_us,
                base_us=base_us,
                incarnation=self.one.name,
                keys=keys,
                may_miss=may_miss,
            )
            return Filled(
                done.tails,
                done.generation,
                done.point_us,
                done.applied,
                done.dropped,
                done.findings.damage,
                self.one.name,
            )

        return work


async def choose_source(
    place: Place,
    catalogue: Catalogue,
    wanted: Wanted,
    *,
    keys: Sequence[Any] = (),
    base: Item | None = None,
) -> Chosen:
    """What to restore from; `base` is one that somebody insists on.

    Raises NotFound, StoreDamaged when no base goes with the segments, WrongKey, StoreError.
    """
    name, until_us = "", wanted.until_us
    if wanted.run_id:
        name, until_us = await find_entry(place, wanted.run_id, wanted.seq, keys=keys)
    one = await choose(place, until_us=until_us, name=name)
    if base is not None:
        manifest = await catalogue.show(base, keys)
        if manifest.incarnation != one.name or (until_us and manifest.taken_at > until_us):
            raise NotFound(f"{base.backup_id} does not lead there: the archive needs another one")
        return Chosen(place, one, until_us, base, manifest)
    for item in await catalogue.items():
        try:
            manifest = await catalogue.show(item, keys)
        except OrchestratorError as error:
            logger.warning("backup %s is passed over: %s", item.backup_id, error.message)
            continue
        is_early = until_us is None or manifest.taken_at <= until_us
        if manifest.incarnation == one.name and is_early and manifest.taken_at >= one.began_at:
            return Chosen(place, one, until_us, item, manifest)
    check_base(one, base="", base_at=0, place=place)
    return Chosen(place, one, until_us)

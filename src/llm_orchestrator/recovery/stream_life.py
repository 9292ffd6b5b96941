"""A store's archive (store/archiving.py) through restores.

A stream belongs to one process life and one incarnation of the store. When a restore puts another
store in its place under a serving process, the next batch begins a stream of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from llm_orchestrator.errors import StoreUnavailable
from llm_orchestrator.recovery.places import Place
from llm_orchestrator.recovery.stream import OnFailure, StreamArchive
from llm_orchestrator.recovery.unarchived import archived_to
from llm_orchestrator.store.archiving import Archive
from llm_orchestrator.store.base import Batch, Database, Receipt

logger = logging.getLogger(__name__)
_LIFE = 40
"""A number is the life's, shifted by so many bits, and the batch's."""


class StoreArchive(Archive):
    """See the module's docstring. `make` gives the archive of one incarnation, by stream name."""

    def __init__(
        self,
        store: Database,
        place: Place,
        make: Callable[[str], StreamArchive],
        *,
        on_failure: OnFailure,
    ) -> None:
        self._store = store
        self._place = place
        self._make = make
        self._on_failure = on_failure
        self._now: StreamArchive | None = None
        self._incarnation = ""
        self._lives = 0
        self._leaving: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Before an engine serves: the place must be fit, and this store's.

        Raises ConfigError; StoreUnavailable when it is away and commits would wait for it.
        """
        is_archived = await archived_to(self._store)
        trouble = await self._place.check()
        if not trouble:
            await self._current().prepare()
        elif is_archived and self._on_failure is OnFailure.DEGRADE:
            logger.critical("the stream archive is away at the start: %s", trouble)
        else:
            raise StoreUnavailable(
                f"{self._place.shown} cannot hold the stream archive: {trouble}",
                hint='archive_on_failure = "degrade" lets an archived store go on without it',
            )

    async def keep(self, batch: Batch) -> int:
        archive = self._current()
        life = self._lives
        number = await archive.keep(batch)
        return number and (life << _LIFE | number)

    def settle(self, number: int, receipt: Receipt | None) -> None:
        if self._now is not None and number >> _LIFE == self._lives:
            self._now.settle(number & (1 << _LIFE) - 1, receipt)

    async def close(self) -> None:
        if self._leaving:
            await asyncio.gather(*self._leaving)
        if self._now is not None:
            await self._now.close()
            self._now = None

    def _current(self) -> StreamArchive:
        """Of the store as it is now."""
        store = self._store
        if self._now is None or self._incarnation != store.incarnation:
            if self._now is not None:
                task = asyncio.get_running_loop().create_task(self._now.abandon())
                self._leaving.add(task)
                task.add_done_callback(self._leaving.discard)
            self._incarnation, self._lives = store.incarnation, self._lives + 1
            ending = f".{self._lives}" if self._lives > 1 else ""
            self._now = self._make(f"{store.node_id}{ending}")
        return self._now

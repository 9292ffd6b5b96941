"""Reading everything that is recorded, again and again, slowly: damage is found before it is used.

A damaged page says nothing until somebody reads it. One node of a store reads all journals, round
after round, at a bounded rate, and has what nobody drives just now mended (mend.py); what a node
drives is mended by it when it loads it again. Findings and progress are metrics.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from llm_orchestrator.clock import Clock
from llm_orchestrator.engine.audit import settle_one
from llm_orchestrator.engine.mend import Mender
from llm_orchestrator.errors import Fenced, OrchestratorError, StoreError
from llm_orchestrator.model import MICROSECONDS, Journal
from llm_orchestrator.store.base import Store
from llm_orchestrator.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)
AT_ONCE = 20
REST_S = 60.0
"""Before the first round, between two, and while another node does it."""


class Verifier:
    """Rounds over all runs, `entries_per_s` of them at most."""

    def __init__(
        self,
        store: Store,
        mender: Mender,
        clock: Clock,
        *,
        entries_per_s: float,
        is_mine: Callable[[], bool],
        metrics: Metrics | None = None,
    ) -> None:
        self._store = store
        self._mender = mender
        self._clock = clock
        self._rate = entries_per_s
        self._is_mine = is_mine
        self.metrics = metrics or mender.metrics
        self.progress = 0.0
        """How much of this round is done: 0 to 1."""
        self.last_round_s = 0.0
        """When the last whole round ended, seconds since 1970; 0: none as yet."""
        self.damaged = 0
        """Runs that it found damaged, mended or not."""

    async def run_forever(self) -> None:
        """Until cancelled. A store that is away is asked again later."""
        while True:
            await self._clock.sleep(REST_S)
            if self._is_mine():
                try:
                    await self.round()
                except StoreError as error:
                    logger.warning("the journals are not verified just now: %s", error.message)

    async def round(self) -> int:
        """Look at every run once; how many were damaged. Stops when another node takes over."""
        run_ids = await self._store.look.run_ids()
        damaged = 0
        for start in range(0, len(run_ids), AT_ONCE):
            if not self._is_mine():
                break
            begun = self._clock.monotonic()
            some = run_ids[start : start + AT_ONCE]
            journals = (await self._store.look.load(some)).values()
            for journal in journals:
                damaged += await self._look_at(journal)
            entries = sum(len(journal.entries) for journal in journals)
            self.metrics.count("journal_verified_entries_total", amount=entries)
            self.progress = (start + len(some)) / len(run_ids)
            took = self._clock.monotonic() - begun
            await self._clock.sleep(max(0.0, entries / self._rate - took))
        else:
            self.last_round_s = self._clock.now_us() / MICROSECONDS
            self.damaged = damaged
        return damaged

    async def _look_at(self, journal: Journal) -> bool:
        """True when it was damaged, mended or not."""
        row = await self._store.look.row(journal.run_id)
        is_driven = row is not None and row.change.owner is not None
        if is_driven:
            if not journal.flaws:
                return False
            logger.error("run %s is damaged: %s", journal.run_id, journal.flaws[0].what)
            return True
        try:
            return await settle_one(self._store, self._mender, journal)
        except Fenced:
            return False  # somebody has claimed it meanwhile, and looks himself
        except OrchestratorError as error:
            logger.error("run %s cannot be mended: %s", journal.run_id, error.message)
            return True

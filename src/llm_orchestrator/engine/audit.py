"""Looking at everything: does the store still say one thing?

`verify_store` only reads, and names every flaw it finds. `settle_rows` is what an engine does when
it starts: a run whose row contradicts its journal would sleep for ever (nobody looks for it), so the
rows of all runs that are not finished are compared with their journals, and rebuilt from them.
"""

from __future__ import annotations

import logging
from llm_orchestrator.engine.mend import Mender
from llm_orchestrator.engine.replay import fold
from llm_orchestrator.engine.rows import contradiction
from llm_orchestrator.errors import StoreDamaged, StoreError
from llm_orchestrator.model import Flaw, Journal
from llm_orchestrator.store.base import Store

logger = logging.getLogger(__name__)
_AT_ONCE = 50


async def verify_store(store: Store) -> list[Flaw]:
    """Check every chain, row, message, definition and page. Flaws of no single run have run_id "".

    Reads everything; a store that is being written to may be verified meanwhile.
    """
    flaws = [Flaw("", 0, what, False) for what in await store.look.structure()]
    run_ids = await store.look.run_ids()
    for start in range(0, len(run_ids), _AT_ONCE):
        some = run_ids[start : start + _AT_ONCE]
        for run_id, journal in (await store.look.load(some)).items():
            flaws += await _flaws_of(store, run_id, journal)
    for flow in await store.shelf.workflows():
        try:
            await store.shelf.workflow(flow.name, flow.version, flow.digest)
        except StoreDamaged as error:
            flaws.append(Flaw("", 0, error.message))
    return flaws


async def _flaws_of(store: Store, run_id: str, journal: Journal) -> list[Flaw]:
    flaws = list(journal.flaws)
    try:
        await store.look.inbox(run_id)
    except StoreDamaged as error:
        flaws.append(Flaw(run_id, 0, error.message, False))
    if not flaws:
        wrong = await _wrong_row(store, run_id)
        if wrong:
            flaws.append(Flaw(run_id, 0, wrong))
    return flaws


async def settle_rows(store: Store, mender: Mender) -> list[str]:
    """Rebuild the rows of unfinished runs that contradict their journals; the runs' ids.

    A run that cannot be settled is reported and left as it is.
    """
    settled = []
    for run_id in await store.look.unfinished():
        try:
            if await _wrong_row(store, run_id) and await mender.set_row(run_id):
                settled.append(run_id)
        except StoreError as error:
            logger.error("the row of run %s cannot be settled: %s", run_id, error.message)
    return settled


async def _wrong_row(store: Store, run_id: str) -> str:
    """What the row of `runs` says against a journal that is whole.

    The row is read first: one that is older than the journal may look wrong, and rebuilding it does
    no harm; a journal older than its row is no ground for anything (the rebuild would be refused).
    """
    row = await store.look.row(run_id)
    journal = (await store.look.load([run_id])).get(run_id)
    if journal is None or any(flaw.seq for flaw in journal.flaws):
        return ""
    return contradiction(row, fold(run_id, journal.entries), journal.entries)

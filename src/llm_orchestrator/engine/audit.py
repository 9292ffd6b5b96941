"""Looking at everything, whether it still says one thing.

`verify_store` only reads, and names every flaw it finds. `settle` is what an engine does when it
starts: a run whose row contradicts its journal would sleep for ever (nobody looks for it), and one
with a damaged journal takes no signal. So the unfinished runs are looked at once, and mended.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from llm_orchestrator.engine.mend import Mender
from llm_orchestrator.engine.replay import fold
from llm_orchestrator.engine.rows import contradiction
from llm_orchestrator.errors import Fenced, OrchestratorError, StoreDamaged
from llm_orchestrator.model import Flaw, Journal
from llm_orchestrator.store.base import Store
from llm_orchestrator.store.check import INDEX_DAMAGED, definition_digest

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
        if definition_digest(flow.definition) != flow.digest:
            flaws.append(Flaw("", 0, f"the definition of {flow.name} does not fit its digest"))
    return flaws


async def _flaws_of(store: Store, run_id: str, journal: Journal) -> list[Flaw]:
    flaws = list(journal.flaws)
    try:
        await store.look.inbox(run_id)
    except StoreDamaged as error:
        flaws.append(Flaw(run_id, 0, error.message, False))
    if flaws:
        return flaws
    try:
        row = await store.look.row(run_id)
        wrong = contradiction(row, fold(run_id, journal.entries), journal.entries)
        if wrong:  # or it moved between the two readings
            wrong = await _wrong_row(store, run_id)
    except StoreDamaged as error:  # whole by its digests, and no journal of ours
        return [Flaw(run_id, 1, error.message, False)]
    return [Flaw(run_id, 0, wrong)] if wrong else []


async def settle(
    store: Store,
    mender: Mender,
    on_hopeless: Callable[[str, OrchestratorError], None] | None = None,
) -> list[str]:
    """Mend unfinished runs that nobody drives here, rows and journals; the ids of those mended.

    A run that cannot be mended is reported (to `on_hopeless`, too) and left as it is.
    """
    settled = []
    run_ids = await store.look.unfinished()
    for start in range(0, len(run_ids), _AT_ONCE):
        some = run_ids[start : start + _AT_ONCE]
        for run_id, journal in (await store.look.load(some)).items():
            try:
                if await settle_one(store, mender, journal):
                    settled.append(run_id)
            except Fenced:
                continue  # somebody has claimed it meanwhile, and mended it
            except OrchestratorError as error:
                logger.error("run %s cannot be settled: %s", run_id, error.message)
                if on_hopeless is not None:
                    on_hopeless(run_id, error)
    return settled


async def settle_one(store: Store, mender: Mender, journal: Journal) -> bool:
    """Mend a run that this node does not drive; True when there was something to mend.

    Raises what `Mender.whole` does.
    """
    if any(flaw.seq or flaw.what == INDEX_DAMAGED for flaw in journal.flaws):
        row = await store.look.row(journal.run_id)
        if row is None or row.change.owner != store.node_id:
            await mender.whole(journal)
            return True
        return False
    if journal.flaws or await _wrong_row(store, journal.run_id):
        return bool(await mender.set_row(journal.run_id))
    return False


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

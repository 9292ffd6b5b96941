"""Results that were paid for and that no store took: what becomes of them when a run is claimed.

An offer is adopted while its step is still open: the attempt was announced before the answer came,
in the same history, and nothing has ended it since. It then is an entry of the new epoch, and the
call is not made again. Otherwise it came too late: what it cost is booked, the result is not used.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from llm_orchestrator.engine.replay import Fold, fold, hidden, include
from llm_orchestrator.model import Draft, Entry, Journal, Json, Kind
from llm_orchestrator.store.base import Store
from llm_orchestrator.store.journal import decode, encode
from llm_orchestrator.store.spool_file import Offer

logger = logging.getLogger(__name__)
_LOOK_RUNS = 500


class Offers(Protocol):
    """Where offers are kept: the spool."""

    def offers(self) -> dict[str, list[Offer]]: ...

    def offers_of(self, run_id: str) -> list[Offer]: ...

    def forget(self, run_id: str, step: str) -> None: ...


class Judged(NamedTuple):
    """What to append for a run's offers."""

    drafts: tuple[Draft, ...]
    adopted: int
    lost_usd: float


def judge(offers: Sequence[Offer], state: Fold, entries: Sequence[Entry]) -> Judged:
    """Adopt what is still wanted, book what is not. Pure."""
    digests = {entry.seq: entry.digest for entry in entries}
    announced = _announced(entries)
    adopted: dict[str, Draft] = {}
    booked: list[Draft] = []
    lost_usd = 0.0
    for offer in offers:
        done = state.finished.get(offer.step)
        if done is not None and encode(done.data) == offer.payload:
            continue  # it had landed after all
        is_same_history = digests.get(offer.head_seq) == offer.head_digest
        is_open = done is None and state.intents.get(offer.step) == offer.attempt
        asked_at = announced.get((offer.step, offer.attempt), offer.head_seq + 1)
        is_ours = is_same_history and asked_at <= offer.head_seq
        if is_ours and is_open and offer.step not in adopted:
            adopted[offer.step] = offer.draft
            continue
        lost_usd += offer.cost_usd
        data: dict[str, Json] = {"superseded": offer.attempt}
        usage = decode(offer.payload).get("usage")
        if usage is not None:
            data["usage"] = usage
        booked.append(Draft(Kind.PROGRESS, offer.step, offer.attempt, encode(data)))
    return Judged((*adopted.values(), *booked), len(adopted), lost_usd)


def _announced(entries: Sequence[Entry]) -> dict[tuple[str, int], int]:
    """Where each attempt was first announced; what a rewind took back does not count."""
    taken_back = hidden(entries)
    found: dict[tuple[str, int], int] = {}
    for entry in entries:
        if entry.kind == Kind.INTENT and entry.seq not in taken_back:
            found.setdefault((entry.step, entry.attempt), entry.seq)
    return found


class OfferBook:
    """The offers of this node's earlier lives; without a spool there are none."""

    def __init__(self, spool: Offers | None, store: Store) -> None:
        self._spool = spool
        self._store = store

    def adopt(self, state: Fold, journal: Journal, seq: int) -> tuple[Draft, ...]:
        """Entries that follow the claim (`seq`); `state` knows them from here on."""
        offers = self._of(journal.run_id)
        if not offers:
            return ()
        judged = judge(offers, state, journal.entries)
        logger.warning(
            "run %s: of %d results in the spool %d are adopted; %.4f USD came too late",
            *(journal.run_id, len(offers), judged.adopted, judged.lost_usd),
        )
        include(state, seq, judged.drafts)
        if not judged.drafts:
            self.forget(journal.run_id)
        return judged.drafts

    def forget(self, run_id: str) -> None:
        """The run's offers are entries now, or booked."""
        for offer in self._of(run_id):
            if self._spool is not None:
                self._spool.forget(run_id, offer.step)

    async def drop_stale(self) -> None:
        """Offers of runs that ended elsewhere: their cost is told, then they are forgotten."""
        known = self._spool.offers() if self._spool is not None else {}
        if not known:
            return
        journals = await self._store.look.load(list(known)[:_LOOK_RUNS])
        for run_id, journal in journals.items():
            if journal.flaws:
                continue
            state = fold(run_id, journal.entries)
            if state.state.is_final:
                lost = judge(known[run_id], state, journal.entries).lost_usd
                logger.warning("run %s ended elsewhere: %.4f USD were spent twice", run_id, lost)
                self.forget(run_id)

    def _of(self, run_id: str) -> Sequence[Offer]:
        return self._spool.offers_of(run_id) if self._spool is not None else ()

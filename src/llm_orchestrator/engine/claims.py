"""Which runs this node takes, and when: those that are due, and those that dead nodes left.

A pick is only an offer (Store.pick, Store.adopt); the entry `claimed` decides, and the primary key
lets one of several claims through. News wakes this loop; a poll finds what no news told.

Law 13: a run that was being driven while its node died, again and again and without finishing a
step in between, is set aside. Whoever is suspected runs alone on its node, so that it is not the
others that are suspected with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from llm_orchestrator.clock import Clock
from llm_orchestrator.engine.chores import fire_schedules
from llm_orchestrator.engine.driver import Driver, End, NodeOptions
from llm_orchestrator.engine.execution import Execution, Services
from llm_orchestrator.engine.flows import Flows
from llm_orchestrator.engine.machine import Event, Happening, decide
from llm_orchestrator.engine.measure import ClaimTimes
from llm_orchestrator.engine.mend import Mender
from llm_orchestrator.engine.offers import OfferBook
from llm_orchestrator.engine.quota import Quotas
from llm_orchestrator.engine.replay import Fold, fold
from llm_orchestrator.engine.upkeep import Upkeep
from llm_orchestrator.errors import (
    Fenced,
    OrchestratorError,
    Refused,
    StoreDamaged,
    StoreError,
    StoreReplaced,
)
from llm_orchestrator.model import MICROSECONDS, Journal, Run, RunState
from llm_orchestrator.store.base import News, NodeState, Store, Wanted
from llm_orchestrator.store.writer import GroupWriter

logger = logging.getLogger(__name__)
POLL_S = 2.0
CLAIM_MAX = 1_000
SHARE_MAX = 32
"""What a node picks at a time while others live: so that they, too, find something to do."""
DEATHS_MAX = 3
"""A run that was in flight at so many node deaths without a finished step is quarantined."""
_SUSPECT = DEATHS_MAX - 1


class Claims:
    """See the module's docstring. `node_id` changes when the node comes back as another."""

    def __init__(
        self,
        node_id: str,
        store: Store,
        clock: Clock,
        *,
        flows: Flows,
        writer: GroupWriter,
        driver: Driver,
        services: Services,
        mender: Mender,
        options: NodeOptions,
        offers: OfferBook,
        upkeep: Upkeep,
    ) -> None:
        self.node_id = node_id
        self._store = store
        self._clock = clock
        self._flows = flows
        self._writer = writer
        self._driver = driver
        self._services = services
        self._mender = mender
        self._options = options
        self._offers = offers
        self._upkeep = upkeep
        self._quotas = Quotas(store, clock, options.queues)
        services.spent = self._quotas.spend
        self.times = ClaimTimes(services.metrics, clock)
        self.wake = asyncio.Event()
        self.nodes_alive = 1
        self._strange: set[str] = set()
        """Digests of workflows whose code is not here."""
        self._set_aside: set[str] = set()
        """Runs that could not be claimed although they looked due; not tried again by this node."""
        self._taken_back: set[str] = set()
        self._put_back: list[str] = []
        """Runs that were picked and are left to others."""
        self._has_orphans = False
        self._look_at = 0.0
        self._is_closed = False
        self._is_deaf = False
        """News may have been missed: look at the mail of every run that is here."""

    # -- news ----------------------------------------------------------------------------------

    def notice(self, news: News) -> None:
        """Look at what was committed: something to claim, or mail for a run that is here."""
        is_due = news.is_due or bool(news.parked)
        self._set_aside -= news.freed | news.parked | news.mended  # somebody has taken it up again
        if news.mended:
            self._has_orphans = True
        if news.is_gap:
            self._has_orphans = self._is_deaf = True
        for run_id in news.ended:
            self._driver.tell(run_id)
        for run_id in news.posted:
            is_due |= not self._driver.deliver(run_id)
        if is_due:
            self.wake.set()

    def expect_orphans(self) -> None:
        """A node died: its runs are to be taken over."""
        self.times.saw_death()
        self._has_orphans = True
        self.wake.set()

    def code_came(self, digest: str) -> None:
        """A workflow is runnable here now; runs that waited for its code may start."""
        if digest in self._strange:
            self._strange.discard(digest)
            self._has_orphans = True
            self.wake.set()

    def close(self) -> None:
        """Claim nothing more: what is picked and not yet claimed is put back."""
        self._is_closed = True
        self.wake.set()

    def reconfigure(self, options: NodeOptions) -> None:
        """Other limits of queues from now on."""
        self._options = options
        self._quotas.limit(options.queues)

    def is_held(self) -> bool:
        """True while nothing may be claimed."""
        return self._is_closed or self._upkeep.is_holding

    def forget(self) -> None:
        """The node comes back as another: what it could not claim may be tried again."""
        self._set_aside.clear()
        self._taken_back.clear()
        self._driver.lost.clear()
        self._has_orphans = True

    # -- claiming ------------------------------------------------------------------------------

    async def run_forever(self) -> None:
        """Claim whatever is due, until closed."""
        trouble = ""
        while not self._is_closed:
            self.wake.clear()
            try:
                pause_s = await self._claim_due()
                trouble = ""
            except StoreError as error:
                if error.message != trouble:
                    logger.error("cannot look for runs to claim: %s", error.message)
                trouble, pause_s = error.message, 0.5
            except Exception:  # a node that claims no more would look alive for ever
                logger.exception("a defect in the claiming of runs")
                pause_s = 1.0
            if pause_s > 0:
                with contextlib.suppress(TimeoutError):
                    # not wait_for: before Python 3.12 it loses a cancel that meets a wake-up
                    async with asyncio.timeout(pause_s):
                        await self.wake.wait()

    async def take_over(self) -> None:
        """Go on with what dead nodes left. Runs whose code is not here wait for `code_came`."""
        if self.is_held():
            self._has_orphans = True
            return
        self._has_orphans = False
        self.times.look()
        tried: set[str] = set()
        while not self.is_held() and (
            room := min(CLAIM_MAX // self.nodes_alive + 1, max(self._driver.room, 0))
        ):
            out = tuple(self._set_aside | tried)
            orphans = await self._store.adopt(self.node_id, room, out, strange=tuple(self._strange))
            orphans = [run_id for run_id in orphans if run_id not in self._driver.driven]
            if not orphans:
                self.times.took_all()
                return
            tried.update(orphans)
            nodes = await self._store.shelf.nodes(1_000)
            await self._claim(orphans, {node.node_id: node.state for node in nodes})
        self._has_orphans = True  # there may be more: when there is room

    async def _take_back(self) -> None:
        """Runs that left because an entry did not land: damage is mended, then they go on, once.

        Trouble of the store that passes is no reason to leave a run: we own it, nobody else comes.
        """
        lost = dict(self._driver.lost)
        self._driver.lost.clear()
        again = []
        for run_id, error in lost.items():
            if not _passes(error):
                if run_id in self._taken_back:
                    if isinstance(error, OrchestratorError):
                        self._driver.give_up(run_id, error)
                    continue
                self._taken_back.add(run_id)
            again.append(run_id)
        try:
            journals = await self._store.look.load(again)
            ours = [run_id for run_id in again if _is_of(self.node_id, journals.get(run_id))]
            await self._claim(ours, is_ours=True)
        except StoreError as error:
            if _passes(error):
                left = [run_id for run_id in again if run_id not in self._driver.driven]
                self._driver.lost.update(dict.fromkeys(left, error))
            raise

    async def _claim_due(self) -> float:
        """Claim what is due and fits; returns how long nothing more will be due."""
        if self._clock.monotonic() >= self._look_at:
            self._look_at = self._clock.monotonic() + POLL_S
            self._has_orphans = self._is_deaf = True  # some news may never have come
        if self._is_deaf:
            self._is_deaf = False
            await _check_mail(self._store, self._driver)
            await self._offers.drop_stale()
        if self._driver.lost:
            await self._take_back()
        if self.is_held() or self._driver.room <= 0 or not self._services.may_begin():
            return POLL_S
        if self._has_orphans:
            await self.take_over()
        now = self._clock.now_us()
        due = await self._pick(now)
        if due:
            await self._claim([run.run_id for run in due])
            return 0.0
        moments = [await self._store.look.next_wake()]
        if self._upkeep.takes_schedules:
            moments.append(await fire_schedules(self._store, self._writer, self._clock))
        wake_at = min((moment for moment in moments if moment and moment > now), default=None)
        pause_s = min(POLL_S, self._quotas.pause_s(now))
        if wake_at is None:
            return pause_s
        return min(pause_s, max(0.001, (wake_at - now) / MICROSECONDS))

    async def _pick(self, now: int) -> list[Run]:
        """Runs that are due, of queues without limits, then of each that has one."""
        room = min(self._driver.room, CLAIM_MAX if self.nodes_alive == 1 else SHARE_MAX)
        limits = self._options.queues
        wanted = Wanted(
            limit=room,
            now_us=now,
            full_queues=tuple(limits),
            strange=tuple(self._strange),
            except_runs=tuple(self._set_aside),
        )
        found = await self._store.pick(self.node_id, wanted)
        for queue, limit in limits.items():
            granted = await self._quotas.reserve(queue, room - len(found), now)
            if granted <= 0:
                continue
            own = replace_limits(wanted, queue, granted, concurrency=limit.concurrency)
            runs = await self._store.pick(self.node_id, own)
            await self._quotas.give_back(queue, granted - len(runs))
            found += runs
        return [run for run in found if run.run_id not in self._driver.driven]

    async def _claim(
        self,
        run_ids: Sequence[str],
        states: Mapping[str, str] | None = None,
        *,
        is_ours: bool = False,
    ) -> None:
        """Replay and drive runs that nobody drives. One that cannot be read is set aside, alone.

        `states`: how the nodes stand that may have driven them last. `is_ours`: nobody else may.
        """
        journals = await self._store.look.load(run_ids)
        if self.is_held() and not is_ours:  # since they were picked
            await self._store.put_back(self.node_id, run_ids)
            return
        claims = [self._claim_one(run_id, journals.get(run_id), states or {}) for run_id in run_ids]
        results = await asyncio.gather(*claims, return_exceptions=True)
        await self._driver.read_mail(run_ids)
        if self._put_back:
            run_ids_back, self._put_back = self._put_back, []
            await self._store.put_back(self.node_id, run_ids_back)
        for run_id, result in zip(run_ids, results, strict=True):
            if isinstance(result, Fenced | Refused):
                continue  # somebody was quicker
            if isinstance(result, BaseException) and _passes(result):
                self._driver.lost[run_id] = result
                continue
            if isinstance(result, OrchestratorError):
                logger.error("run %s is set aside: %s", run_id, result.message)
                self._driver.give_up(run_id, result)
            elif isinstance(result, BaseException):
                raise result
            if result is not True:
                self._set_aside.add(run_id)

    async def _claim_one(
        self, run_id: str, journal: Journal | None, states: Mapping[str, str]
    ) -> bool:
        """False when the run is not to be claimed after all: its journal says something else."""
        if journal is None:
            raise StoreDamaged(f"run {run_id} has no journal", run_id=run_id)
        state, head = await self._mender.whole(journal)
        flow = await self._flows.find(
            state.accepted["workflow"], state.accepted["version"], state.accepted["digest"]
        )
        if flow is None:
            self._strange.add(state.accepted["digest"])
            self._put_back.append(run_id)
            return True  # it waits for its code, here or elsewhere
        if state.state not in (RunState.PENDING, RunState.RUNNING, RunState.WAITING):
            end = End(run_id, state.state, state.reason, state.output, state.error)
            self._driver.ended(end)
            return False
        suspect = self._driver.admit_suspect
        happening = _how(state, states, node_id=self.node_id, admit_suspect=suspect)
        if happening is None:
            self._put_back.append(run_id)
            return True  # another suspect is here: one at a time
        decision = decide(state.state, state.epoch, happening)
        head.epoch = decision.epoch
        if happening.event is Event.PAUSE:
            await self._writer.append(head, (decision.draft,), change=decision.change)
            self._driver.ended(End(run_id, decision.state, happening.reason, error=happening.error))
            return False
        execution = Execution(state, head, self._services)
        queue = str(state.accepted["queue"])
        self._driver.admit(execution, queue)
        drafts = (decision.draft, *self._offers.adopt(state, journal, head.seq + 1))
        try:
            await self._writer.append(head, drafts, change=decision.change)
        except BaseException as error:
            self._driver.dismiss(execution, queue)
            if isinstance(error, Refused):
                self._offers.forget(run_id)  # or the run is refused for them for ever
            raise
        if len(drafts) > 1:
            self._offers.forget(run_id)
        self._driver.start(execution, flow, queue)
        self.times.driven(state, journal, self.node_id)
        return True


def _how(
    state: Fold,
    states: Mapping[str, str],
    *,
    node_id: str,
    admit_suspect: Callable[[str], bool],
) -> Happening | None:
    """The event that begins a node's work on a run; None when it has to wait for that."""
    claim = Happening(Event.CLAIM, owner=node_id)
    if state.state is not RunState.RUNNING:
        return claim
    claim = replace(claim, event=Event.TAKEOVER)
    if state.owner == node_id or states.get(str(state.owner)) != NodeState.DEAD:
        return claim  # it was announced, or the run came back to us: nobody died of it
    deaths = state.deaths + 1
    if deaths >= DEATHS_MAX:
        message = (
            f"{deaths} nodes died while they drove it, the last one was {state.owner}; "
            "no step finished in between"
        )
        facts = {"kind": "quarantine", "message": message}
        return Happening(Event.PAUSE, "quarantine", error=facts, data={"deaths": deaths})
    if deaths >= _SUSPECT and not admit_suspect(state.run_id):
        return None
    return replace(claim, data={"deaths": deaths})


async def _check_mail(store: Store, driver: Driver) -> None:
    """Ask for the mail of every run that is here: somebody's news may not have come."""
    if not driver.seen:
        return
    seqs = await store.look.inbox_seqs(list(driver.seen))
    seen = driver.seen
    for run_id, seq in seqs.items():
        if seq > seen.get(run_id, seq):
            driver.deliver(run_id)


def _is_of(node_id: str, journal: Journal | None) -> bool:
    """True when nobody else has taken the run, as far as its journal can be read."""
    if journal is None or not journal.entries:
        return True
    last = fold(journal.run_id, journal.entries)
    return last.state is not RunState.RUNNING or last.owner == node_id


def _passes(error: BaseException) -> bool:
    """True when the store only did not answer, or the node is just about to begin anew."""
    return isinstance(error, StoreReplaced) or (isinstance(error, StoreError) and error.retryable)


def replace_limits(wanted: Wanted, queue: str, limit: int, *, concurrency: int) -> Wanted:
    """The same wish for one queue alone."""
    return wanted._replace(limit=limit, full_queues=(), queue=queue, concurrency=concurrency)

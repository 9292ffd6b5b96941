"""A node: one process life that claims runs, drives them and lets them go.

The life of a run here: claim (an entry), replay (the fold), execute (the flow's body on an
Execution), then one closing entry: completed, failed, paused, waiting, or released. A node holds
in memory only runs that have something to do. Whatever ends a run's stay is decided by the
machine, and is one commit.

Wake-ups are pushed (`Store.on_news`); a slow poll is only the fallback.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from llm_orchestrator.clock import Clock
from llm_orchestrator.engine.acceptance import accepted_data, accepted_draft, key_record
from llm_orchestrator.engine.audit import settle
from llm_orchestrator.engine.chores import expire_forever, fire_schedules
from llm_orchestrator.engine.driver import Driver, End, NodeOptions
from llm_orchestrator.engine.execution import ChildSpec, Execution, Publish, Services
from llm_orchestrator.engine.flows import Flow, Flows
from llm_orchestrator.engine.machine import Event, Happening, decide
from llm_orchestrator.engine.mend import Mender
from llm_orchestrator.engine.replay import Fold, fold
from llm_orchestrator.engine.slots import Slots
from llm_orchestrator.errors import (
    Fenced,
    NotFound,
    OrchestratorError,
    Refused,
    StoreDamaged,
    StoreError,
)
from llm_orchestrator.language.code import CodeWorkflow
from llm_orchestrator.model import (
    MICROSECONDS,
    Journal,
    NewRun,
    Run,
    RunState,
    Workflow,
)
from llm_orchestrator.store.base import (
    Change,
    Register,
    Store,
)
from llm_orchestrator.store.writer import GroupWriter, Head

logger = logging.getLogger(__name__)
POLL_S = 5.0
CLAIM_MAX = 500


class Node:
    """See the module's docstring."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        flows: Flows,
        *,
        options: NodeOptions | None = None,
        publish: Publish | None = None,
    ) -> None:
        self.node_id = store.node_id
        self.flows = flows
        self._store = store
        self._clock = clock
        self._options = options or NodeOptions()
        self.writer = GroupWriter(store, clock)
        slots = Slots(self._options.steps_max)
        self._services = Services(
            self.writer, store.look, store.commit, clock, slots, self, publish, flows.tools
        )
        self._mender = Mender(store, self.writer)
        self._wake = asyncio.Event()
        self.driver = Driver(
            store, self.writer, clock, options=self._options, on_room=self._wake.set
        )
        self._strange: set[str] = set()
        """Digests of workflows whose code is not here."""
        self._set_aside: set[str] = set()
        """Runs that could not be claimed although they looked due; not tried again by this node."""
        self._taken_back: set[str] = set()
        self._has_orphans = False
        self._registered: set[str] = set()
        self._is_stopping = False
        self._claimer: asyncio.Task[None] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._settler: asyncio.Task[list[str]] | None = None

    # -- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take over what dead nodes left, then claim whatever is due, until `stop`."""
        self.writer.start()
        self._store.on_news(self._notice)
        await self._take_over()
        self._claimer = asyncio.create_task(self._claim_forever(), name="claimer")
        if self._options.retention:
            self._keeper = asyncio.create_task(
                expire_forever(self._store, self._options.retention, self._clock), name="retention"
            )
        self._settler = asyncio.create_task(
            settle(self._store, self._mender, self.driver.give_up), name="settler"
        )

    async def stop(self, *, grace_s: float = 0.0) -> None:
        """Let steps in flight end for `grace_s`, release every run, commit what is queued."""
        self._is_stopping = True
        self.writer.hurry()
        for task in (self._claimer, self._settler, self._keeper):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        await self.driver.stop(grace_s=grace_s)
        await self.writer.close()

    def add_code(self, workflow: CodeWorkflow[Any]) -> Flow:
        """Make a Python workflow runnable here; runs that waited for its code may start now."""
        flow = self.flows.add_code(workflow)
        if flow.digest in self._strange:
            self._strange.discard(flow.digest)
            self._has_orphans = True
            self._wake.set()
        return flow

    # -- accepting -----------------------------------------------------------------------------

    async def accept(self, new: NewRun, *, register: Workflow | None = None) -> str:
        """Make a run durable and start it here if there is room. Returns its id.

        With an idempotency key that was used before, the first run's id. Raises Refused when that
        one had another input.
        """
        changes: list[Change] = []
        if register is not None and register.digest not in self._registered:
            changes.append(Register(register))
        if new.idempotency_key is not None:
            changes.append(key_record(new))
        epoch = self._store.generation << 40
        head = Head(new.run_id, epoch)
        draft = accepted_draft(new)
        flow = None if new.wake_at else await self.flows.find(new.workflow, new.version, new.digest)
        is_ours = flow is not None and self.driver.has_room(new.queue) and not self._is_stopping
        if not is_ours or flow is None:
            await self.writer.append(head, (draft,), accept=new, changes=changes)
            return new.run_id
        claim = Happening(Event.CLAIM, owner=self.node_id)
        decision = decide(RunState.PENDING, epoch, claim)
        fresh = Fold(new.run_id, accepted=accepted_data(new), created_at=self._clock.now_us())
        execution = Execution(fresh, head, self._services)
        self.driver.admit(execution, new.queue)
        try:
            head.epoch = decision.epoch
            await self.writer.append(
                head, (draft, decision.draft), change=decision.change, accept=new, changes=changes
            )
        except BaseException:
            self.driver.dismiss(execution, new.queue)
            raise
        if register is not None:
            self._registered.add(register.digest)
        self.driver.start(execution, flow, new.queue)
        return new.run_id

    async def start_child(self, child: ChildSpec) -> None:
        """Accept a child of a run; one that is there already (a replay) is left alone."""
        if await self._store.look.run(child.run_id) is not None:
            return
        flow = await self._flow_of(child.workflow, child.version)
        new = NewRun(
            child.run_id,
            flow.name,
            flow.version,
            flow.digest,
            input=child.inputs,
            priority=flow.priority,
            queue=flow.queue,
            parent_run_id=child.parent_run_id,
            labels=flow.labels or {},
            origin={"step": child.step},
        )
        workflow = child.workflow
        register = registration(workflow) if isinstance(workflow, CodeWorkflow) else None
        with contextlib.suppress(Refused):
            await self.accept(new, register=register)

    async def _flow_of(self, workflow: CodeWorkflow[Any] | str, version: str | None) -> Flow:
        if isinstance(workflow, CodeWorkflow):
            return self.add_code(workflow)
        flow = await self.flows.find(workflow, version)
        if flow is None:
            raise NotFound(f"the code of workflow {workflow} is not in this process")
        return flow

    # -- claiming ------------------------------------------------------------------------------

    def _notice(self, news: News) -> None:
        """Look at what was committed: something to claim, or mail for a run that is here."""
        is_due = news.is_due
        self._set_aside -= news.freed | news.mended  # somebody has taken it up again
        if news.mended:
            self._has_orphans = True
        for run_id in news.ended:
            self.driver.tell(run_id)
        for run_id in news.posted:
            is_due |= not self.driver.deliver(run_id)
        if is_due:
            self._wake.set()

    async def _claim_forever(self) -> None:
        trouble = ""
        while True:
            self._wake.clear()
            try:
                pause_s = await self._claim_due()
            except StoreError as error:
                if error.message != trouble:
                    logger.error("cannot look for runs to claim: %s", error.message)
                trouble, pause_s = error.message, 1.0
            if pause_s > 0:
                with contextlib.suppress(TimeoutError):
                    # not wait_for: before Python 3.12 it loses a cancel that meets a wake-up
                    async with asyncio.timeout(pause_s):
                        await self._wake.wait()

    async def _take_over(self) -> None:
        """Go on with what dead nodes left. Runs whose code is not here wait for `add_code`."""
        self._has_orphans = False
        owned = await self._store.look.owned([self.node_id])
        orphans = [run_id for run_id in owned if run_id not in self._set_aside]
        for start in range(0, len(orphans), CLAIM_MAX):
            await self._claim(orphans[start : start + CLAIM_MAX])

    async def _take_back(self) -> None:
        """Runs that left because an entry did not land: damage is mended, then they go on, once."""
        lost = dict(self.driver.lost)
        self.driver.lost.clear()
        for run_id, error in lost.items():
            if run_id in self._taken_back and isinstance(error, OrchestratorError):
                self.driver.give_up(run_id, error)
        again = [run_id for run_id in lost if run_id not in self._taken_back]
        self._taken_back.update(again)
        journals = await self._store.look.load(again)
        await self._claim([run_id for run_id in again if self._is_mine(journals.get(run_id))])

    def _is_mine(self, journal: Journal | None) -> bool:
        """True when nobody else has taken the run, as far as its journal can be read."""
        if journal is None or not journal.entries:
            return True
        last = fold(journal.run_id, journal.entries)
        return last.state is not RunState.RUNNING or last.owner == self.node_id

    async def _claim_due(self) -> float:
        """Claim what is due and fits; returns how long nothing more will be due."""
        if self._has_orphans:
            await self._take_over()
        if self.driver.lost:
            await self._take_back()
        room = self.driver.room
        if room <= 0:
            return POLL_S
        now = self._clock.now_us()
        due = await self._store.look.claimable(
            now,
            min(room, CLAIM_MAX) + len(self._set_aside),
            full_queues=self.driver.full_queues(),
            strange=tuple(self._strange),
        )
        wanted = self._choose(due)
        if wanted:
            await self._claim(wanted)
            return 0.0
        moments = [
            await self._store.look.next_wake(),
            await fire_schedules(self._store, self.writer, self._clock),
        ]
        wake_at = min((moment for moment in moments if moment and moment > now), default=None)
        if wake_at is None:
            return POLL_S
        return min(POLL_S, max(0.001, (wake_at - now) / MICROSECONDS))

    def _choose(self, due: Sequence[Run]) -> list[str]:
        """Of the runs that are due, those that a queue's limit and this process's code allow."""
        chosen: list[str] = []
        planned = Counter(self.driver.queues)
        for run in due:
            if run.run_id in self.driver.driven or run.run_id in self._set_aside:
                continue
            limit = self._options.queues.get(run.queue)
            if limit is not None and planned[run.queue] >= limit:
                continue
            planned[run.queue] += 1
            chosen.append(run.run_id)
        return chosen

    async def _claim(self, run_ids: Sequence[str]) -> None:
        """Replay and drive runs that nobody drives. One that cannot be read is set aside, alone."""
        journals = await self._store.look.load(run_ids)
        claims = [self._claim_one(run_id, journals.get(run_id)) for run_id in run_ids]
        results = await asyncio.gather(*claims, return_exceptions=True)
        for run_id, result in zip(run_ids, results, strict=True):
            if isinstance(result, Fenced | Refused):
                continue  # somebody was quicker
            if isinstance(result, OrchestratorError):
                logger.error("run %s is set aside: %s", run_id, result.message)
                self.driver.give_up(run_id, result)
            elif isinstance(result, BaseException):
                raise result
            if result is not True:
                self._set_aside.add(run_id)

    async def _claim_one(self, run_id: str, journal: Journal | None) -> bool:
        """False when the run is not to be claimed after all: its journal says something else."""
        if journal is None:
            raise StoreDamaged(f"run {run_id} has no journal", run_id=run_id)
        state, head = await self._mender.whole(journal)
        flow = await self.flows.find(
            state.accepted["workflow"], state.accepted["version"], state.accepted["digest"]
        )
        if flow is None:
            self._strange.add(state.accepted["digest"])
            return True  # it waits for its code
        if state.state not in (RunState.PENDING, RunState.RUNNING, RunState.WAITING):
            end = End(run_id, state.state, state.reason, state.output, state.error)
            self.driver.ended(end)
            return False
        is_orphan = state.state is RunState.RUNNING
        event = Event.TAKEOVER if is_orphan else Event.CLAIM
        decision = decide(state.state, state.epoch, Happening(event, owner=self.node_id))
        head.epoch = decision.epoch
        execution = Execution(state, head, self._services)
        queue = str(state.accepted["queue"])
        self.driver.admit(execution, queue)
        try:
            await self.writer.append(head, (decision.draft,), change=decision.change)
        except BaseException:
            self.driver.dismiss(execution, queue)
            raise
        self.driver.start(execution, flow, queue)
        return True


def registration(workflow: CodeWorkflow[Any]) -> Workflow:
    """The row of `workflows` for a Python workflow."""
    return Workflow(workflow.name, workflow.version, workflow.digest, workflow.definition)

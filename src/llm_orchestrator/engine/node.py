"""A node: one process life that claims runs, drives them and lets them go.

The life of a run here: claim (an entry), replay (the fold), execute (the flow's body on an
Execution), then one closing entry: completed, failed, paused, waiting, or released. A node holds
in memory only runs that have something to do. Whatever ends a run's stay is decided by the
machine, and is one commit.

Its heart beats beside it (heart.py). A node that learns that the others took it for dead drops its
runs and comes back as a new one; what it goes on doing meanwhile the journal's key refuses.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from llm_orchestrator.clock import Clock
from llm_orchestrator.engine.acceptance import (
    accepted_data,
    accepted_draft,
    in_trace,
    key_record,
    without_secrets,
)
from llm_orchestrator.engine.audit import settle
from llm_orchestrator.engine.chores import Chore, expiring
from llm_orchestrator.engine.claims import Claims
from llm_orchestrator.engine.driver import Driver, NodeOptions
from llm_orchestrator.engine.execution import ChildSpec, Execution, Publish, Services
from llm_orchestrator.engine.flows import Flow, Flows
from llm_orchestrator.engine.heart import Heart
from llm_orchestrator.engine.lease import Verdict
from llm_orchestrator.engine.machine import Event, Happening, decide
from llm_orchestrator.engine.maintenance import Admission, Watch
from llm_orchestrator.engine.measure import node_gauges
from llm_orchestrator.engine.mend import Mender
from llm_orchestrator.engine.offers import OfferBook
from llm_orchestrator.engine.region import Heir
from llm_orchestrator.engine.replay import Fold
from llm_orchestrator.engine.second_copy import SecondCopy
from llm_orchestrator.engine.slots import Slots
from llm_orchestrator.engine.store_breaker import StoreBreaker
from llm_orchestrator.engine.upkeep import Upkeep
from llm_orchestrator.engine.verifier import Verifier
from llm_orchestrator.errors import NotFound, Refused, StoreError
from llm_orchestrator.language.code import CodeWorkflow
from llm_orchestrator.model import Json, NewRun, RunState, Workflow
from llm_orchestrator.store.base import Change, News, NodeState, Register, Store
from llm_orchestrator.store.spool import Spool
from llm_orchestrator.store.writer import GroupWriter, Head
from llm_orchestrator.telemetry.metrics import Metrics
from llm_orchestrator.telemetry.propagation import outgoing

if TYPE_CHECKING:
    from llm_orchestrator.telemetry.tracing import Tracing

logger = logging.getLogger(__name__)
CLAIM_S = 2.0
"""At the end a claim that is under way gets so long to land."""


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
        spool: Spool | None = None,
        tracing: Tracing | None = None,
        metrics: Metrics | None = None,
        copies: Sequence[SecondCopy] = (),
        chores: Sequence[Chore] = (),
    ) -> None:
        self._chores = chores
        self.node_id = store.node_id
        self.flows = flows
        self._store = store
        self._clock = clock
        self._options = options or NodeOptions()
        self.writer = GroupWriter(store, clock, [spool] if spool is not None else [])
        slots = Slots(self._options.steps_max)
        self._services = Services(
            self.writer, store.look, store.commit, clock, slots, self, publish, flows.tools
        )
        self.spool = spool
        self._services.tracing = tracing
        self._services.metrics = metrics or Metrics()
        self._gauges = partial(node_gauges, self)
        self._mender = Mender(store, self.writer, metrics=metrics, copies=copies)
        self.driver = Driver(store, self.writer, clock, options=self._options, on_room=self._poke)
        self.store_gate = StoreBreaker(clock)
        """For what is asked of the store on behalf of others; the writer does not pass it."""
        self.upkeep = Upkeep(
            Watch(store, clock, poll_s=self._options.poll_s, gate=self.store_gate),
            clock,
            self.driver,
            memory=self._options.memory,
            runs_max=self._options.runs_max,
            on_free=self._poke,
            heir=_heir(store, clock, self._options),
        )
        self.admission = Admission(self.upkeep.watch, leaving=self.leaving, gate=self.store_gate)
        self._claims = Claims(
            self.node_id,
            store,
            clock,
            flows=flows,
            writer=self.writer,
            driver=self.driver,
            services=self._services,
            mender=self._mender,
            options=self._options,
            offers=OfferBook(spool, store),
            upkeep=self.upkeep,
        )
        rate = self._options.verify_entries_per_s
        verifier = Verifier(store, self._mender, clock, entries_per_s=rate, is_mine=self._is_first)
        self.verifier = verifier if rate else None
        self.heart = self._make_heart()
        self._lives = 1
        self._registered: set[str] = set()
        self._is_stopping = False
        self._alive: frozenset[str] = frozenset()
        self._tasks: list[asyncio.Task[Any]] = []
        self._claimer: asyncio.Task[None] | None = None
        self._settler: asyncio.Task[Any] | None = None
        self._rebirth: asyncio.Task[None] | None = None

    # -- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Join the nodes, take over what dead ones left, then claim whatever is due, until `stop`.

        Raises StoreError.
        """
        self._services.metrics.watch(self._gauges)
        self.writer.start()
        self._store.on_news(self._notice)
        await self._begin()
        await self._claims.take_over()
        self._claimer = asyncio.create_task(self._claims.run_forever(), name="claimer")
        self._spawn(self.upkeep.watch_orders(), "orders")
        self._spawn(self.upkeep.watch_memory(), "memory")
        self._spawn(self.upkeep.watch_breakers(), "breakers")
        if self.verifier is not None:
            self._spawn(self.verifier.run_forever(), "verifier")
        for chore in (*expiring(self._store, self._options.retention, self._clock), *self._chores):
            self._spawn(chore.do_forever(self._clock), chore.name)
        looking = settle(self._store, self._mender, self.driver.give_up)
        self._settler = self._spawn(looking, "settler")

    async def stop(self, *, grace_s: float = 0.0) -> None:
        """Leave so that nobody waits for us: claims end, idle runs are handed back, all at once.

        Steps in flight then have `grace_s` to end; what a cut one has streamed is kept. The others
        hear of LEAVING, so that no run is blamed if this process is ended meanwhile.
        """
        self._is_stopping = True
        self.heart.announce()
        for task in (*self._tasks, self._rebirth):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._claims.close()
        self.driver.leave()
        if self._claimer is not None:  # a claim that is under way lands, and the run is let go
            await asyncio.wait([self._claimer], timeout=CLAIM_S)
            self._claimer.cancel()
            await asyncio.gather(self._claimer, return_exceptions=True)
        await self.driver.stop(grace_s=grace_s, hurry=self.writer.hurry)
        await self.writer.close()
        await self.heart.stop(NodeState.LEFT)
        self._services.metrics.unwatch(self._gauges)

    def is_alive(self) -> bool:
        """False when what must never stop has stopped: the heart, or the claiming of runs."""
        if self._is_stopping or (self._rebirth is not None and not self._rebirth.done()):
            return True
        is_claiming = self._claimer is not None and not self._claimer.done()
        return is_claiming and self.heart.is_beating()

    def reconfigure(self, options: NodeOptions) -> None:
        """Change what may be changed while it runs: bounds, queues' limits, memory, polling."""
        self._options = self.driver.options = options
        self._services.slots.resize(options.steps_max)
        self._claims.reconfigure(options)
        self.upkeep.reconfigure(options)
        self._poke()

    def leaving(self) -> str:
        """Why no new runs are taken here; empty while they are."""
        if self._is_stopping:
            return f"node {self.node_id} stops"
        return f"node {self.node_id} is drained" if self.upkeep.is_drained else ""

    def _spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        task = asyncio.create_task(work, name=name)
        self._tasks.append(task)
        return task

    def _make_heart(self) -> Heart:
        return Heart(
            self.node_id,
            self._store,
            self._clock,
            kind=self._options.heart,
            options=self._options.lease,
            region=self._options.region,
            info=lambda: _info(self.driver, self.upkeep, self._services),
            told=self._told,
        )

    def _is_first(self) -> bool:
        """One node of a store verifies: the first by name of those that live."""
        return self.node_id == min(self._alive, default=self.node_id)

    async def _begin(self) -> None:
        """A life of this node."""
        self._services.heart = self.heart
        self._claims.node_id = self._services.node_id = self.node_id
        await self.heart.start()
        await self.upkeep.begin(self.node_id)

    def _told(self, verdict: Verdict) -> None:
        """The heart saw the other nodes, or learnt that this one is dead to them."""
        if verdict.is_fenced:
            self._begin_anew("was taken for dead")
            return
        self._claims.nodes_alive = max(1, len(verdict.alive))
        if self._alive - verdict.alive:
            self._claims.expect_orphans()
        self._alive = verdict.alive
        self.upkeep.saw(verdict)

    def _notice(self, news: News) -> None:
        if news.is_replaced:
            self._begin_anew("has lost its store to a restored one")
        self._claims.notice(news)

    def _begin_anew(self, why: str) -> None:
        if self._rebirth is None or self._rebirth.done():
            logger.error("node %s %s and comes back as a new one", self.node_id, why)
            self._rebirth = asyncio.create_task(self._come_back(), name="rebirth")

    async def _come_back(self) -> None:
        """Fenced: drop every run, begin no further effect, and come back as a new node.

        What is in flight is not committed, here or ever; whoever took the runs over goes on.
        """
        await self.heart.stop()
        while not self._is_stopping:
            await self.driver.abandon()
            self._lives += 1
            self.node_id = f"{self._store.node_id}.{self._lives}"
            self.heart = self._make_heart()
            try:
                await _renew(self._store, self.writer, self.spool)
                await self._begin()
                break
            except StoreError as error:
                logger.error("cannot come back yet: %s", error.message)
                await self._clock.sleep(1.0)
        self._claims.forget()
        self._poke()

    def _poke(self) -> None:
        self._claims.wake.set()

    def add_code(self, workflow: CodeWorkflow[Any]) -> Flow:
        """Make a Python workflow runnable here; runs that waited for its code may start now."""
        flow = self.flows.add_code(workflow)
        self._claims.code_came(flow.digest)
        return flow

    # -- accepting -----------------------------------------------------------------------------

    async def accept(self, new: NewRun, *, register: Workflow | None = None) -> str:
        """Make a run durable and start it here if there is room. Returns its id.

        With an idempotency key that was used before, the first run's id. Raises Refused when that
        one had another input.
        """
        new = in_trace(new)
        changes: list[Change] = []
        if register is not None and register.digest not in self._registered:
            changes.append(Register(register))
        if new.idempotency_key is not None:
            changes.append(key_record(new))
        new = without_secrets(new)
        epoch = self._store.generation << 40
        head = Head(new.run_id, epoch)
        draft = accepted_draft(new)
        flow = None if new.wake_at else await self.flows.find(new.workflow, new.version, new.digest)
        if flow is None or not self._may_drive(new.queue):
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

    def _may_drive(self, queue: str) -> bool:
        """True when a run may be claimed here as it is accepted. A limited queue is picked from."""
        is_limited = queue in self._options.queues
        is_able = self._services.may_begin() and not self._claims.is_held()
        return is_able and not is_limited and self.driver.room > 0

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
            origin={"step": child.step, **outgoing()},
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


def _info(driver: Driver, upkeep: Upkeep, services: Services) -> Json:
    """What people see of a node in `llmo nodes list`."""
    return {
        "host": platform.node(),
        "pid": os.getpid(),
        "runs": len(list(driver.driven)),
        "room": driver.room,
        "version": services.metrics.version,
        "archive": driver.options.archive,
        **upkeep.info(),
    }


def _heir(store: Store, clock: Clock, options: NodeOptions) -> Heir:
    return Heir(
        store,
        clock,
        region=options.region,
        failover_s=options.region_failover_s,
        lease_s=options.lease.lease_s,
    )


async def _renew(store: Store, writer: GroupWriter, spool: Spool | None) -> None:
    """Take the store for what it is now. Raises StoreError."""
    before = store.incarnation
    await store.renew()
    if store.incarnation != before:
        writer.forget()  # before anybody else has a turn
    if spool is not None:
        spool.renew(store.incarnation)


def registration(workflow: CodeWorkflow[Any]) -> Workflow:
    """The row of `workflows` for a Python workflow."""
    return Workflow(workflow.name, workflow.version, workflow.digest, workflow.definition)

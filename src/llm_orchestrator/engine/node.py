"""A node: one process life that claims runs, drives them and lets them go.

The life of a run here: claim (an entry), replay (the fold), execute (the flow's body on an
Execution), then one closing entry: completed, failed, paused, waiting, or released. A node holds
in memory only runs that have something to do. Whatever ends a run's stay is decided by the
machine, and is one commit.

Wake-ups come from the node's own commits (`Store.on_commit`); a slow poll is only the fallback.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm_orchestrator.clock import Clock
from llm_orchestrator.engine.acceptance import accepted_data, accepted_draft, key_record
from llm_orchestrator.engine.drive import outcome
from llm_orchestrator.engine.execution import ChildSpec, Execution, Publish, Services
from llm_orchestrator.engine.flows import Flow, Flows
from llm_orchestrator.engine.machine import Event, Happening, decide
from llm_orchestrator.engine.mend import Mender
from llm_orchestrator.engine.replay import Fold
from llm_orchestrator.engine.slots import Slots
from llm_orchestrator.errors import Fenced, NotFound, Refused, StoreDamaged, StoreError
from llm_orchestrator.language.code import CodeWorkflow
from llm_orchestrator.model import (
    MICROSECONDS,
    Journal,
    Json,
    Message,
    NewRun,
    Run,
    RunState,
    Workflow,
)
from llm_orchestrator.store.base import (
    Batch,
    Change,
    Consume,
    Post,
    PutRecord,
    Register,
    RunFilter,
    Store,
)
from llm_orchestrator.store.writer import GroupWriter, Head

logger = logging.getLogger(__name__)
POLL_S = 5.0
CLAIM_MAX = 500


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """Bounds of one node. `queues` maps a queue's name to how many of its runs may be driven."""

    runs_max: int = 1_000
    steps_max: int = 1_000
    queues: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class End:
    """How a run's stay ended: a final state, or paused."""

    run_id: str
    state: RunState
    reason: str = ""
    output: Json = None
    error: Json = None


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
            self.writer, store.look, store.commit, clock, slots, self, publish
        )
        self._mender = Mender(store, self.writer)
        self._driven: dict[str, Execution] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._queues: Counter[str] = Counter()
        self._ends: dict[str, list[asyncio.Future[End]]] = {}
        self._strange: set[str] = set()
        """Digests of workflows whose code is not here."""
        self._has_orphans = False
        self._registered: set[str] = set()
        self._wake = asyncio.Event()
        self._is_stopping = False
        self._claimer: asyncio.Task[None] | None = None

    # -- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take over what dead nodes left, then claim whatever is due, until `stop`."""
        self.writer.start()
        self._store.on_commit(self._notice)
        await self._take_over()
        self._claimer = asyncio.create_task(self._claim_forever(), name="claimer")

    async def stop(self, *, grace_s: float = 0.0) -> None:
        """Let steps in flight end for `grace_s`, release every run, commit what is queued."""
        self._is_stopping = True
        if self._claimer is not None:
            self._claimer.cancel()
            await asyncio.gather(self._claimer, return_exceptions=True)
        release = Happening(Event.RELEASE, reason="released")
        for execution in list(self._driven.values()):
            execution.gate.request_stop(release)
        if self._tasks and grace_s > 0:
            await asyncio.wait(self._tasks, timeout=grace_s)
        for execution in list(self._driven.values()):
            execution.gate.request_stop(release, at_once=True)
        if self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.writer.close()

    def add_code(self, workflow: CodeWorkflow[Any]) -> Flow:
        """Make a Python workflow runnable here; runs that waited for its code may start now."""
        flow = self.flows.add_code(workflow)
        if flow.digest in self._strange:
            self._strange.discard(flow.digest)
            self._has_orphans = True
            self._wake.set()
        return flow

    @property
    def driven(self) -> Iterable[str]:
        """The ids of the runs in this process."""
        return self._driven.keys()

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
        is_ours = flow is not None and self._has_room(new.queue) and not self._is_stopping
        if not is_ours or flow is None:
            await self.writer.append(head, (draft,), accept=new, changes=changes)
            return new.run_id
        claim = Happening(Event.CLAIM, owner=self.node_id)
        decision = decide(RunState.PENDING, epoch, claim)
        fresh = Fold(new.run_id, accepted=accepted_data(new), created_at=self._clock.now_us())
        execution = Execution(fresh, head, self._services)
        self._admit(execution, new.queue)
        try:
            head.epoch = decision.epoch
            await self.writer.append(
                head, (draft, decision.draft), change=decision.change, accept=new, changes=changes
            )
        except BaseException:
            self._dismiss(execution, new.queue)
            raise
        if register is not None:
            self._registered.add(register.digest)
        self._start(execution, flow, new.queue)
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

    def wait_end(self, run_id: str) -> asyncio.Future[End]:
        """Ends when the run reaches a final state or pauses, in this process."""
        future: asyncio.Future[End] = asyncio.get_running_loop().create_future()
        self._ends.setdefault(run_id, []).append(future)
        return future

    # -- claiming ------------------------------------------------------------------------------

    def _notice(self, batch: Batch) -> None:
        """A commit landed: is there something to claim, or a message for a run that is here?"""
        for append in batch.appends:
            change = append.change
            if change is None:
                if append.accept is not None:
                    self._wake.set()
            elif change.state in (RunState.PENDING, RunState.WAITING):
                self._wake.set()
        for post in batch.changes:
            if isinstance(post, PutRecord):
                if post.kind == "schedule":
                    self._wake.set()
            elif isinstance(post, Post):
                execution = self._driven.get(post.run_id)
                if execution is None:
                    self._wake.set()
                else:
                    self._spawn(self._deliver(execution))

    async def _claim_forever(self) -> None:
        while True:
            self._wake.clear()
            try:
                pause_s = await self._claim_due()
            except StoreError as error:
                logger.error("cannot look for runs to claim: %s", error.message)
                pause_s = 1.0
            if pause_s > 0:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), pause_s)

    async def _take_over(self) -> None:
        """Go on with what dead nodes left. Runs whose code is not here wait for `add_code`."""
        self._has_orphans = False
        orphans = await self._store.look.owned([self.node_id])
        for start in range(0, len(orphans), CLAIM_MAX):
            await self._claim(orphans[start : start + CLAIM_MAX])

    async def _claim_due(self) -> float:
        """Claim what is due and fits; returns how long nothing more will be due."""
        if self._has_orphans:
            await self._take_over()
        room = self._options.runs_max - len(self._driven)
        if room <= 0:
            return POLL_S
        now = self._clock.now_us()
        due = await self._store.look.claimable(now, min(room, CLAIM_MAX) + len(self._strange))
        wanted = self._choose(due)
        if wanted:
            await self._claim(wanted)
            return 0.0
        moments = [await self._store.look.next_wake(), await self._fire_schedules()]
        wake_at = min((moment for moment in moments if moment and moment > now), default=None)
        if wake_at is None:
            return POLL_S
        return min(POLL_S, max(0.001, (wake_at - now) / MICROSECONDS))

    async def _fire_schedules(self) -> int | None:
        """Cron, once a look: the module is loaded only where there is a schedule."""
        if not await self._store.shelf.records("schedule"):
            return None
        from llm_orchestrator.engine.schedule import Scheduler  # noqa: PLC0415 (rarely needed)

        return await Scheduler(self._store, self.writer, self._clock).fire()

    def _choose(self, due: Sequence[Run]) -> list[str]:
        """Of the runs that are due, those that a queue's limit and this process's code allow."""
        chosen: list[str] = []
        planned = Counter(self._queues)
        for run in due:
            if run.run_id in self._driven or run.digest in self._strange:
                continue
            limit = self._options.queues.get(run.queue)
            if limit is not None and planned[run.queue] >= limit:
                continue
            planned[run.queue] += 1
            chosen.append(run.run_id)
        return chosen

    def _has_room(self, queue: str) -> bool:
        limit = self._options.queues.get(queue)
        is_free = limit is None or self._queues[queue] < limit
        return is_free and len(self._driven) < self._options.runs_max

    async def _claim(self, run_ids: Sequence[str]) -> None:
        """Replay and drive runs that nobody drives. One that cannot be read is set aside, alone."""
        journals = await self._store.look.load(run_ids)
        claims = [self._claim_one(run_id, journals.get(run_id)) for run_id in run_ids]
        for run_id, result in zip(
            run_ids, await asyncio.gather(*claims, return_exceptions=True), strict=True
        ):
            if isinstance(result, Fenced | Refused):
                continue  # somebody was quicker
            if isinstance(result, StoreDamaged):
                logger.error("run %s: %s", run_id, result.message)
            elif isinstance(result, BaseException):
                raise result

    async def _claim_one(self, run_id: str, journal: Journal | None) -> None:
        if journal is None:
            raise StoreDamaged(f"run {run_id} has no journal", run_id=run_id)
        state, head = await self._mender.whole(journal)
        flow = await self.flows.find(
            state.accepted["workflow"], state.accepted["version"], state.accepted["digest"]
        )
        if flow is None:
            self._strange.add(state.accepted["digest"])
            return
        if state.state not in (RunState.PENDING, RunState.RUNNING, RunState.WAITING):
            return
        is_orphan = state.state is RunState.RUNNING
        event = Event.TAKEOVER if is_orphan else Event.CLAIM
        decision = decide(state.state, state.epoch, Happening(event, owner=self.node_id))
        head.epoch = decision.epoch
        execution = Execution(state, head, self._services)
        queue = str(state.accepted["queue"])
        self._admit(execution, queue)
        try:
            await self.writer.append(head, (decision.draft,), change=decision.change)
        except BaseException:
            self._dismiss(execution, queue)
            raise
        self._start(execution, flow, queue)

    # -- driving -------------------------------------------------------------------------------

    def _admit(self, execution: Execution, queue: str) -> None:
        self._driven[execution.run_id] = execution
        self._queues[queue] += 1

    def _dismiss(self, execution: Execution, queue: str) -> None:
        if self._driven.get(execution.run_id) is execution:
            del self._driven[execution.run_id]
            self._queues[queue] -= 1
            if len(self._driven) >= self._options.runs_max - 1 or queue in self._options.queues:
                self._wake.set()

    def _start(self, execution: Execution, flow: Flow, queue: str) -> None:
        task = self._spawn(self._drive(execution, flow, queue))
        execution.gate.task = task
        if execution.fold.epoch:  # not fresh: something may have been sent to it meanwhile
            self._spawn(self._deliver(execution))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("a defect in the engine", exc_info=task.exception())

    async def _deliver(self, execution: Execution) -> None:
        try:
            requests = await execution.mailbox.fetch()
        except StoreDamaged as error:
            logger.error("run %s: %s", execution.run_id, error.message)
            return
        execution.gate.inbox_seen = execution.mailbox.seen
        for message in requests:
            happening = happening_of(message)
            if happening is not None:
                execution.requests.append(message.number)
                at_once = happening.event is not Event.PAUSE
                execution.gate.request_stop(happening, at_once=at_once)

    async def _drive(self, execution: Execution, flow: Flow, queue: str) -> None:
        try:
            happening = await outcome(execution, flow, self._clock)
            if happening is not None:
                await self._close(execution, happening)
        except (Fenced, StoreError) as error:
            logger.warning("run %s left this node: %s", execution.run_id, error)
        finally:
            self._dismiss(execution, queue)

    async def _close(self, execution: Execution, happening: Happening) -> None:
        """The one entry with which a run leaves this process."""
        decision = decide(RunState.RUNNING, execution.head.epoch, happening)
        execution.head.epoch = decision.epoch
        changes: list[Change] = []
        if execution.requests:
            changes.append(Consume(execution.run_id, tuple(execution.requests)))
        parent = execution.fold.accepted.get("parent_run_id")
        end = End(
            execution.run_id, decision.state, happening.reason, happening.output, happening.error
        )
        if parent and decision.state.is_final:
            changes.append(_news(parent, end))
        await self.writer.append(
            execution.head, (decision.draft,), change=decision.change, changes=changes
        )
        execution.publish(str(decision.state), "", dict(happening.data))
        if decision.state is RunState.CANCELLED:
            await self._cancel_children(execution.run_id)
        if decision.state.is_final or decision.state is RunState.PAUSED:
            for future in self._ends.pop(execution.run_id, ()):
                if not future.done():
                    future.set_result(end)

    async def _cancel_children(self, run_id: str) -> None:
        children = await self._store.look.runs(RunFilter(parent_run_id=run_id, limit=100_000))
        posts = [
            Post(child.run_id, "cancel", payload={"by": f"parent {run_id}"}, sender_key="parent")
            for child in children
            if not child.state.is_final
        ]
        if posts:
            await self._store.commit(Batch(changes=posts))


def registration(workflow: CodeWorkflow[Any]) -> Workflow:
    """The row of `workflows` for a Python workflow."""
    return Workflow(workflow.name, workflow.version, workflow.digest, workflow.definition)


def happening_of(message: Message) -> Happening | None:
    """What a request in an inbox means for a run that is being driven."""
    data = message.payload if isinstance(message.payload, dict) else {}
    if message.kind == "cancel":
        return Happening(Event.CANCEL, reason="requested", data=data)
    if message.kind == "pause":
        return Happening(Event.PAUSE, reason="operator", data=data)
    if message.kind == "rewind":
        return Happening(Event.REWIND, reason="operator", data=data)
    return None


def _news(parent_run_id: str, end: End) -> Post:
    name = f"child:{end.run_id}"
    payload = {"state": end.state, "output": end.output, "error": end.error}
    return Post(parent_run_id, "signal", name, payload, sender_key=name)

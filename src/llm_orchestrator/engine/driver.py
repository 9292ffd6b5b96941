"""The runs that are in this process: each driven to the one entry with which it leaves.

A run's stay ends completed, failed, cancelled, paused, waiting or released; the machine decides,
and it is one commit. Only runs that have something to do are here, bounded in all and per queue.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm_orchestrator.clock import Clock
from llm_orchestrator.engine.breakers import WAKE
from llm_orchestrator.engine.drive import outcome
from llm_orchestrator.engine.execution import Execution
from llm_orchestrator.engine.flows import Flow
from llm_orchestrator.engine.gate import Gate
from llm_orchestrator.engine.heart import Kind as HeartKind
from llm_orchestrator.engine.lease import LeaseOptions
from llm_orchestrator.engine.machine import Event, Happening, decide
from llm_orchestrator.engine.maintenance import POLL_S
from llm_orchestrator.engine.memory import Memory
from llm_orchestrator.engine.replay import fold
from llm_orchestrator.engine.retention import Retention
from llm_orchestrator.engine.trace import arrive
from llm_orchestrator.errors import Fenced, OrchestratorError, StoreDamaged, StoreError
from llm_orchestrator.model import MICROSECONDS, Json, Message, RunState
from llm_orchestrator.store.base import (
    Batch,
    Change,
    Consume,
    Post,
    QueueLimit,
    RunFilter,
    Store,
)
from llm_orchestrator.store.writer import GroupWriter

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """Bounds of one node. `queues`: what some queues allow, over all nodes."""

    runs_max: int = 1_000
    steps_max: int = 1_000
    queues: Mapping[str, QueueLimit] = field(default_factory=dict)
    retention: Retention = field(default_factory=Retention)
    heart: HeartKind = "none"
    lease: LeaseOptions = field(default_factory=LeaseOptions)
    region: str = "local"
    region_failover_s: float = 0.0
    """How long no active region lives before this one takes over; at least a lease."""
    memory: Memory | None = None
    """What to watch so that the kernel does not end the process; None watches nothing."""
    poll_s: float = POLL_S
    """How often operators' orders are looked at when no news of them comes."""
    verify_entries_per_s: float = 0.0
    """How fast all journals are read again to find damage; 0: never."""
    archive: str = ""
    """Where its batches go as well: others see that it archives."""


@dataclass(frozen=True, slots=True)
class End:
    """How a run's stay ended: a final state, or paused."""

    run_id: str
    state: RunState
    reason: str = ""
    output: Json = None
    error: Json = None


class Driver:
    """See the module's docstring. `on_room` is called when a full node has room again."""

    def __init__(
        self,
        store: Store,
        writer: GroupWriter,
        clock: Clock,
        *,
        options: NodeOptions,
        on_room: Callable[[], None],
    ) -> None:
        self._store = store
        self._writer = writer
        self._clock = clock
        self.options = options
        self._on_room = on_room
        self._driven: dict[str, Execution] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ends: dict[str, list[asyncio.Future[End]]] = {}
        self._troubles: dict[str, OrchestratorError] = {}
        self.lost: dict[str, BaseException] = {}
        """Runs that left because they could not be written, and why; the node looks after them."""
        self.queues: Counter[str] = Counter()
        self.ceiling = options.runs_max
        """What memory allows for now; at most `runs_max`."""
        self._leaving: Happening | None = None
        self._suspect: str | None = None

    @property
    def driven(self) -> Iterable[str]:
        """The ids of the runs in this process."""
        return self._driven.keys()

    @property
    def count(self) -> int:
        """How many runs are in this process."""
        return len(self._driven)

    @property
    def room(self) -> int:
        """How many more runs fit."""
        return min(self.options.runs_max, self.ceiling) - len(self._driven)

    @property
    def seen(self) -> dict[str, int]:
        """How much of its mail each run here has seen."""
        return {key: execution.mailbox.seen for key, execution in self._driven.items()}

    def admit_suspect(self, run_id: str) -> bool:
        """True when no other run is here of which two nodes may have died."""
        if self._suspect is not None and self._suspect in self._driven:
            return self._suspect == run_id
        self._suspect = run_id
        return True

    async def abandon(self) -> None:
        """Drop every run at once, without a word: they are somebody else's."""
        for execution in list(self._driven.values()):
            execution.head.is_fenced = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._driven.clear()
        self.queues.clear()

    def leave(self) -> None:
        """Nothing begins here any more: idle runs leave now, others when what is in flight ends."""
        self._leaving = Happening(Event.RELEASE, reason="released")
        for execution in list(self._driven.values()):
            execution.gate.request_stop(self._leaving)

    def stay(self) -> None:
        """The opposite, for runs that come from now on."""
        self._leaving = None

    def shed(self, share: float) -> int:
        """Let go what is idle, and a share of the rest (the newest); how many runs were asked."""
        release = Happening(Event.RELEASE, reason="released")
        staying = [each for each in self._driven.values() if each.gate.stop is None]
        idle = [each for each in staying if each.gate.is_idle]
        busy = [each for each in reversed(staying) if not each.gate.is_idle]
        chosen = idle + busy[: math.ceil(len(busy) * share)]
        for execution in chosen:
            execution.gate.request_stop(release)
        return len(chosen)

    async def stop(self, *, grace_s: float, hurry: Callable[[], object] = bool) -> None:
        """Let steps in flight end for `grace_s`, then release every run, and `hurry` about it."""
        self.leave()
        if self._tasks and grace_s > 0:
            await asyncio.wait(self._tasks, timeout=grace_s)
        hurry()
        release = Happening(Event.RELEASE, reason="released")
        for execution in list(self._driven.values()):
            execution.gate.request_stop(release, at_once=True)
        if self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def wait_end(self, run_id: str) -> asyncio.Future[End]:
        """Ends when the run reaches a final state or pauses, in this process.

        Raises what keeps the run from being driven here (StoreError's subclasses). Cancel the
        future to wait no longer.
        """
        future: asyncio.Future[End] = asyncio.get_running_loop().create_future()
        if run_id in self._troubles:
            _refuse(future, self._troubles[run_id])
        else:
            self._ends.setdefault(run_id, []).append(future)
            future.add_done_callback(lambda done: self._forget(run_id, done))
        return future

    def _forget(self, run_id: str, future: asyncio.Future[End]) -> None:
        """Nobody waits for this any more."""
        waiting = self._ends.get(run_id)
        if waiting is not None and future in waiting:
            waiting.remove(future)
            if not waiting:
                del self._ends[run_id]

    def ended(self, end: End) -> None:
        """Tell everybody who waits for this run."""
        for future in self._ends.pop(end.run_id, ()):
            if not future.done():
                future.set_result(end)

    def give_up(self, run_id: str, trouble: OrchestratorError) -> None:
        """Nobody need wait for this run: it cannot be driven here until something changes."""
        self._troubles[run_id] = trouble
        for future in self._ends.pop(run_id, ()):
            _refuse(future, trouble)

    def tell(self, run_id: str) -> None:
        """Somebody else ended or paused a run that is not here: tell who waits for it."""
        if run_id in self._ends and run_id not in self._driven:
            self._spawn(self._tell(run_id))

    async def _tell(self, run_id: str) -> None:
        journal = (await self._store.look.load([run_id])).get(run_id)
        if journal is None or not journal.entries:
            return
        state = fold(run_id, journal.entries)
        if state.state.is_final or state.state is RunState.PAUSED:
            end = End(run_id, state.state, state.reason, state.output, state.error)
            self.ended(end)

    # -- driving -------------------------------------------------------------------------------

    def admit(self, execution: Execution, queue: str) -> None:
        """Count a run in, before its claim is sent."""
        self._troubles.pop(execution.run_id, None)
        self._driven[execution.run_id] = execution
        self.queues[queue] += 1

    def dismiss(self, execution: Execution, queue: str) -> None:
        """Count it out."""
        if self._driven.get(execution.run_id) is execution:
            del self._driven[execution.run_id]
            self.queues[queue] -= 1
            if len(self._driven) >= self.options.runs_max - 1 or queue in self.options.queues:
                self._on_room()

    def start(self, execution: Execution, flow: Flow, queue: str) -> None:
        """Drive a run whose claim has landed."""
        self._spawn(self._drive(execution, flow, queue))
        if execution.fold.epoch:  # not fresh: it does not park before its mail was looked for
            execution.gate.enter()
        if self._leaving is not None:
            execution.gate.request_stop(self._leaving)

    async def read_mail(self, run_ids: Sequence[str]) -> None:
        """Fetch what was sent to runs that have just been started: one look for all of them."""
        started = [self._driven[run_id] for run_id in run_ids if run_id in self._driven]
        if not started:
            return
        try:
            seqs = await self._store.look.inbox_seqs([each.run_id for each in started])
        except StoreError:
            seqs = {each.run_id: 1 for each in started}  # each of them asks again
        for execution in started:
            if seqs.get(execution.run_id):
                self._spawn(self._deliver(execution, is_held=True))
            else:
                execution.gate.leave()

    @property
    def gates(self) -> list[Gate]:
        """Of all runs here."""
        return [each.gate for each in self._driven.values()]

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("a defect in the engine", exc_info=task.exception())

    def deliver(self, run_id: str) -> bool:
        """Look into a run's inbox if it is here; False when it is not."""
        execution = self._driven.get(run_id)
        if execution is not None:
            self._spawn(self._deliver(execution))
        return execution is not None

    async def _deliver(self, execution: Execution, *, is_held: bool = False) -> None:
        gate = execution.gate
        is_counted = is_held or gate.stop is None
        if is_counted and not is_held:
            gate.enter()  # a run does not park while its mail is being fetched
        try:
            requests = await execution.mailbox.fetch()
            gate.inbox_seen = execution.mailbox.seen
        except StoreDamaged as error:
            logger.error("run %s: %s", execution.run_id, error.message)
            facts = {"kind": error.kind, "message": error.message}
            gate.request_stop(Happening(Event.PAUSE, "damaged", error=facts))
            return
        except StoreError as error:
            logger.debug("the mail of run %s is read later: %s", execution.run_id, error.message)
            return  # the poll compares what was sent with what was seen
        finally:
            if is_counted:
                gate.leave()
        for message in requests:
            if message.kind == WAKE:
                execution.requests.append(message.number)
                gate.release(message.name)
            happening = happening_of(message)
            if happening is not None:
                execution.requests.append(message.number)
                at_once = happening.event is not Event.PAUSE
                gate.request_stop(happening, at_once=at_once)

    async def _drive(self, execution: Execution, flow: Flow, queue: str) -> None:
        execution.gate.task = asyncio.current_task()  # from here on: a task can be lost before
        arrive(execution)
        try:
            happening = await outcome(execution, flow, self._clock)
            execution.gate.close()
            if happening is not None:
                await self._close(execution, happening)
        except (Fenced, StoreError) as error:
            logger.warning("run %s left this node: %s", execution.run_id, error)
            self.lost[execution.run_id] = error
            self._on_room()
        finally:
            self.dismiss(execution, queue)

    async def _close(self, execution: Execution, happening: Happening) -> None:
        """The one entry with which a run leaves this process."""
        decision = decide(RunState.RUNNING, execution.head.epoch, happening)
        execution.head.epoch = decision.epoch
        changes: list[Change] = []
        if execution.requests:
            changes.append(Consume(execution.run_id, tuple(execution.requests)))
        parent = execution.fold.accepted.get("parent_run_id")
        end = End(
            execution.run_id,
            decision.state,
            decision.change.reason,
            decision.output,
            decision.error,
        )
        if parent and decision.state.is_final:
            changes.append(news(parent, end))
        await self._writer.append(
            execution.head, (decision.draft,), change=decision.change, changes=changes
        )
        is_final = decision.state.is_final
        execution.trace.left(decision.state, end.reason, end.error, is_final=is_final)
        if is_final:
            begun = execution.fold
            took_s = (self._clock.now_us() - begun.created_at) / MICROSECONDS
            workflow = str(begun.accepted["workflow"])
            execution.services.metrics.run_ended(workflow, decision.state.value, took_s)
        execution.publish(str(decision.state), "", dict(happening.data))
        if decision.state is RunState.CANCELLED:
            await self._cancel_children(execution.run_id)
        if decision.state.is_final or decision.state is RunState.PAUSED:
            self.ended(end)

    async def _cancel_children(self, run_id: str) -> None:
        children = await self._store.look.runs(RunFilter(parent_run_id=run_id, limit=100_000))
        posts = [
            Post(child.run_id, "cancel", payload={"by": f"parent {run_id}"}, sender_key="parent")
            for child in children
            if not child.state.is_final
        ]
        if posts:
            await self._store.commit(Batch(changes=posts))


def _refuse(future: asyncio.Future[End], trouble: OrchestratorError) -> None:
    if not future.done():
        future.set_exception(trouble)
        future.exception()  # a waiter that is gone leaves no "never retrieved" warning


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


def news(parent_run_id: str, end: End) -> Post:
    """What a parent hears of its child's end, whoever ended it."""
    name = f"child:{end.run_id}"
    payload = {"state": end.state, "output": end.output, "error": end.error}
    return Post(parent_run_id, "signal", name, payload, sender_key=name)

"""Operators and callers: they accept runs, send signals, cancel, pause, decide, retry, rewind.

Whatever they ask goes through `engine.control.Operator`, from a process of their own, again until
the store has taken it; what may not be repeated is not.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from llm_orchestrator.clock import new_run_id
from llm_orchestrator.engine.control import Choice, Operator
from llm_orchestrator.engine.node import registration
from llm_orchestrator.engine.replay import checkpoints
from llm_orchestrator.engine.schedule import KIND, schedule_record
from llm_orchestrator.errors import NotFound, Refused, StoreError
from llm_orchestrator.model import NewRun, RunState
from llm_orchestrator.store.base import Batch
from tests.simulation.oracle import visible

if TYPE_CHECKING:
    from tests.simulation.world import Machine, World

_MARKS = itertools.count(1)
SHAPES = ("sequence", "parallel", "effects", "sleeper", "listener", "parent", "endless")


class People:
    """See the module's docstring."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.random = world.random
        self.machine: Machine = world.make_machine("p")
        self.is_done = False
        self.runs: list[str] = []
        self.listening: list[str] = []
        self.endless: list[str] = []
        self.signalled: set[str] = set()
        """Runs whose signal the store has: they go on without another one."""
        self.cancelled: set[str] = set()
        """Runs whose cancel the store has: they end without being told again."""
        self.marks = itertools.count(1)

    def start(self) -> None:
        """Begin."""
        self.world.spawn(self.machine, self._live())

    def all_ended(self) -> bool:
        """True when every run that is stored has come to its end."""
        runs = visible(self.world.database.leader, "runs").values()
        return all(RunState(row["state"]).is_final for row in runs)

    async def _live(self) -> None:
        await self.world.open_store(self.machine)
        shape = self.world.shape
        if "planned" in shape.flows:
            await self._insist(self._plan)
        actions = [self._submit] * shape.runs
        actions += [self._meddle] * (2 * shape.runs if "people" in shape.mix else 0)
        self.random.shuffle(actions)
        for action in actions:
            await self._insist(action)
            pause_s = shape.trouble_s / max(1, len(actions)) * self.random.random()
            await self.machine.process.clock.sleep(pause_s)
        while not self.world.is_healed:
            await self._insist(self._meddle)
            await self.machine.process.clock.sleep(0.5 + self.random.random())
        while True:
            await self._insist(self._help)
            self.is_done = True
            await self.machine.process.clock.sleep(1.0)

    @property
    def operator(self) -> Operator:
        store = self.machine.store
        assert store is not None
        return Operator(store, store.clock)

    async def _insist(self, action: Callable[[], Awaitable[Any]]) -> None:
        """Until the store has taken it, or said no."""
        for _ in range(40):
            try:
                await action()
                return
            except (Refused, NotFound) as error:
                self.world.note("refused", error.message)
                return
            except StoreError as error:
                self.world.note("trouble", error.message)
                if not error.retryable:
                    await self.world.open_store(self.machine)
                await self.machine.process.clock.sleep(0.3)

    # -- what they want ----------------------------------------------------------------------------

    async def _submit(self) -> None:
        world, store = self.world, self.machine.store
        assert store is not None
        choices = [name for name in world.shape.flows if name != "planned"] or list(SHAPES)
        name = self.random.choice(choices)
        flow = next(flow for flow in world.flows if flow.name == name)
        key = f"k{self.random.randrange(4)}" if self.random.random() < 0.3 else None
        run_id = new_run_id(store.clock)
        inputs = {"same": 1} if key is None else {"key": key}
        new = NewRun(
            run_id, name, "1", flow.digest, idempotency_key=key, input=inputs,
            priority=self.random.randrange(3),
        )  # fmt: skip
        world.note("accept", run_id, name, key)

        async def accept() -> None:
            incarnation = self.machine.incarnation
            told = await self.operator.accept(new, register=registration(flow))
            if key is not None:
                world.oracle.told(incarnation, f"{name}/{key}", told)
            self.runs.append(told)
            if name == "listener":
                self.listening.append(told)
            if name == "endless":
                self.endless.append(told)

        await self._insist(accept)
        if key is not None and self.random.random() < 0.5:
            await self._insist(accept)

    async def _plan(self) -> None:
        store, flow = self.machine.store, next(f for f in self.world.flows if f.name == "planned")
        assert store is not None
        await self.operator.register(registration(flow))
        _, version = await store.shelf.record(KIND, flow.name)
        record = schedule_record(
            (flow.name, flow.version, flow.digest),
            cron="* * * * *",
            timezone="UTC",
            backfill="all",
            inputs={},
            now_us=store.clock.now_us(),
            version=version,
        )
        if version == 0:
            await store.commit(Batch(changes=(record,)))

    async def _meddle(self) -> None:
        if not self.runs:
            return
        run_id = self.random.choice(self.runs)
        kind = self.random.choice(("signal", "signal", "signal", "pause", "help", "cancel", "odd"))
        if run_id in self.endless:
            kind = self.random.choice(("cancel", "cancel", "pause", "help"))
        if "people" not in self.world.shape.mix and kind in ("pause", "cancel", "odd"):
            kind = "signal"
        if kind == "signal":
            await self._signal(run_id)
        elif kind == "pause":
            await self.operator.pause(run_id)
        elif kind == "help":
            await self._help()
        elif kind == "cancel" and (self.random.random() < 0.5 or run_id in self.endless):
            await self.operator.cancel(run_id)
            self.cancelled.add(run_id)
        elif kind == "odd" and "go_back" in self.world.shape.mix:
            store = self.machine.store
            assert store is not None
            journal = (await store.look.load([run_id])).get(run_id)
            points = checkpoints(journal.entries) if journal else []
            if points:
                await self.operator.rewind(run_id, self.random.choice(points).seq)

    async def _signal(self, run_id: str) -> None:
        """Once: a message without a sender's key is not sent again by a careful caller."""
        waiting = [each for each in self.listening if each not in self.signalled]
        if not waiting:
            return
        run_id = self.random.choice(waiting)
        payload = {"mark": next(self.marks)}
        self.world.note("signal", run_id, payload["mark"])
        try:
            await self.operator.signal(run_id, "go", payload)
            self.signalled.add(run_id)
        except StoreError as error:
            self.world.note("signal unknown", error.message)

    async def _help(self) -> None:
        """What an operator does when something waits for him; at the end nothing may wait."""
        store = self.machine.store
        assert store is not None
        for run_id, row in sorted(visible(self.world.database.leader, "runs").items()):
            state = row["state"]
            if state == "paused":
                await self._gently(self._resume(run_id, row["reason"]))
            elif state == "failed" and self.random.random() < 0.2 and not self.world.is_healed:
                await self._gently(self.operator.retry(run_id))
            elif self.world.is_healed and state in ("waiting", "running"):
                if row["workflow"] == "listener" and self._is_to_hear(run_id):
                    post = self.operator.signal(run_id, "go", "late", sender_key="help")
                    await self._gently(post)
                elif row["workflow"] == "endless" and self._is_to_end(run_id):
                    await self._gently(self.operator.cancel(run_id))

    def _is_to_end(self, run_id: str) -> bool:
        return run_id not in self.cancelled or self.world.is_rewound

    def _is_to_hear(self, run_id: str) -> bool:
        return run_id not in self.signalled or self.world.is_rewound

    async def _resume(self, run_id: str, reason: str) -> None:
        if reason != "unknown_outcome":
            await self.operator.resume(run_id)
            return
        state = await self.operator.state(run_id)
        for step in list(state.intents)[:1]:
            choices: tuple[Choice, ...] = ("retry", "finished", "failed")
            choice = self.random.choice(choices)
            self.world.note("decide", run_id, step, choice)
            result = f"decided-{step}"
            await self.operator.decide(run_id, step, choice, result=result)

    async def _gently(self, work: Awaitable[Any]) -> None:
        try:
            await work
        except (Refused, NotFound) as error:
            self.world.note("refused", error.message)

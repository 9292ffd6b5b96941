"""Several production nodes on one store in memory, in one thread, on virtual time.

Each node has a `Desk`: its own way to the shared store, which a test may cut (nothing is answered
any more), trouble (every answer is an error) or make deaf (no news come). `House.crash` ends a
node's tasks as kill -9 would: it says nothing to anybody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

from llm_orchestrator.clock import new_run_id
from llm_orchestrator.engine.control import Operator
from llm_orchestrator.engine.driver import NodeOptions
from llm_orchestrator.engine.flows import Flows
from llm_orchestrator.engine.interpreter import Tools
from llm_orchestrator.engine.node import Node
from llm_orchestrator.engine.replay import Fold, fold
from llm_orchestrator.errors import StoreUnavailable
from llm_orchestrator.language.definition import Definition
from llm_orchestrator.language.templates import Templates
from llm_orchestrator.model import Json, NewRun
from llm_orchestrator.steps.registry import StepTypes
from llm_orchestrator.store.base import Batch, Member, News, NodeState, Register, Store
from llm_orchestrator.store.journal import decode
from llm_orchestrator.store.memory import MemoryStore
from tests.unit.engine.support import VirtualClock, Work, WorkStep, stored
from tests.unit.steps.support import Shelf

_whose: ContextVar[str] = ContextVar("whose", default="")


class _Proxy:
    """Passes every call on, after `desk` has let it through."""

    def __init__(self, desk: Desk, target: object) -> None:
        self._desk = desk
        self._target = target

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._target, name)

        async def call(*arguments: Any, **named: Any) -> Any:
            if name == "close":  # ours to do, wherever the server is
                return await method(*arguments, **named)
            await self._desk.pass_through(name)
            result = await method(*arguments, **named)
            await self._desk.pass_through("")
            return result

        return call


class Desk:
    """One node's way to the store."""

    def __init__(self, store: MemoryStore, node_id: str) -> None:
        self.node_id = node_id
        self.generation, self.incarnation = store.generation, store.incarnation
        self.is_cut = self.is_deaf = False
        self.troubles: dict[str, int] = {}
        """How many of the next calls of a method (or of "any") find the store away."""
        self.asked: list[str] = []
        self._store = store
        self._through = _Proxy(self, store)
        self.look = _Proxy(self, store.look)
        self.shelf = _Proxy(self, store.shelf)
        self.hold: asyncio.Event | None = None
        """Commits wait for it before they are tried."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._through, name)

    async def pass_through(self, name: str) -> None:
        if self.is_cut:
            await asyncio.get_running_loop().create_future()
        if not name:
            return
        self.asked.append(name)
        for key in (name, "any"):
            if self.troubles.get(key, 0) > 0:
                self.troubles[key] -= 1
                raise StoreUnavailable(f"{name}: as the test says")

    async def commit(self, batch: Batch) -> Any:
        if self.hold is not None:
            await self.hold.wait()
        return await self._through.commit(batch)

    async def members(self) -> Any:
        await self.pass_through("members")
        return _Proxy(self, await self._store.members())

    def on_news(self, listener: Callable[[News], None]) -> None:
        def heard(news: News) -> None:
            if not self.is_cut and not self.is_deaf:
                listener(news)

        self._store.on_news(heard)


@dataclass
class Home:
    """A node with what belongs to it."""

    node: Node
    desk: Desk
    work: Work
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)


class House:
    """The store, the nodes, and what the journals say in the end."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.store = MemoryStore(self.clock)
        self.homes: dict[str, Home] = {}
        self._tasks: dict[str, set[asyncio.Task[Any]]] = {}
        asyncio.get_running_loop().set_task_factory(cast("Any", self._make_task))

    def _make_task(self, loop: Any, work: Coroutine[Any, Any, Any], **more: Any) -> Any:
        task = asyncio.Task(work, loop=loop, **more)
        if _whose.get():
            self._tasks.setdefault(_whose.get(), set()).add(task)
        return task

    def make(self, name: str, **options: Any) -> Home:
        """A node that is not started."""
        desk, work = Desk(self.store, name), Work()
        tools = Tools(
            StepTypes(extra=(work,)), Templates(), Shelf(), str, _nothing, {"work": WorkStep}
        )
        flows = Flows(cast("Any", desk.shelf), lambda: tools)
        options = {"heart": "task", **options}
        node = Node(cast("Store", desk), self.clock, flows, options=NodeOptions(**options))
        home = self.homes[name] = Home(node, desk, work, self._tasks.setdefault(name, set()))
        return home

    async def begin(self, name: str, **options: Any) -> Home:
        """A node that serves the store. Its tasks can be told from other nodes'."""
        home = self.make(name, **options)
        await self.as_node(name, home.node.start())
        return home

    async def as_node(self, name: str, work: Coroutine[Any, Any, Any]) -> Any:
        """Do something within a node's process, so that it dies with it."""
        token = _whose.set(name)
        try:
            return await asyncio.get_running_loop().create_task(work)
        finally:
            _whose.reset(token)

    async def crash(self, name: str, *, is_closed: bool = True) -> None:
        """kill -9: nothing more is said or done. `is_closed`: the server sees its session end."""
        home = self.homes[name]
        home.desk.is_cut = True
        tasks = [task for task in home.tasks if not task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if is_closed:
            self.close_session(home.node.node_id)

    def close_session(self, node_id: str) -> None:
        """The server no longer has the session from which the node beat last."""
        self.store.nodes[node_id] = self.store.nodes[node_id]._replace(is_connected=False)

    async def bury(self, node_id: str) -> None:
        """Somebody declares a node dead, rightly or not."""
        members = await self.store.members()
        assert await members.bury(node_id, self.store.nodes[node_id].beat)

    async def accept(self, made: Definition, **fields: Any) -> str:
        """A client accepts a run; whichever node is there drives it."""
        options = {"queue": made.queue, "priority": made.priority, **fields}
        run_id = options.pop("run_id", None) or new_run_id(self.clock)
        new = NewRun(run_id, made.name, made.version, made.digest, input={}, **options)
        return await Operator(self.store, self.clock).accept(new, register=stored(made))

    async def register(self, made: Definition) -> None:
        """Keep a definition."""
        await self.store.commit(Batch(changes=(Register(stored(made)),)))

    async def fold(self, run_id: str) -> Fold:
        """What the run's journal says; it is whole."""
        journal = (await self.store.look.load([run_id]))[run_id]
        assert list(journal.flaws) == []
        return fold(run_id, journal.entries)

    async def payloads(self, run_id: str, kind: str) -> list[Json]:
        """Every entry of a kind."""
        entries = await self.store.look.stored(run_id)
        return [decode(entry.payload) for entry in entries if entry.kind == kind]

    async def finished(self, run_id: str) -> list[str]:
        """Steps, as often as the journal says that they finished."""
        entries = await self.store.look.stored(run_id)
        return [entry.step for entry in entries if entry.kind == "step_finished"]

    async def until(self, happens: Callable[[], Any]) -> None:
        """Let time pass until something is so; a test that hangs is ended by the virtual loop."""
        while not happens():
            await self.clock.sleep(0.01)

    async def ends(self, run_id: str, state: str = "completed") -> Fold:
        """Until the run has come to rest, which must be in `state`."""
        ends = ("completed", "failed", "cancelled", "paused")
        await self.until(lambda: self.store.tables.runs[run_id].change.state in ends)
        found = await self.fold(run_id)
        assert found.state == state, (found.state, found.reason, found.error)
        return found

    def row_state(self, run_id: str) -> str:
        """What the row of a run says. (A refused commit puts other tables in place: ask anew.)"""
        return self.store.tables.runs[run_id].change.state

    def state_of(self, node_id: str) -> NodeState | None:
        """How a node stands to the others."""
        member: Member | None = self.store.nodes.get(node_id)
        return NodeState(member.state) if member is not None else None

    async def stop(self) -> None:
        """End every node that has not crashed."""
        for home in self.homes.values():
            if not home.desk.is_cut:
                await home.node.stop()


async def _nothing() -> None: ...

"""Nodes whose connections are stepped, and trials: one order of one scenario each."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg  # type: ignore[import-untyped]

from llm_orchestrator.store.base import Append, Batch, Members, News, TrimCommits
from llm_orchestrator.store.postgres import PostgresStore
from llm_orchestrator.store.postgres_connect import Connection
from llm_orchestrator.store.queries import load_queries
from tests.store.interleavings.driver import Driver, Session, in_place
from tests.store.interleavings.planted import Plant, nothing
from tests.store.interleavings.stepper import (
    Act,
    Broken,
    Report,
    Schedule,
    Standby,
    Stepping,
    Turns,
)
from tests.store.support import START_US, HandClock, new_run

NOW_US = START_US + 20 * 365 * 86_400_000_000
"""What every node's clock shows: ahead of any server's, as the store's time never goes back."""
_TABLES = ("journal", "runs", "inbox", "records", "progress", "blobs", "commits", "nodes")


class _Mute:
    """No bell: who is told what is another test's matter."""

    def ring(self, news: News) -> None:
        pass

    async def close(self) -> None:
        pass


class Node(PostgresStore):
    """A node's store, as it ships, on connections that are stepped."""

    def __init__(self, node_id: str, driver: Driver) -> None:
        super().__init__(f"postgresql://{node_id}/stepped", node_id=node_id, clock=HandClock())
        self.driver = driver
        self._bell = _Mute()  # type: ignore[assignment]

    async def start(self) -> None:
        """Open it, with all its connections."""
        await self.open()
        self.clock.set(NOW_US)
        self.heart: Members = await self.members()
        self.session: Session = await self.driver.connect({})
        """For statements of the scenario's own."""
        await self.connect()

    async def connect(self) -> None:
        """Connect what connects at first use, so that no order begins with that."""
        await self.commit(Batch(changes=[TrimCommits()]))
        await self.commit(Batch(appends=[Append(new_run().run_id, 1, b"", ())]))
        await self.look.run(new_run().run_id)
        await self.heart.watch(self.node_id)
        self.driver.forget()

    async def give_up(self) -> None:
        """Close it, whatever it is in the middle of."""
        self.driver.turns.give_up()
        self.driver.close()
        await self.close()


class Trial:
    """One order of one scenario: make nodes, `run` what they do at once, look at what came of it.

    Outside `run` nobody asks for leave: the scenario sets the scene with the same nodes.
    """

    def __init__(self, world: World, schedule: Schedule, plant: Plant) -> None:
        self._world = world
        self._schedule = schedule
        self._plant = plant
        self.log: list[str] = []
        self.waited: set[str] = set()
        self.has_stopped = True
        """False when something was left in the middle."""
        self.store = world.store
        """A store that is not stepped: to set the scene, and to look at it afterwards."""
        self.database = world.monitor
        """A connection for statements of the scenario's own."""

    async def node(self, node_id: str, *, hangs: bool = False, is_whole: bool = False) -> Node:
        """A node. `hangs`: its commits wait for the standby.

        `is_whole`: no step between a statement and its commit, as in production: the server ends
        it by itself when the client is cut off.
        """
        node = await self._world.node(node_id)
        node.driver.turns.log = self.log
        if node.driver.is_cut:
            await node.connect()
        await node.driver.prepare(hangs=hangs, is_whole=is_whole)
        return node

    async def nodes(self, names: str) -> list[Node]:
        """One node for each letter. Their looks at what became of an append need no leave.

        From the third one on a statement and its commit are one step: that keeps the orders few.
        """
        nodes = [await self.node(name, is_whole=place > 1) for place, name in enumerate(names)]
        for node in nodes:
            node.driver.quiet |= {"found", "incarnation"}
        return nodes

    async def join(self, *node_ids: str) -> None:
        """Nodes that live."""
        query = load_queries("postgres")["join"]
        for node_id in node_ids:
            values = query.bind(node_id=node_id, region="", now=0, info="null")
            await self.database.execute(query.sql, *values)

    async def hold(self) -> None:
        """Let the commits of nodes that `hang` wait until the standby is released."""
        await self._world.standby.hold()

    @property
    def is_held(self) -> bool:
        """True while commits wait: nothing that nodes that `hang` write is safe yet."""
        return self._world.standby.is_held

    async def run(self, **acts: Act) -> dict[str, Any]:
        """Step the nodes of these names through this trial's order; what each act returns."""
        stepping, self.has_stopped = Stepping(self._world.standby, self._schedule, self.log), False
        turns = {name: (await self._world.node(name)).driver.turns for name in acts}
        for turn in turns.values():
            turn.is_free = False
        try:
            with self._plant():
                got = await stepping.run({name: (turns[name], act) for name, act in acts.items()})
            self.has_stopped = True
            return got
        finally:
            for turn in turns.values():
                turn.is_free = True
            self.waited |= stepping.waited
            await self._world.standby.release()

    # -- what happened -------------------------------------------------------------------------

    def position(self, line: str) -> int:
        """When somebody first did something; after everything else if never."""
        return self.log.index(line) if line in self.log else len(self.log)

    def last(self, name: str) -> int:
        """When somebody did something for the last time."""
        return max(place for place, line in enumerate(self.log) if line.startswith(f"{name}:"))

    def first_commit(self) -> str:
        """Who was the first to commit."""
        return next(line.partition(":")[0] for line in self.log if line.endswith("commit"))


Scenario = Callable[[Trial], Awaitable[Any]]


class World:
    """A database with the store's tables, and what tests need around it."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.store = PostgresStore(url, node_id="scene", clock=HandClock())
        self._nodes: dict[str, Node] = {}
        self._drivers: dict[str, Driver] = {}
        self._sockets: list[Any] = []
        self._exits = contextlib.ExitStack()

    async def open(self) -> None:
        self._exits.enter_context(in_place(self._drivers))
        await self.store.open()
        self.store.clock.set(NOW_US)
        settings = {"jit": "off", "synchronous_commit": "local"}
        self.monitor: Connection = await asyncpg.connect(self._url, server_settings=settings)
        self.probe: Connection = await asyncpg.connect(self._url)
        self.standby = Standby(self.monitor, self.probe, self._sockets)

    async def close(self) -> None:
        await self.standby.release()
        for node in self._nodes.values():
            await node.close()
        await self.store.close()
        for connection in (self.monitor, self.probe, *self._sockets):
            connection.terminate()
        self._exits.close()

    async def node(self, node_id: str) -> Node:
        """The node of that name: its connections are used again from trial to trial."""
        if node_id not in self._nodes:
            turns = Turns(node_id, [])
            driver = Driver(turns, self._url, self._sockets, is_patient=node_id == "a")
            self._drivers[node_id] = driver
            self._nodes[node_id] = Node(node_id, driver)
            await self._nodes[node_id].start()
        return self._nodes[node_id]

    async def explore(self, scenario: Scenario, plant: Plant = nothing) -> Report:
        """Every order of `scenario`, with a planted bug if one is given. Raises Broken."""
        report = Report()
        prefix: list[int] | None = []
        while prefix is not None:
            prefix = await self._try(scenario, plant, prefix, report=report)
            if report.broken:
                raise report.broken[0]
        return report

    async def find(self, scenario: Scenario, plant: Plant) -> list[Broken]:
        """Every order that breaks a promise."""
        report = Report()
        prefix: list[int] | None = []
        while prefix is not None:
            prefix = await self._try(scenario, plant, prefix, report=report)
        return report.broken

    async def _try(
        self, scenario: Scenario, plant: Plant, prefix: list[int], *, report: Report
    ) -> list[int] | None:
        """One order; the prefix of the next one."""
        await self.monitor.execute(";".join(f"DELETE FROM {table}" for table in _TABLES))
        schedule = Schedule(prefix)
        trial = Trial(self, schedule, plant)
        try:
            report.results.add(await scenario(trial))
        except Broken as broken:
            report.broken.append(Broken(f"{broken}\nin this order: {', '.join(trial.log)}"))
        finally:
            while self._nodes and not trial.has_stopped:
                await self._nodes.popitem()[1].give_up()
        report.orders += 1
        report.waited |= trial.waited
        return schedule.next_prefix()

"""A world: nodes, an operator, one database, a provider, and whatever the seed does to them.

First trouble (safety), then everything is healed and must come to an end (liveness).
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from dataclasses import dataclass, field
from typing import Any

from llm_orchestrator.engine.driver import NodeOptions
from llm_orchestrator.engine.flows import Flows
from llm_orchestrator.engine.lease import LeaseOptions
from llm_orchestrator.engine.node import Node
from llm_orchestrator.errors import OrchestratorError, StoreError
from tests.simulation.flows import Provider, make_flows
from tests.simulation.loop import Process, SimLoop, Stuck
from tests.simulation.model_store import SimDatabase, SimStore, on_simulated
from tests.simulation.oracle import Oracle
from tests.simulation.wire import Network

LEASE = LeaseOptions(heartbeat_s=0.6, lease_s=3.0, margin_s=0.5, look_s=0.4)
PATIENCE_S = 120.0
"""After healing every run must have ended within this."""


@dataclass
class Shape:
    """What a seed is made of. `mix` names the faults that may happen (nemesis.py)."""

    seed: int
    mode: str = "single"
    nodes: int = 3
    runs: int = 6
    trouble_s: float = 10.0
    mix: tuple[str, ...] = ()
    flows: tuple[str, ...] = ()
    rate: float = 1.0
    """Faults per second."""
    harm: float = 1.0
    """How much likelier than usual the faults of single messages are."""


@dataclass(eq=False)
class Machine:
    """A process with a store of its own, and a node if it is one."""

    process: Process
    store: SimStore | None = None
    node: Node | None = None
    tasks: list[asyncio.Task[Any]] = field(default_factory=list)
    stores: int = 0

    @property
    def incarnation(self) -> str:
        return "" if self.store is None else self.store.incarnation

    @property
    def lease_ends(self) -> float:
        """When this node must have stopped beginning effects, by the answers that it was given."""
        if self.node is None:
            return float("inf")
        return self.beaten.get(self.node.node_id, 0.0) + LEASE.lease_s

    beaten: dict[str, float] = field(default_factory=dict)
    """Node id to when its last answered beat was sent; as a living one."""


class World:
    """One seed."""

    def __init__(self, shape: Shape, *, is_verbose: bool = False) -> None:
        self.shape = shape
        self.random = random.Random(shape.seed)
        self.loop = SimLoop()
        self.trace: list[str] = []
        self._hash = hashlib.blake2b(digest_size=16)
        self._is_verbose = is_verbose
        self.oracle = Oracle(self.note, lambda: self.loop.now)
        self.network = Network(self.loop, self._seed())
        self.network.on_fault = lambda kind, who: self.note("fault", kind, who)
        self.database = SimDatabase(self.loop, self.network, seed=self._seed(), mode=shape.mode)
        self.database.oracle = self.oracle
        self.oracle.incarnation = self.database.incarnation
        self.provider = Provider(self, self._seed())
        self.flows = make_flows(self)
        self.machines: list[Machine] = []
        self.is_healed = False
        self.is_rewound = False
        """A restore may have taken away what an operator was told."""
        self._names = 0

    def _seed(self) -> int:
        return self.random.getrandbits(32)

    def note(self, *words: object) -> None:
        """A line of the trace."""
        line = f"{self.loop.now:10.4f} {' '.join(map(str, words))}"
        self._hash.update(line.encode())
        if self._is_verbose:
            self.trace.append(line)

    @property
    def digest(self) -> str:
        """Of the whole trace."""
        return self._hash.hexdigest()

    # -- machines --------------------------------------------------------------------------------

    def machine_of(self, process: Process) -> Machine:
        return next(each for each in self.machines if each.process is process)

    @property
    def nodes(self) -> list[Machine]:
        """Machines that are nodes and not dead."""
        return [m for m in self.machines if m.process.name[0] == "n" and not m.process.is_dead]

    def make_machine(self, letter: str) -> Machine:
        """A process with a clock of its own."""
        self._names += 1
        skew_s = self.random.choice((0.0, 0.0, -3600.0, 3600.0, self.random.uniform(-60, 60)))
        process = Process(f"{letter}{self._names}", self.loop, seed=self._seed(), skew_s=skew_s)
        machine = Machine(process)
        self.machines.append(machine)
        return machine

    def start_node(self) -> Machine:
        """A new node; it is tried again until the database lets it in."""
        machine = self.make_machine("n")
        self.note("node", machine.process.name, "starts")
        self.spawn(machine, self._boot(machine))
        return machine

    def spawn(self, machine: Machine, work: Any) -> None:
        """Run something as a machine's process; it must not fail."""

        def ended(task: asyncio.Task[Any]) -> None:
            if not task.cancelled() and task.exception() is not None:
                self.oracle.violated(f"{task.get_name()} failed: {task.exception()!r}")

        task = machine.process.spawn(work)
        task.add_done_callback(ended)
        machine.tasks.append(task)

    async def open_store(self, machine: Machine) -> SimStore:
        """The machine's store, opened; tried until it works."""
        while True:
            machine.stores += 1  # as in production, nobody ever has another one's id
            name = f"{machine.process.name}-{machine.stores}"
            store = SimStore(name, machine.process.clock, self.oracle)
            store.beaten = machine.beaten
            try:
                await store.open_as_engine()
            except StoreError:
                await machine.process.clock.sleep(0.5)
                continue
            machine.store = store
            return store

    async def _boot(self, machine: Machine) -> None:
        store = await self.open_store(machine)
        flows = Flows(store.shelf)
        for flow in self.flows:
            flows.add_code(flow)
        options = NodeOptions(heart="task", lease=LEASE, runs_max=self.random.choice((3, 50)))
        while True:
            node = Node(store, store.clock, flows, options=options)
            try:
                machine.node = node
                await node.start()
                return
            except StoreError as error:
                self.note("node", machine.process.name, "cannot start", error.message)
                machine.node = None
                await machine.process.clock.sleep(0.5)
                store = await self.open_store(machine)

    def kill(self, machine: Machine, *, after_s: float = 0.0) -> None:
        """kill -9; with `after_s`, its host is gone, and its sockets are noticed later."""
        self.note("kill", machine.process.name, f"{after_s:.1f}")
        machine.process.kill()
        self.database.lose(machine.process, after_s=after_s)

    def replace_all(self) -> None:
        """After a restore: every node is started anew, as its operator must."""
        for machine in self.nodes:
            self.kill(machine)
            self.start_node()

    # -- one seed --------------------------------------------------------------------------------

    async def _main(self) -> None:
        from tests.simulation.nemesis import Nemesis
        from tests.simulation.people import People

        people = People(self)
        nemesis = Nemesis(self)
        for _ in range(self.shape.nodes):
            self.start_node()
        people.start()
        await nemesis.torment(self.shape.trouble_s)
        nemesis.heal()
        self.is_healed = True
        self.note("healed")
        ends_at = self.loop.now + PATIENCE_S
        while self.loop.now < ends_at:
            await self.pause(0.7)
            is_early = "planned" in self.shape.flows and self.loop.now < 14.0
            if people.is_done and people.all_ended() and not is_early:
                break
        await self.pause(1.0)
        for complaint in self.loop.complaints:
            self.oracle.violated(f"asyncio complains: {complaint}")

    async def pause(self, seconds: float) -> None:
        """Let time pass for the world's own tasks."""
        future = self.loop.create_future()
        self.loop.in_world(seconds, future.set_result, None)
        await future

    def run(self) -> list[str]:
        """Play the seed; what was violated."""
        asyncio.set_event_loop(self.loop)
        try:
            with on_simulated(self.database):
                try:
                    self.loop.run_until_complete(self._main())
                except Stuck:
                    self.oracle.violated("nothing is scheduled any more")
                self.oracle.check(self.database.leader)
                self.note("end", len(self.oracle.issues), self.database.leader.identity)
                violations = list(self.oracle.violations)
                self._sweep()
        finally:
            asyncio.set_event_loop(None)
            self.loop.close()
        return violations

    def _sweep(self) -> None:
        """End every task of every process, dead ones too, so that nothing is left behind."""
        self.database.crash()
        for connection in self.database.connections:
            connection.terminate()
        for _ in range(20):
            tasks = [task for task in self.loop.tasks.values() if not task.done()]
            if not tasks:
                return
            for machine in self.machines:
                machine.process.release()
            for task in tasks:
                task.cancel()
            with_trouble = asyncio.gather(*tasks, return_exceptions=True)
            try:
                self.loop.run_until_complete(asyncio.wait_for(with_trouble, 5.0))
            except (TimeoutError, Stuck, OrchestratorError):
                continue

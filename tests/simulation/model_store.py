"""The simulated database, and the production store code on it.

`SimDatabase` owns the servers: at most two, of which one leads. `SimStore` is `PostgresStore` as it
is, with its lanes, barriers, judging, pool, bell and heart connection; only `asyncpg.connect` is
the simulation's, and the tables are there already. It tells the oracle what was acknowledged.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from llm_orchestrator.clock import Clock
from llm_orchestrator.model import Json
from llm_orchestrator.store.base import Batch, Pulse, Receipt, lives
from llm_orchestrator.store.postgres import PostgresStore
from llm_orchestrator.store.postgres_address import Address
from llm_orchestrator.store.postgres_members import PostgresMembers
from tests.simulation.loop import Process, SimLoop
from tests.simulation.server import Record, Server
from tests.simulation.wire import Network, SimConnection, current

if TYPE_CHECKING:
    from tests.simulation.oracle import Oracle

URL = "postgresql://sim@a,b/db"


class SimDatabase:
    """See the module's docstring. `mode`: single, sync (a standby that commits wait for)."""

    def __init__(self, loop: SimLoop, network: Network, *, seed: int, mode: str) -> None:
        self.loop = loop
        self.network = network
        self.random = random.Random(seed)
        self.mode = mode
        self.oracle: Oracle | None = None
        self._numbers = itertools.count(1)
        self.connections: list[SimConnection] = []
        self.is_settling = False
        """An old leader does not know yet that it is none: there is no standby."""
        first = Server("a", loop, seed=seed, has_standby=mode == "sync")
        self.leader = first
        self.servers = {"a": first}
        first.log.append([("store", 1, (f"{self.random.getrandbits(64):016x}", 1))])
        first.restart()
        first.copied = 1
        first.on_visible, first.on_defect = self._visible, self._defect

    @property
    def incarnation(self) -> str:
        """Of the leader's store."""
        found: str = self.leader.tables.table("store")[1].versions[-1][1][0]
        return found

    def _visible(self, server: Server, record: Record) -> None:
        if self.oracle is not None and server is self.leader:
            self.oracle.committed(record)

    def _defect(self, what: str) -> None:
        if self.oracle is not None:
            self.oracle.violated(what)

    # -- connecting ------------------------------------------------------------------------------

    async def connect(self, dsn: str, *, timeout: float, **options: Any) -> SimConnection:
        """What asyncpg.connect is."""
        process = current()
        server = self.servers.get("b" if "@b" in dsn else "a")
        if server is None:
            raise ConnectionRefusedError("nobody listens there")
        wait_s = 2 * self.network.arrival(process, server)
        await process.clock.sleep(min(wait_s, timeout))
        if wait_s > timeout:
            raise TimeoutError("no answer in time")
        if not server.is_up:
            raise ConnectionRefusedError("the server is down")
        settings = options.get("server_settings") or {}
        is_local = settings.get("synchronous_commit") == "local"
        session = server.accept(next(self._numbers), is_local=is_local)
        connection = SimConnection(self.network, process, session)
        self.connections = [each for each in self.connections if not each.is_closed()]
        self.connections.append(connection)
        return connection

    def lose(self, process: Process, *, after_s: float) -> None:
        """A process is gone: its sockets close, sooner or later."""
        for connection in self.connections:
            if connection.process is process and not connection.is_closed():
                connection.break_off(after_s)

    # -- what befalls servers ----------------------------------------------------------------------

    def crash(self) -> None:
        """The leader's process dies; `restart` recovers it."""
        self._fell(self.leader)

    def _fell(self, server: Server) -> None:
        server.crash()
        for connection in self.connections:
            if connection.server is server:
                self.loop.in_world(self.network.delay(), connection.server_died)

    def restart(self) -> None:
        """Recovery reveals what hung."""
        if not self.leader.is_up:
            self.leader.restart()
            self._changed()

    def promote(self, *, linger_s: float) -> None:
        """The standby takes over with what it has; the old leader does not know it for a while."""
        old = self.leader
        self.is_settling = True
        name = "b" if old.name == "a" else "a"
        new = Server(
            name,
            self.loop,
            seed=self.random.getrandbits(32),
            timeline=old.timeline + 1,
            has_standby=True,
        )
        new.start = old.start + 1
        new.log = old.log[: old.copied]
        new.slowness, new.clock_us = old.slowness, old.clock_us + self.random.choice((0, 900_000))
        new.is_linked = False
        new.copied = len(new.log)
        new.restart()
        old.is_linked = False
        self.leader = self.servers[name] = new
        new.on_visible, new.on_defect = self._visible, self._defect
        self._changed()
        self.loop.in_world(linger_s, self._demote, old, new)

    def _demote(self, old: Server, new: Server) -> None:
        """The old leader is fenced and becomes the new one's standby."""
        self.is_settling = False
        if old.is_up:
            self._fell(old)
        old.is_leader = False
        old.log = new.log[:]
        old.restart()
        old.hanging.clear()
        old.has_standby = False
        new.link(is_linked=True)

    def rewind(self, keep: float) -> None:
        """Restore, or promote a standby that lagged: a part of the log is gone, acknowledged or
        not. The store is another one from now on, and every node is dead to it."""
        server = self.leader
        if server.is_up:
            self._fell(server)
        cut = max(1, int(len(server.log) * keep))
        del server.log[cut:]
        server.copied = 0
        server.restart()
        _, generation = server.tables.table("store")[1].versions[-1][1]
        record: Record = [("store", 1, (f"{self.random.getrandbits(64):016x}", generation + 1))]
        for node_id, cell in server.tables.table("nodes").items():
            if cell.versions and cell.versions[-1][1] is not None:
                record.append(("nodes", node_id, {**cell.versions[-1][1], "state": "dead"}))
        server.log.append(record)
        server.restart()
        self._changed(is_rewound=True)

    def _changed(self, *, is_rewound: bool = False) -> None:
        if self.oracle is not None:
            self.oracle.recovered(self.leader, is_rewound=is_rewound)


class SimMembers(PostgresMembers):
    """Notes which beats were answered, and when they were sent."""

    def __init__(self, address: Address, clock: Clock, beaten: dict[str, float]) -> None:
        super().__init__(address)
        self._clock = clock
        self._beaten = beaten

    async def join(self, node_id: str, region: str, info: Json) -> None:
        self._beaten[node_id] = self._clock.monotonic()
        await super().join(node_id, region, info)

    async def beat(self, node_id: str, info: Json) -> Pulse:
        sent_at = self._clock.monotonic()
        pulse = await super().beat(node_id, info)
        if any(member.node_id == node_id and lives(member) for member in pulse.members):
            self._beaten[node_id] = sent_at
        return pulse


class SimStore(PostgresStore):
    """One process's store."""

    def __init__(self, node_id: str, clock: Clock, oracle: Oracle) -> None:
        super().__init__(URL, node_id=node_id, clock=clock)
        self._oracle = oracle
        self.beaten: dict[str, float] = {}
        """Node id to when its last answered beat was sent, while it lived."""

    async def members(self) -> SimMembers:
        return SimMembers(self._direct, self.clock, self.beaten)

    async def commit(self, batch: Batch) -> Receipt:
        receipt = await super().commit(batch)
        self._oracle.acknowledged(self.incarnation, batch, receipt)
        return receipt


async def _prepare(connection: Any, *_: Any, **__: Any) -> tuple[str, int, str]:
    row = await connection.fetchrow("SELECT incarnation, generation FROM store")
    return row[0], row[1], "primary"


async def _prepare_vectors(_: Any) -> bool:
    return False


@contextmanager
def on_simulated(database: SimDatabase) -> Iterator[None]:
    """Every connection of the store goes to this database."""
    with (
        patch("asyncpg.connect", database.connect),
        patch("llm_orchestrator.store.postgres.prepare", _prepare),
        patch("llm_orchestrator.store.postgres.prepare_vectors", _prepare_vectors),
    ):
        yield

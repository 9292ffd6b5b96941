"""Trouble, by chance and by the seed's mix; and its end."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.simulation.server import Server
    from tests.simulation.world import World

MESSAGES = {
    "before": 0.02,
    "after": 0.02,
    "late": 0.012,
    "slow": 0.012,
    "lost_news": 0.3,
    "twin_news": 0.2,
}
"""Faults of single messages, and how likely each is when a seed has it."""
EVENTS = ("kill", "freeze", "cut", "crash", "standby", "promote", "cancel_wait", "rewind", "clock")


class Nemesis:
    """See the module's docstring."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.random = random.Random(world.random.getrandbits(32))
        mix = world.shape.mix
        harm = world.shape.harm
        faults = {kind: min(0.9, harm * MESSAGES[kind]) for kind in MESSAGES if kind in mix}
        world.network.faults = faults
        world.provider.trouble = 0.15 if "provider" in mix else 0.0
        world.provider.is_slow = "slow_provider" in mix
        if "slow_statements" in mix:
            world.database.leader.slowness = 0.02
        self.events = [kind for kind in EVENTS if kind in mix]

    async def torment(self, seconds: float) -> None:
        """Let things happen for a while."""
        world = self.world
        ends_at = world.loop.now + seconds
        while world.loop.now < ends_at:
            await world.pause(self.random.expovariate(world.shape.rate))
            if self.events and world.loop.now < ends_at:
                await self._strike(self.random.choice(self.events))

    async def _strike(self, kind: str) -> None:
        world, database = self.world, self.world.database
        world.note("nemesis", kind)
        if kind == "kill" and world.nodes:
            victim = self.random.choice(world.nodes)
            world.kill(victim, after_s=self.random.choice((0.0, 0.0, 8.0)))
            world.loop.in_world(self.random.uniform(0.0, 3.0), self._start_another)
        elif kind == "freeze" and world.nodes:
            victim = self.random.choice(world.nodes)
            victim.process.freeze()
            seconds = self.random.choice((0.3, 2.0, 4.0, 7.0))
            world.note("freeze", victim.process.name, seconds)
            world.loop.in_world(seconds, victim.process.thaw)
        elif kind == "cut":
            self._cut()
        elif kind == "crash":
            await self._crash()
        elif kind == "clock":
            database.leader.clock_us += self.random.choice((-700_000, 700_000, 2_000_000))
        elif kind == "standby" and database.mode == "sync":
            leader = database.leader
            leader.link(is_linked=False)
            world.loop.in_world(self.random.choice((0.1, 1.0, 7.0)), self._link, leader)
        elif kind == "cancel_wait" and database.mode == "sync":
            world.note("cancelled", database.leader.cancel_waits())
        elif kind == "promote" and database.mode == "sync" and database.leader.is_up:
            await self._promote()
        elif kind == "rewind" and database.leader.is_up:
            await self._rewind()

    def _link(self, leader: Server) -> None:
        """Its standby comes back to it, unless it leads meanwhile."""
        database = self.world.database
        if leader is database.leader and not database.is_settling:
            leader.link(is_linked=True)

    def _start_another(self) -> None:
        if len(self.world.nodes) < self.world.shape.nodes:
            self.world.start_node()

    def _cut(self) -> None:
        """One process does not reach one server for a while."""
        world = self.world
        machine = self.random.choice(world.machines)
        until = world.loop.now + self.random.choice((0.5, 3.0, 6.0))
        where = (machine.process.name, world.database.leader.name)
        world.network.cut[where] = until
        world.note("cut", *where, f"{until:.2f}")

    async def _crash(self) -> None:
        self.world.database.crash()
        await self.world.pause(self.random.choice((0.05, 1.0, 4.0)))
        self.world.database.restart()

    async def _promote(self) -> None:
        database = self.world.database
        if database.is_settling:
            return  # there is no other one
        if self.random.random() < 0.5:  # often the leader falls first, or loses its standby
            database.leader.link(is_linked=False)
            await self.world.pause(self.random.uniform(0.0, 0.5))
        linger_s = self.random.choice((0.0, 0.5, 4.0))
        self.world.note("promote", f"{linger_s:.1f}")
        database.promote(linger_s=linger_s)

    async def _rewind(self) -> None:
        world = self.world
        world.note("rewind")
        world.is_rewound = True
        world.database.rewind(self.random.choice((0.5, 0.9, 0.99)))
        world.oracle.incarnation = world.database.incarnation
        await world.pause(self.random.uniform(0.1, 4.0))
        world.replace_all()

    def heal(self) -> None:
        """Nothing bad happens any more, and what can be put right is."""
        world = self.world
        world.network.faults = {}
        world.network.cut.clear()
        world.provider.trouble = 0.0
        for server in world.database.servers.values():
            server.slowness = 0.0
        world.database.restart()
        if not world.database.is_settling:
            world.database.leader.link(is_linked=True)
        for machine in world.machines:
            machine.process.thaw()
        while len(world.nodes) < 2:
            world.start_node()

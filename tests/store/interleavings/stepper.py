"""Several sessions on one real server, stepped through every order in which they can meet.

An actor is a coroutine that asks for leave before each statement and each commit (`Turns.step`). An
order is a sequence of leaves. `World.explore` runs a scenario once for each order that there is:
it follows a prefix, then always lets the first one go that can, and comes back for the others
(stateless search, depth first). No order is listed by hand and none comes twice.

After each leave everything is given the time to come to rest: every actor has asked for its next
leave, has ended, or waits in the server for somebody who is at rest. That is asked of the server
(`pg_blocking_pids`, the wait event of a commit that waits for its standby), never guessed by time.

BEGIN is no step: in READ COMMITTED a snapshot is a statement's own, so that an order of BEGINs
changes nothing (`test_stepper` proves it).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_ORDER_S = 20.0
_SOON_S = 0.003
"""After this time of silence the server is asked what its sessions wait for."""
STEPPED = "stepped"
"""The application name of every session that is stepped."""
_WAITS = f"""
SELECT pid, wait_event IS NOT DISTINCT FROM 'SyncRep',
       CASE WHEN wait_event_type = 'Lock' THEN pg_blocking_pids(pid) END
FROM pg_stat_get_activity(NULL) WHERE application_name = '{STEPPED}'"""


class Broken(AssertionError):
    """A promise did not hold in one order."""


def expect(is_kept: bool, promise: str) -> None:
    """Raise Broken, in words, unless a promise was kept."""
    if not is_kept:
        raise Broken(promise)


class Turns:
    """One actor's leaves: it asks, the trial grants."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.pid = 0
        """Of the session that it uses now."""
        self.log = log
        self._wish = ""
        self._leave: asyncio.Future[None] | None = None
        self.is_free = True
        """True while it need not ask: before and after the part that is stepped."""
        self.tell: Callable[[], None] = lambda: None
        """Called when it asks."""

    @property
    def is_asking(self) -> bool:
        return self._leave is not None

    async def step(self, wish: str) -> None:
        """Wait for leave to do `wish`."""
        if self.is_free:
            return
        self._wish = wish
        self._leave = asyncio.get_running_loop().create_future()
        self.tell()
        await self._leave

    def give_up(self) -> None:
        """Let nobody wait for a leave that will not come."""
        self.is_free = True
        if self._leave is not None:
            self._leave.cancel()

    def grant(self) -> None:
        assert self._leave is not None
        self.log.append(f"{self.name}: {self._wish}")
        leave, self._leave = self._leave, None
        if not leave.done():
            leave.set_result(None)


@dataclass
class Waits:
    """Who waits in the server: for a lock (and for whom), or with a commit for a standby."""

    blockers: dict[int, list[int]] = field(default_factory=dict)
    commits: set[int] = field(default_factory=set)
    alive: set[int] = field(default_factory=set)
    """Sessions whose client is there."""
    orphans: set[int] = field(default_factory=set)
    """Sessions whose client is gone; the server may still be at work for them."""

    def is_stuck(self, pid: int, resting: frozenset[int], path: tuple[int, ...] = ()) -> bool:
        """True when `pid` cannot go on before somebody who is at rest does something."""
        if pid in self.commits:
            return True
        if pid in path or pid not in self.blockers:  # a deadlock: the server will end it; or busy
            return False
        path = (*path, pid)
        return all(
            other in resting or self.is_stuck(other, resting, path) for other in self.blockers[pid]
        )


class Standby:
    """The standby that a server waits for and that never comes: commits can be held at will."""

    def __init__(self, monitor: Any, probe: Any, sockets: Sequence[Any]) -> None:
        self._monitor = monitor
        self._probe = probe
        """A session whose commits wait for a standby: where it hangs, so do all others."""
        self._sockets = sockets
        """Every connection that is stepped, or was."""
        self._task: asyncio.Task[None] | None = None
        self._pid: int = probe.get_server_pid()

    @property
    def is_held(self) -> bool:
        return self._task is not None

    async def waits(self) -> Waits:
        """A look into the server."""
        alive = {one.get_server_pid() for one in self._sockets if not one.is_closed()}
        found = Waits(alive=alive)
        for pid, is_commit, behind in await self._monitor.fetch(_WAITS):
            if is_commit:
                found.commits.add(pid)
            elif behind:
                found.blockers[pid] = behind
            if pid not in alive:
                found.orphans.add(pid)
        return found

    def may_have_orphans(self) -> bool:
        """True when a client was cut off."""
        return any(one.is_closed() for one in self._sockets)

    async def hold(self) -> None:
        """From now on commits with `synchronous_commit = on` hang, durable here, seen by nobody."""
        assert self._task is None
        await self._set("'nobody'")
        self._task = asyncio.create_task(self._commit_until_released())
        while await self._hanging(self._pid) == 0:
            pass

    async def release(self) -> None:
        """Let them all end."""
        if self._task is not None:
            task, self._task = self._task, None
            await self._set("''")
            await task
            while await self._hanging(0):
                pass

    async def _commit_until_released(self) -> None:
        while self._task is not None:
            await self._probe.execute("SELECT pg_logical_emit_message(true, '', '')")

    async def _hanging(self, pid: int) -> int:
        count: int = await self._monitor.fetchval(
            "SELECT count(*) FROM pg_stat_get_activity(NULL) "
            "WHERE wait_event = 'SyncRep' AND $1 IN (0, pid)",
            pid,
        )
        return count

    async def _set(self, names: str) -> None:
        await self._monitor.execute(f"ALTER SYSTEM SET synchronous_standby_names = {names}")
        await self._monitor.execute("SELECT pg_reload_conf()")


@dataclass
class Report:
    """What came of all orders of a scenario."""

    orders: int = 0
    results: set[Any] = field(default_factory=set)
    waited: set[str] = field(default_factory=set)
    """Actors that had to wait for another one in some order."""
    broken: list[Broken] = field(default_factory=list)


class Schedule:
    """One order: a prefix of choices, then always the first."""

    def __init__(self, prefix: list[int]) -> None:
        self._prefix = prefix
        self.taken: list[tuple[int, int]] = []
        """(chosen, out of how many)"""

    def choose(self, count: int) -> int:
        place = len(self.taken)
        chosen = self._prefix[place] if place < len(self._prefix) else 0
        if chosen >= count:
            raise AssertionError("the same order went another way: the scenario is not repeatable")
        self.taken.append((chosen, count))
        return chosen

    def next_prefix(self) -> list[int] | None:
        """The prefix of the order after this one; None when this was the last."""
        taken = list(self.taken)
        while taken and taken[-1][0] + 1 == taken[-1][1]:
            taken.pop()
        if not taken:
            return None
        return [*(chosen for chosen, _ in taken[:-1]), taken[-1][0] + 1]


Act = Callable[[], Awaitable[Any]]


class Stepping:
    """Runs actors in one order until all have ended."""

    def __init__(self, standby: Standby, schedule: Schedule, log: list[str]) -> None:
        self._standby = standby
        self._schedule = schedule
        self._log = log
        self._turns: dict[str, Turns] = {}
        self._tasks: dict[str, asyncio.Future[Any]] = {}
        self._change = asyncio.Event()
        self._is_hanging = False
        """A commit hangs, and may be released."""
        self.waited: set[str] = set()
        """Actors that had to wait for a lock."""

    async def run(self, actors: Mapping[str, tuple[Turns, Act]]) -> dict[str, Any]:
        """What each actor returns. Raises Broken when they wait for ever, and what they raise."""
        for name, (turns, act) in actors.items():
            turns.tell = self._change.set
            self._turns[name] = turns
            self._tasks[name] = asyncio.ensure_future(act())
            self._tasks[name].add_done_callback(lambda _: self._change.set())
        try:
            async with asyncio.timeout(_ORDER_S):
                while not await self._have_ended():
                    await self._go_on()
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        return {name: task.result() for name, task in self._tasks.items()}

    async def _have_ended(self) -> bool:
        """Let everything come to rest."""
        waits = Waits()
        while (moving := self._moving()) or self._standby.may_have_orphans():
            if moving and await self._changes():
                continue
            waits = await self._standby.waits()
            if moving != self._moving():
                continue
            busy = {self._turns[name].pid for name in moving}
            resting = frozenset(waits.alive - busy)
            if all(waits.is_stuck(pid, resting) for pid in busy | waits.orphans):
                break
        self.waited |= {name for name in moving if self._turns[name].pid in waits.blockers}
        self._is_hanging = self._standby.is_held and bool(waits.commits)
        is_asking = any(turns.is_asking for turns in self._turns.values())
        return not moving and not is_asking and not waits.orphans

    async def _changes(self) -> bool:
        """True when an actor asks or ends soon: then nobody needs to ask the server."""
        self._change.clear()
        try:
            async with asyncio.timeout(_SOON_S):
                await self._change.wait()
        except TimeoutError:
            return False
        return True

    async def _go_on(self) -> None:
        asking = [turns for turns in self._turns.values() if turns.is_asking]
        count = len(asking) + int(self._is_hanging)
        assert count, "everybody waits, for ever"
        chosen = self._schedule.choose(count)
        if chosen < len(asking):
            asking[chosen].grant()
        else:
            self._log.append("standby: release")
            await self._standby.release()

    def _moving(self) -> frozenset[str]:
        """Actors that have leave and have not used it up yet."""
        return frozenset(
            name
            for name, turns in self._turns.items()
            if not turns.is_asking and not self._tasks[name].done()
        )

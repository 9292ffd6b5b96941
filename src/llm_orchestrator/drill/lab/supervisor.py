"""The one process that owns a lab: makes everything, and starts again what dies.

`python -m llm_orchestrator.drill.lab.supervisor FOLDER DESCRIPTOR`, started by `lab.up`, which has
written lab.json and hands over the lock (an open file). It must never do anything that `lab.down`
could not undo without it: it may be killed at any moment. Its children die with it, except
PostgreSQL, which is Patroni's child; `lab.down` finds that by its folder.

A child that dies is started again after half a second, unless a file HOST/PROCESS.hold or HOST/hold
is there; that is how a drill keeps a host dead.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import aiohttp

from llm_orchestrator.clock import Clock, RealClock
from llm_orchestrator.drill.lab import io_shim, tools
from llm_orchestrator.drill.lab import state as states
from llm_orchestrator.drill.lab.host import DISK
from llm_orchestrator.drill.lab.network import Network
from llm_orchestrator.drill.lab.reach import client_of, get
from llm_orchestrator.drill.lab.servers import BARMAN_SERVER, Command, make_command
from llm_orchestrator.drill.lab.spec import DATABASE, Place
from llm_orchestrator.drill.lab_process import LabError, as_account, may, own

RESTART_S = 0.5
_LOOK_S = 0.1
_LIMIT_S = 90.0
_FIRST = ("llm", "s3", "prometheus", "etcd")
_LOG_END = 1_500


class Keeper:
    """Keeps one process alive until it is cancelled. `folder`: the lab's."""

    def __init__(self, command: Command, folder: Path, clock: Clock) -> None:
        self.command = command
        self._folder = folder
        self._home = folder / command.place.name
        self._clock = clock
        self.restarts = 0
        self.ends = 0

    @property
    def log(self) -> Path:
        return self._home / f"{self.command.what}.log"

    async def keep(self) -> None:
        """Start it, wait until it dies, and again."""
        while True:
            while self._is_held():
                await self._clock.sleep(_LOOK_S)
            process = await self._start()
            if self._is_held():  # since we looked: whoever holds it has found nothing to kill
                process.kill()
            code = await process.wait()
            self.ends += 1
            self._note(0, code)
            await self._clock.sleep(RESTART_S)
            self.restarts += 1

    async def _start(self) -> asyncio.subprocess.Process:
        with self.log.open("ab") as log:
            told = self.command.told(states.lab_id(self._folder), self._folder)
            process = await asyncio.create_subprocess_exec(
                *self.command.argv(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**told, **states.read(self._home / f"{self.command.what}.env")},
                cwd=self._home,
                start_new_session=True,
            )
        self._note(process.pid, None)
        return process

    def _note(self, pid: int, code: int | None) -> None:
        facts = {"pid": pid, "restarts": self.restarts, "code": code}
        states.write(self._home / f"{self.command.what}.json", facts)

    def _is_held(self) -> bool:
        holds = (self._home / "hold", self._home / f"{self.command.what}.hold")
        return any(hold.exists() for hold in holds)


class Supervisor:
    """One lab, from nothing to ready, and for as long as it lives."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self._folder = folder
        self._clock = clock
        self._state = states.load(folder)
        self._plan = self._state.plan
        self._id = states.lab_id(folder)
        self._began = clock.monotonic()
        self._keepers: dict[str, Keeper] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._binaries = Path()

    async def run(self) -> None:
        """Make everything and keep it; returns only by failing, after it has said why."""
        try:
            await self._make()
        except (LabError, OSError, aiohttp.ClientError) as error:
            hint = getattr(error, "hint", None)
            self._state.phase = "failed"
            self._state.error = f"{error}" + (f" ({hint})" if hint else "")
            self._state.save(self._folder)
            raise
        self._state.phase = "ready"
        self._state.save(self._folder)
        await asyncio.gather(*self._tasks)

    # -- from nothing to ready ----------------------------------------------------------------

    async def _make(self) -> None:
        plan = self._plan
        if plan.spec.has_network:
            await asyncio.to_thread(Network(self._id, plan.places).make)
            self._done("network")
        if plan.running("patroni"):
            self._binaries = await asyncio.to_thread(tools.find_postgres, plan.spec.postgres)
            self._state.binaries = str(self._binaries)
            if not may("-x", self._folder):
                raise LabError(f"{self._folder}: PostgreSQL's user cannot reach this folder")
            if plan.spec.has_shim:
                await asyncio.to_thread(io_shim.build, self._folder)
        for place in plan.places:
            home = self._folder / place.name
            home.mkdir(mode=0o700)
            if {"patroni", "barman"} & set(place.runs):
                own(home)
            if "patroni" in place.runs:
                self._make_disk(home / DISK)
        for what in _FIRST:
            self._start(*self._plan.running(what), what=what)
        async with client_of(plan, timeout_s=1.0) as client:
            await self._bring_up(client)

    def _make_disk(self, disk: Path) -> None:
        disk.mkdir(mode=0o700)
        if size := self._plan.spec.disk_mb:
            tools.call(tools.find("mount"), "-t", "tmpfs", "-o", f"size={size}m", "lab", str(disk))
        own(disk)

    async def _bring_up(self, client: aiohttp.ClientSession) -> None:
        if self._plan.running("etcd"):
            await self._answer(client, "etcd")
            self._done("etcd")
            first, *others = self._plan.running("patroni")  # the first one is the primary
            self._start(first, what="patroni")
            await self._until(lambda: self._leads(client, first), "a primary", ("patroni",))
            self._start(*others, what="patroni")
            await asyncio.to_thread(self._make_database, first)
            self._done("primary database")
        self._start(*self._plan.running("barman"), what="barman")
        self._start(*self._plan.running("node"), what="node")
        await asyncio.gather(
            self._database_ready(client),
            *(self._ready(client, what) for what in ("llm", "s3", "prometheus", "node")),
            self._log_kept(),
        )

    def _start(self, *places: Place, what: str) -> None:
        for place in places:
            command = make_command(
                self._plan, place, what, folder=self._folder, binaries=self._binaries
            )
            keeper = self._keepers[command.name] = Keeper(command, self._folder, self._clock)
            self._tasks.add(asyncio.create_task(keeper.keep(), name=command.name))

    def _done(self, what: str) -> None:
        self._state.steps.append((round(self._clock.monotonic() - self._began, 1), what))
        self._state.save(self._folder)

    def _make_database(self, primary: Place) -> None:
        psql = str(self._binaries / "psql")
        where = ("-h", str(self._folder / primary.name), "-p", str(self._plan.ports["postgres"]))
        tools.call(
            *as_account(psql, "-XAtq", "--set=ON_ERROR_STOP=1", "-U", "postgres", *where),
            given=f"CREATE ROLE {DATABASE} LOGIN CREATEDB PASSWORD '{self._plan.password}';\n"
            f"CREATE DATABASE {DATABASE} OWNER {DATABASE};\n",
        )

    # -- waiting ------------------------------------------------------------------------------

    async def _ready(self, client: aiohttp.ClientSession, what: str) -> None:
        if self._plan.running(what):
            await self._answer(client, what)
            self._done({"node": "nodes", "llm": "fake LLM"}.get(what, what))

    async def _answer(self, client: aiohttp.ClientSession, what: str) -> None:
        async def all_do() -> bool:
            for keeper in self._keepers.values():
                command = keeper.command
                if command.what == what:
                    url = self._plan.url(command.place, what) + command.health
                    status, _ = await get(client, url)
                    if status != 200 and (command.health or not status):
                        return False
            return True

        await self._until(all_do, f"{what} that answers", (what,))

    async def _leads(self, client: aiohttp.ClientSession, place: Place) -> bool:
        return (await get(client, self._plan.url(place, "patroni") + "/primary"))[0] == 200

    async def _database_ready(self, client: aiohttp.ClientSession) -> None:
        members = self._plan.running("patroni")
        if not members:
            return

        async def is_whole() -> bool:
            _, cluster = await get(client, self._plan.url(members[0], "patroni") + "/cluster")
            found = cluster.get("members", [])
            is_sync = any(member.get("role") == "sync_standby" for member in found)
            states = [member.get("state") for member in found]
            return is_sync and sorted(states) == ["running", *["streaming"] * (len(members) - 1)]

        await self._until(is_whole, "standbys that stream", ("patroni",))
        self._done("standbys")

    async def _log_kept(self) -> None:
        places = self._plan.running("barman")
        if not places:
            return
        streaming = self._folder / places[0].name / "barman" / BARMAN_SERVER / "streaming"

        async def is_streamed() -> bool:
            return any(streaming.glob("*.partial"))

        await self._until(is_streamed, "log that Barman keeps", ("barman",))
        self._done("Barman")

    async def _until(
        self, look: Callable[[], Awaitable[bool]], what: str, kinds: Iterable[str]
    ) -> None:
        """Until `look` says so. Raises LabError, with a log's end."""
        end = self._clock.monotonic() + _LIMIT_S
        while self._clock.monotonic() < end:
            if await look():
                return
            self._check_keepers()
            if dead := self._dead(kinds):
                raise LabError(f"{dead.command.name} ends at once\n{_end_of(dead.log)}")
            await self._clock.sleep(_LOOK_S)
        logs = [keeper.log for keeper in self._keepers.values() if keeper.command.what in kinds]
        raise LabError(f"no {what} within {_LIMIT_S:.0f} s\n{_end_of(logs[0])}")

    def _check_keepers(self) -> None:
        for task in self._tasks:
            if task.done() and (error := task.exception()):
                raise LabError(f"{task.get_name()} cannot be started: {error}") from error

    def _dead(self, kinds: Iterable[str]) -> Keeper | None:
        """What died three times before it was ready."""
        kept = self._keepers.values()
        return next((k for k in kept if k.command.what in kinds and k.ends >= 3), None)


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-_LOG_END:] if log.exists() else ""


def main() -> None:
    """Entry point: the lab's folder, and the descriptor of the lock that is ours from now on.

    (Another one that it inherits, a socket, keeps the loopback network ours.)
    """
    folder, descriptor = Path(sys.argv[1]), int(sys.argv[2])
    lock = os.fdopen(descriptor, "r+", encoding="utf-8")  # open until we are gone
    os.set_inheritable(descriptor, False)
    states.sign(lock)
    asyncio.run(Supervisor(folder, RealClock()).run())


if __name__ == "__main__":
    main()

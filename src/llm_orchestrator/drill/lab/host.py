"""A host of the lab and what runs on it: found, cut off, frozen, killed, let go on.

A host's processes are those that work in its folder and are the lab's: they carry its mark in their
environment, or are PostgreSQL's (which writes its title over its environment). A shell that
somebody left in the folder is neither.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

from llm_orchestrator.drill.lab import state as states
from llm_orchestrator.drill.lab.network import Network
from llm_orchestrator.drill.lab.spec import Place
from llm_orchestrator.drill.lab_process import LabError, send, state, wait

MARK = "LLMO_LAB"
DISK = "disk"
DATA = f"{DISK}/pg"
"""Below a host's folder: what its database's disk is, and PostgreSQL's data folder on it."""
_PIECE = 1 << 20
_POSTGRES = "postgres"
_LIMIT_S = 20.0


def processes_of(folder: Path) -> list[int]:
    """The ids of all living processes of the lab that work in `folder` or below it, in order."""
    return sorted(
        int(place.name) for place in Path("/proc").glob("[0-9]*") if _is_ours(place, folder)
    )


def _is_ours(place: Path, folder: Path) -> bool:
    try:
        if not (place / "cwd").readlink().is_relative_to(folder):
            return False
        if (place / "comm").read_text().strip() == _POSTGRES:
            return True
        return f"{MARK}=".encode() in (place / "environ").read_bytes()
    except OSError:  # it is gone, a zombie, or somebody else's
        return False


def kill_all(folder: Path) -> None:
    """SIGKILL all that work below `folder`, also those born meanwhile. Raises LabError."""

    def are_dead() -> bool:
        pids = processes_of(folder)
        send(signal.SIGKILL, pids)
        return not pids

    if not wait(are_dead, _LIMIT_S):
        raise LabError(f"{folder}: its processes do not die: {processes_of(folder)}")


def freeze_all(find: Callable[[], list[int]]) -> None:
    """SIGSTOP all that `find` finds, also those born meanwhile. Raises LabError."""

    def are_frozen() -> bool:
        pids = find()
        send(signal.SIGSTOP, pids)
        return all(state(pid) in "TZX" for pid in pids) and pids == find()

    if not wait(are_frozen, _LIMIT_S):
        raise LabError(f"processes do not freeze: {find()}")


class Process:
    """One process that the supervisor keeps alive, by its name HOST/WHAT."""

    def __init__(self, folder: Path, host: str, what: str) -> None:
        self.name = f"{host}/{what}"
        self.log = folder / host / f"{what}.log"
        self._facts = folder / host / f"{what}.json"
        self._told = folder / host / f"{what}.env"
        self._holds = (folder / host / f"{what}.hold", folder / host / "hold")

    @property
    def pid(self) -> int:
        """Its process id; 0 while it does not run."""
        pid = int(states.read(self._facts).get("pid", 0))
        return pid if pid and state(pid) not in "XZ" else 0

    def _living(self) -> list[int]:
        pid = self.pid
        return [pid] if pid else []

    @property
    def restarts(self) -> int:
        """How often it was started again."""
        return int(states.read(self._facts).get("restarts", 0))

    @property
    def is_held(self) -> bool:
        """Whether it stays dead when it dies."""
        return any(hold.exists() for hold in self._holds)

    def kill(self, *, is_held: bool = False) -> None:
        """SIGKILL; within a second it is started again, unless `is_held`. Raises LabError."""
        if is_held:
            self._holds[0].touch()
        if pid := self.pid:
            send(signal.SIGKILL, [pid])
            if not wait(lambda: state(pid) in "XZ", _LIMIT_S):
                raise LabError(f"{self.name} does not die")

    def terminate(self) -> None:
        """SIGTERM: it may end in order."""
        send(signal.SIGTERM, self._living())

    def release(self) -> None:
        """The supervisor starts it again if it is dead."""
        self._holds[0].unlink(missing_ok=True)

    def freeze(self) -> None:
        """SIGSTOP it alone, without its children; it stands still after this. Raises LabError."""
        freeze_all(self._living)

    def tell(self, **environment: str) -> None:
        """Let its next start find these in its environment, besides what it is told anyhow."""
        states.write(self._told, environment)

    def thaw(self) -> None:
        """SIGCONT."""
        send(signal.SIGCONT, self._living())


class Host:
    """One host. What cuts its network raises LabError in a lab of loopback addresses."""

    def __init__(self, folder: Path, place: Place, network: Network | None) -> None:
        self.place = place
        self.name = place.name
        self.region = place.region
        self.address = place.address
        self.folder = folder / place.name
        self.processes = {what: Process(folder, place.name, what) for what in place.runs}
        self._network = network

    @property
    def network(self) -> Network:
        """The switch that it hangs on. Raises LabError."""
        if self._network is None:
            raise LabError(
                "this lab's hosts are loopback addresses: nothing can be cut",
                hint="run llmo lab up as root",
            )
        return self._network

    async def cut(self, *, says: bool = True, hears: bool = True) -> None:
        """Drop what it says, what it should hear, or both."""
        await asyncio.to_thread(self.network.cut, self.name, says=says, hears=hears)

    async def cut_from(self, other: str, *, both_ways: bool = True) -> None:
        """Drop what it says to one other host, and what that one says to it."""
        cut = self.network.cut_between
        await asyncio.to_thread(cut, self.name, other, both_ways=both_ways)

    async def lose(self, percent: int) -> None:
        """Lose so much of what it says and hears."""
        await asyncio.to_thread(self.network.lose, self.name, percent)

    async def refuse(self, port: int) -> None:
        """Answer whoever wants this TCP port with a reset, also who is connected."""
        await asyncio.to_thread(self.network.refuse, self.name, port)

    async def heal(self) -> None:
        """Everything gets through again. What was killed stays dead until `start`."""
        await asyncio.to_thread(self.network.heal_host, self.name)

    async def kill_all(self, *, is_held: bool = True) -> None:
        """SIGKILL everything that runs on it; it is dead until `start`, unless told otherwise."""
        if is_held:
            (self.folder / "hold").touch()
        await asyncio.to_thread(kill_all, self.folder)

    async def start(self) -> None:
        """Let the supervisor start everything again."""
        (self.folder / "hold").unlink(missing_ok=True)
        for process in self.processes.values():
            process.release()

    async def freeze(self) -> None:
        """SIGSTOP everything that runs on it."""
        await asyncio.to_thread(freeze_all, lambda: processes_of(self.folder))

    async def thaw(self) -> None:
        """SIGCONT everything that runs on it."""
        send(signal.SIGCONT, processes_of(self.folder))

    async def fill_disk(self) -> int:
        """Leave no byte free on its database's disk; how many were. Raises LabError without one."""
        if not (self.folder / DISK).is_mount():
            raise LabError(
                f"{self.name} has no disk of its own to fill", hint="LabSpec(disk_mb=...)"
            )
        return await asyncio.to_thread(_fill, self._ballast)

    async def free_disk(self) -> None:
        """Take away what `fill_disk` wrote."""
        self._ballast.unlink(missing_ok=True)

    @property
    def _ballast(self) -> Path:
        return self.folder / DISK / "ballast"

    @property
    def postmaster(self) -> int:
        """The id of PostgreSQL's first process here; 0 where there is none."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            pid = int((self.folder / DATA / "postmaster.pid").read_text().splitlines()[0])
            return pid if _is_ours(Path(f"/proc/{pid}"), self.folder) else 0
        return 0

    async def kill_postgres(self) -> None:
        """SIGKILL PostgreSQL's first process; its children end by themselves, Patroni lives."""
        if pid := self.postmaster:
            os.kill(pid, signal.SIGKILL)
            if not await asyncio.to_thread(wait, lambda: state(pid) in "XZ", _LIMIT_S):
                raise LabError(f"{self.name}: PostgreSQL does not die")

    async def freeze_postgres(self) -> None:
        """SIGSTOP PostgreSQL's first process and all its children; Patroni lives."""
        await asyncio.to_thread(freeze_all, lambda: processes_of(self.folder / DATA))


def _fill(path: Path) -> int:
    """Write until the disk is full; how many bytes that took."""
    with path.open("ab", buffering=0) as file:
        for size in (_PIECE, 4096, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass
        return file.tell()

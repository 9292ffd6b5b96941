"""A lab, by its folder: `up` makes it, `Lab.load` finds it again.

`up` clears whatever an earlier lab left in the folder, writes lab.json, starts the supervisor and
waits until it says ready. What goes wrong meanwhile ends in `down` (clear.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Self

import aiohttp

from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill.lab import io_shim, network, reach
from llm_orchestrator.drill.lab import state as states
from llm_orchestrator.drill.lab.clear import (
    SUPERVISOR,
    check_owner,
    clear,
    down,
    is_folder_ours,
    remove,
)
from llm_orchestrator.drill.lab.host import MARK, Host, Process
from llm_orchestrator.drill.lab.servers import BARMAN_CONFIG, LEDGER, S3_BUCKET, S3_KEY
from llm_orchestrator.drill.lab.spec import LabSpec, Plan, make_plan, settings
from llm_orchestrator.drill.lab_process import LabError, state, wait

UP_S = 150.0
_SOCKET_PATH_MAX = 107
_NET_PORT = 7_777
_SHIFTS = range(0, 50_000, 10_000)


class Lab:
    """A lab that is there. `hosts` and `endpoints` as the layout says (cluster.toml)."""

    def __init__(self, folder: Path, state: states.LabState) -> None:
        self.folder = folder
        self.plan = state.plan
        self.phase = state.phase
        self.steps = state.steps
        self.binaries = Path(state.binaries)
        has_network = self.plan.spec.has_network
        self.network = (
            network.Network(states.lab_id(folder), self.plan.places) if has_network else None
        )
        self.hosts = {place.name: Host(folder, place, self.network) for place in self.plan.places}

    @classmethod
    def load(cls, folder: Path | None = None) -> Self:
        """Find a lab that somebody made. Raises LabError."""
        where = (folder or states.default_folder()).resolve()
        return cls(where, states.load(where))

    # -- where it is --------------------------------------------------------------------------

    @property
    def supervisor(self) -> int:
        """The process id of who keeps it alive; 0 when nobody does."""
        return states.owner(self.folder)

    @property
    def endpoints(self) -> list[str]:
        """Where each orchestrator node answers HTTP."""
        return [self.plan.url(place, "node") for place in self.plan.running("node")]

    @property
    def store_url(self) -> str:
        """The store of the nodes."""
        if self.plan.spec.is_single:
            node = self.plan.running("node")[0]
            return f"sqlite:///{self.folder / node.name / 'runs.db'}"
        return self.plan.database_url

    @property
    def llm_url(self) -> str:
        """The fake LLM server, without a path."""
        return self._url("llm")

    @property
    def llm_ledger(self) -> Path:
        """What the fake LLM server was asked, a JSON line for each event."""
        return self.folder / self.plan.running("llm")[0].name / LEDGER

    @property
    def prometheus_url(self) -> str:
        """Empty in a lab without one."""
        return self._url("prometheus")

    @property
    def s3(self) -> Mapping[str, str]:
        """The object store: endpoint_url, access_key, secret_key, bucket; {} without one."""
        if not (url := self._url("s3")):
            return {}
        secret = self.plan.password
        return {
            "endpoint_url": url,
            "access_key": S3_KEY,
            "secret_key": secret,
            "bucket": S3_BUCKET,
        }

    @property
    def barman_config(self) -> Path | None:
        """For `barman -c`, and the setting `barman_config`; None in a lab without Barman."""
        places = self.plan.running("barman")
        return self.folder / places[0].name / BARMAN_CONFIG if places else None

    def _url(self, what: str) -> str:
        return next((self.plan.url(place, what) for place in self.plan.running(what)), "")

    # -- how to reach it ----------------------------------------------------------------------

    def connector(self) -> aiohttp.TCPConnector:
        """For an aiohttp session of this process that speaks from the client's host."""
        return reach.connector(self.plan)

    def command(self, *words: str, host: str = "client") -> list[str]:
        """`words` as a command that runs on a host of the lab: on the client's, if not told."""
        place = self.hosts[host].place if host in self.hosts else None
        return [*(network.prefix(place) if place else []), *words]

    def inside(self) -> contextlib.AbstractContextManager[None]:
        """As long as the block, this thread and what it starts are on the client's host.

        An event loop that is run in the block is there with all its sockets, threads, children.
        """
        return network.inside(reach.client_namespace(self.plan))

    # -- what it does -------------------------------------------------------------------------

    def process(self, name: str) -> Process:
        """By HOST/WHAT, such as a-node1/node. Raises LabError."""
        host, _, what = name.partition("/")
        found = self.hosts[host].processes.get(what) if host in self.hosts else None
        if found is None:
            known = [each.name for host in self.hosts.values() for each in host.processes.values()]
            raise LabError(f"the lab has no process {name}; it has {', '.join(known)}")
        return found

    async def calm(self) -> None:
        """Undo every fault: nothing is cut, frozen, held dead, full, or slow."""
        if self.network is not None:
            await asyncio.to_thread(self.network.heal)
        for host in self.hosts.values():
            await host.thaw()
            await host.free_disk()
            io_shim.clear(host.folder)
            await host.start()

    async def primary(self) -> str | None:
        """The host whose Patroni says that it leads; None while none does."""
        async with reach.client_of(self.plan, timeout_s=2.0) as client:
            places = self.plan.running("patroni")
            urls = [f"{self.plan.url(place, 'patroni')}/primary" for place in places]
            answers = await asyncio.gather(*(reach.get(client, url) for url in urls))
        pairs = zip(places, answers, strict=True)
        return next((place.name for place, (status, _) in pairs if status == 200), None)

    async def members(self) -> list[Mapping[str, Any]]:
        """The cluster as the first Patroni that answers tells it: name, role, state, lag."""
        async with reach.client_of(self.plan, timeout_s=2.0) as client:
            for place in self.plan.running("patroni"):
                url = self.plan.url(place, "patroni")
                status, cluster = await reach.get(client, f"{url}/cluster")
                if status == 200:
                    return list(cluster.get("members", []))
        return []


# --- up ---


def up(spec: LabSpec, folder: Path | None = None, *, tell: Callable[[str], None]) -> Lab:
    """Make a lab and wait until it is ready. Raises LabError; then nothing is left.

    `tell` is given each step as it is done.
    """
    if sys.platform != "linux":
        raise LabError("the lab needs Linux: namespaces, /proc, and signals that follow a parent")
    where = _prepare(folder or states.default_folder())
    lock = states.claim(where.folder)
    if lock is None:
        raise LabError(f"a lab lives in {where.folder} already", hint="llmo lab down")
    with lock:
        if (where.folder / states.STATE).exists():
            tell("clearing what an earlier lab left")
            clear(where.folder, has_lock=True)
        try:
            supervisor = _start(spec, where, lock)
        except BaseException:
            remove(where.folder, is_ours=where.is_ours)
            raise
    # It outlives us; until then somebody has to take note of its end.
    threading.Thread(target=supervisor.wait, name="lab supervisor", daemon=True).start()
    try:
        return _await(where.folder, supervisor, tell)
    except states.NoLab as error:  # somebody has; there may be another lab by now
        raise LabError(f"the lab in {where.folder} was taken down while it was made") from error
    except BaseException:
        down(where.folder)
        raise


class _Where:
    def __init__(self, folder: Path, *, is_ours: bool) -> None:
        self.folder = folder
        self.is_ours = is_ours


def _prepare(folder: Path) -> _Where:
    """A folder for the lab: new, empty, or one that a lab was in."""
    if folder.is_symlink():
        raise LabError(f"{folder} is a link", hint="llmo lab up --folder DIR")
    folder = folder.resolve()
    longest = len(os.fsencode(folder / "a-db1" / ".s.PGSQL.55432.lock"))
    if longest > _SOCKET_PATH_MAX:
        raise LabError(f"{folder}: too deep for sockets, whose paths have at most 107 bytes")
    is_new = not folder.exists()
    if is_new:
        folder.mkdir(mode=0o711, parents=True)
    check_owner(folder)
    content = {path.name for path in folder.iterdir()} - {states.OWNER}
    was_lab = (folder / states.STATE).exists()
    if content and not was_lab:
        raise LabError(f"{folder} is not empty, and no lab", hint="llmo lab up --folder DIR")
    is_ours = is_new or folder == states.default_folder().resolve()
    return _Where(folder, is_ours=is_ours or (was_lab and is_folder_ours(folder)))


def _start(spec: LabSpec, where: _Where, lock: IO[str]) -> subprocess.Popen[bytes]:
    claimed, plan = _on_paper(spec, where.folder)
    with claimed:
        states.LabState(plan, where.is_ours).save(where.folder)
        descriptors = (lock.fileno(), claimed.fileno())
        with (where.folder / states.LOG).open("ab") as log:
            return subprocess.Popen(
                [
                    *("env", f"{MARK}={states.lab_id(where.folder)}"),
                    *(sys.executable, "-m", SUPERVISOR),
                    *(str(where.folder), str(lock.fileno())),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=where.folder,
                start_new_session=True,
                pass_fds=descriptors,
            )


def _on_paper(spec: LabSpec, folder: Path) -> tuple[socket.socket, Plan]:
    """The plan, and a socket that keeps the loopback network ours as long as it is open."""
    if spec.has_network and os.getuid() != 0:
        raise LabError("network namespaces need root", hint="llmo lab up --loopback")
    lab_id, password = states.lab_id(folder), RealClock().random_bytes(12).hex()
    ports: Mapping[str, int] = settings()["ports"]
    claimed = socket.socket()
    first = int(lab_id[-4:], 16)
    for number in range(254):
        net = (first + number) % 254 + 1
        if not spec.has_network:
            try:
                claimed.bind((f"127.77.{net}.1", _NET_PORT))
            except OSError:  # another lab's
                continue
            ports = free_ports(f"127.77.{net}.1", ports)
        return claimed, make_plan(spec, lab_id, net=net, ports=ports, password=password)
    raise LabError("no loopback network is free")


def free_ports(address: str, ports: Mapping[str, int]) -> Mapping[str, int]:
    """The ports, all shifted by as much as it takes: servers of this machine may have some."""
    for shift in _SHIFTS:
        shifted = {what: port + shift for what, port in ports.items()}
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in shifted.values():
                stack.enter_context(socket.socket()).bind((address, port))
            return shifted
    raise LabError("the ports that the lab needs are taken")


def _await(folder: Path, supervisor: subprocess.Popen[bytes], tell: Callable[[str], None]) -> Lab:
    """Until it is ready. Raises LabError; NoLab when somebody has removed it."""
    told = 0

    def has_settled() -> bool:
        nonlocal told
        try:
            state = states.load(folder)
        except states.NoLab:
            return True
        for at_s, what in state.steps[told:]:
            tell(f"{at_s:5.1f} s  {what}")
        told = len(state.steps)
        return state.phase != "making" or supervisor.poll() is not None

    is_settled = wait(has_settled, UP_S)
    state = states.load(folder)
    if state.phase == "ready":
        return Lab(folder, state)
    try:
        log = (folder / states.LOG).read_text(errors="replace")[-2_000:]
    except FileNotFoundError:
        raise states.NoLab(f"the lab in {folder} is gone") from None
    why = state.error or ("the supervisor died" if is_settled else "it takes too long")
    raise LabError(f"the lab does not come up: {why}" + ("" if state.error else f"\n{log}"))


# --- status ---


async def status(folder: Path | None = None) -> dict[str, Any]:
    """What a lab is and how it is, for printing. Raises NoLab."""
    lab = Lab.load(folder)
    roles = {member["name"]: str(member["role"]) for member in await lab.members()}
    return {
        "state": lab.phase if lab.supervisor else "dead; llmo lab down clears it away",
        "what": lab.plan.spec.shown,
        "folder": str(lab.folder),
        "store": lab.store_url,
        "endpoints": lab.endpoints,
        "llm": lab.llm_url,
        "prometheus": lab.prometheus_url,
        "s3": dict(lab.s3),
        "barman": str(lab.barman_config or ""),
        "client": " ".join(lab.command()),
        "processes": [
            {
                "name": process.name,
                "address": lab.plan.url(host.place, what) if what in lab.plan.ports else "",
                "region": host.region,
                "pid": process.pid,
                "restarts": process.restarts,
                "note": _note(process, roles.get(host.name, "") if what == "patroni" else ""),
            }
            for host in lab.hosts.values()
            for what, process in host.processes.items()
        ],
    }


def _note(process: Process, role: str) -> str:
    if not process.pid:
        return "held dead" if process.is_held else "dead"
    if state(process.pid) == "T":
        return f"frozen {role}".rstrip()
    return role

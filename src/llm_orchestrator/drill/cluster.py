"""The lab's cluster as the target of a drill: made for one run, broken, taken down.

What each fault does is in cluster_faults.py and its neighbours. A watcher asks Patroni and the
nodes five times a second and keeps what changed as sights: that is where t1 to t3 and t7 come from.
It looks through HTTP only, as an operator would.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from llm_orchestrator import __version__
from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill.cluster_disk_faults import DISK_FAULTS
from llm_orchestrator.drill.cluster_faults import FAULTS, Undone
from llm_orchestrator.drill.cluster_names import Names
from llm_orchestrator.drill.cluster_network_faults import NETWORK_FAULTS
from llm_orchestrator.drill.lab import Lab, LabSpec, down, io_shim, reach, up
from llm_orchestrator.drill.lab.servers import SETTINGS
from llm_orchestrator.drill.lab_process import LabError
from llm_orchestrator.drill.scenario import Fault, System
from llm_orchestrator.drill.target import Injected, Looks, NotConfirmed, NotPossible, Sight

Json = Any
FLOWS = Path(__file__).with_name("fault_flows.py")
_LOOK_S = 0.2
_REQUEST_S = 1.0
_CALM_S = 90.0
_OPERATOR_S = 60.0


def _check_compiler() -> None:
    try:
        io_shim.find_compiler()
    except LabError as error:
        raise NotPossible(f"not run: {error}", hint=error.hint) from error


class ClusterTarget:
    """A lab of its own in the temporary folder; its logs and ledger end in `folder`."""

    name = "lab"

    def __init__(self, folder: Path, clock: RealClock, system: System) -> None:
        self.folder = folder
        self.clock = clock
        self.undone = Undone()
        self._system = system
        self._place = Path(tempfile.gettempdir()) / f"llmo-drill-{os.getpid()}"
        self._lab: Lab | None = None
        self._http: aiohttp.ClientSession | None = None
        self._watching: asyncio.Task[None] | None = None
        self._sights: list[Sight] = []
        self.names = Names(folder / "hosts")
        self._primary: str | None = None
        self._home = ""
        self._is_whole: bool | None = None
        self._deaths = 0
        self._roles: dict[str, str] = {}
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def lab(self) -> Lab:
        """The lab. Only between `start` and `stop`."""
        assert self._lab is not None
        return self._lab

    @property
    def http(self) -> aiohttp.ClientSession:
        """Asks from the client's host."""
        assert self._http is not None
        return self._http

    # -- where it is ----------------------------------------------------------------------------

    @property
    def endpoints(self) -> Sequence[str]:
        port = self.lab.plan.ports["node"]
        return [f"http://{name}:{port}" for name in self.names.known] or self.lab.endpoints

    @property
    def client_host(self) -> str:
        return self.lab.hosts["client"].address

    def command(self, *words: str) -> Sequence[str]:
        return self.lab.command(*(self.names.before() if self.names.known else ()), *words)

    @property
    def looks(self) -> Looks:
        url = f"{self.lab.store_url}?target_session_attrs=read-write&connect_timeout=2"
        return Looks(url, [str(self.llm_ledger)])

    @property
    def llm_ledger(self) -> Path:
        return self.folder / "llm.jsonl" if self._lab is None else self._lab.llm_ledger

    @property
    def llm_ledgers(self) -> Sequence[Path]:
        return [self.llm_ledger]

    # -- its life -------------------------------------------------------------------------------

    async def start(self) -> None:
        if os.getuid() != 0:
            raise NotPossible("not run: needs root (network namespaces)")
        if self._system.shim:
            _check_compiler()
        spec = LabSpec(
            self._system.regions,
            has_network=True,
            disk_mb=self._system.disk_mb,
            has_shim=self._system.shim,
            buffers_mb=self._system.buffers_mb,
            imports=(str(FLOWS),),
            sabotage=self._system.sabotage,
        )
        self._lab = await asyncio.to_thread(up, spec, self._place, tell=lambda text: None)
        timeout = aiohttp.ClientTimeout(total=_REQUEST_S)
        self._http = aiohttp.ClientSession(connector=self.lab.connector(), timeout=timeout)
        for region in "ab"[: self._system.names]:
            nodes = [p for p in self.lab.plan.running("node") if p.region == region]
            self.names.put(f"{region}.drill.test", nodes[0].address)
        if self._system.policy == "active-passive":
            await self._stand_by()
        self._primary = await self.lab.primary()
        if self._primary is not None:
            self._home = self.lab.hosts[self._primary].region
        self._watching = asyncio.create_task(self._watch())

    async def _stand_by(self) -> None:
        """Region a works and the others do not, as an operator says it; confirmed by asking."""
        await self._operator("region", "policy", self._system.policy, "--home", "a")
        roles = await self._read_roles()
        working = [region for region, role in roles.items() if role == "active"]
        if working != ["a"]:
            raise NotConfirmed(f"{working} work, and only a is to")

    async def _read_roles(self) -> dict[str, str]:
        """What each region's nodes do, as `llmo region status` says."""
        told = json.loads(await self._operator("region", "status", "-o", "json"))
        self._roles = {str(each["region"]): str(each["role"]) for each in told["regions"]}
        return self._roles

    async def _operator(self, *words: str) -> str:
        """What `llmo` says on the clients' host, with a node's settings. Raises NotConfirmed."""
        node = self.lab.plan.running("node")[0]
        process = await asyncio.create_subprocess_exec(
            *self.lab.command(sys.executable, "-m", "llm_orchestrator", *words),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={
                "PATH": os.defpath,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "LLM_ORCHESTRATOR_URL": self.lab.store_url,
                "LLM_ORCHESTRATOR_CONFIG": str(self.lab.folder / node.name / SETTINGS),
                "LLM_ORCHESTRATOR_DATA": str(self.folder / "operator"),
            },
        )
        said, wrong = await asyncio.wait_for(process.communicate(), _OPERATOR_S)
        if process.returncode != 0:
            raise NotConfirmed(f"llmo {' '.join(words)}: {wrong.decode(errors='replace').strip()}")
        return said.decode()

    async def stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if self._http is not None:
            await self._http.close()
        if self._lab is None:
            return
        self._deaths = self._count_deaths()
        for host in self.lab.hosts.values():
            for process in host.processes.values():
                if process.log.exists():
                    shutil.copy(process.log, self.folder / f"{process.name.replace('/', '-')}.log")
        if self.lab.llm_ledger.exists():
            shutil.copy(self.lab.llm_ledger, self.folder / "llm.jsonl")
        self._lab = None
        await asyncio.to_thread(down, self._place)

    # -- faults ---------------------------------------------------------------------------------

    async def inject(self, fault: Fault) -> Injected:
        found = {**FAULTS, **NETWORK_FAULTS, **DISK_FAULTS}.get(fault.kind)
        if found is None:
            raise NotPossible(f"{self.name} has no fault {fault.kind}", hint="llmo drill list")
        self._is_whole = False  # until it was looked at again
        return await found(self, fault)

    async def undo(self) -> None:
        await self.undone.run()
        await self.lab.calm()

    async def is_redundant(self) -> bool | None:
        if self._is_whole and self._system.policy == "active-passive":
            await self._read_roles()
        return self._is_whole

    async def fail_back(self, limit_s: float) -> str:
        """By an operator's own commands: say where home is, wait for a plan, go."""
        if len({host.region for host in self.lab.hosts.values() if host.region}) < 2:
            raise NotPossible("it has one region: nothing can be failed back")
        await self._operator("region", "policy", "active-active", "--home", self._home)
        end_s = self.clock.monotonic() + limit_s
        while True:
            try:
                await self._operator("region", "plan", "--to", self._home)
                break
            except NotConfirmed:
                if self.clock.monotonic() > end_s:
                    raise
            await self.clock.sleep(_LOOK_S)
        told = json.loads(await self._operator("region", "failback", "--yes"))
        primary = await self.lab.primary()
        if primary is None or self.lab.hosts[primary].region != self._home:
            raise LabError(f"after the failback {primary} leads, which is not in {self._home}")
        gap_s = float(told["write_gap_s"])
        return f"{primary} leads again; nothing could be written for {gap_s:.2f} s"

    def undo_commands(self) -> Sequence[Sequence[str]]:
        words = (sys.executable, "-m", "llm_orchestrator", "lab", "down")
        return [(*words, "--folder", str(self._place))]

    # -- looking --------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """What an operator's own eyes would see, as sights."""
        while True:
            with contextlib.suppress(OSError, aiohttp.ClientError):
                members, nodes = await asyncio.gather(self._members(), self._nodes())
                self._is_whole = nodes and self._are_whole(members)
            await self.clock.sleep(_LOOK_S)

    async def _members(self) -> Mapping[str, str]:
        """The role of each member, from the first Patroni that answers."""
        leader = await self.lab.primary()
        if leader != self._primary:
            if leader is None:
                self.see("t1", f"{self._primary} leads no more")
            else:
                self.see("t3", f"{leader} leads")
            self._primary = leader
        if leader is None:
            return {}
        place = self.lab.hosts[leader].place
        url = f"{self.lab.plan.url(place, 'patroni')}/cluster"
        _, cluster = await reach.get(self.http, url)
        return {
            member["name"]: f"{member['role']} {member['state']}"
            for member in cluster.get("members", [])
        }

    async def _nodes(self) -> bool:
        """Whether every node is ready."""
        urls = [f"{url}/health/ready" for url in self.lab.endpoints]
        answers = await asyncio.gather(*(reach.get(self.http, url) for url in urls))
        return all(status == 200 for status, _ in answers)

    def _are_whole(self, members: Mapping[str, str]) -> bool:
        """One leads, the others follow, at least one of them synchronously."""
        states = list(members.values())
        good = ("leader running", "replica streaming", "sync_standby streaming")
        return (
            len(states) == len(self.lab.plan.running("patroni"))
            and all(state in good for state in states)
            and "sync_standby streaming" in states
        )

    def see(self, mark: str, text: str) -> None:
        """Keep what was seen just now."""
        self._sights.append(Sight(self.clock.monotonic(), mark, text))

    # -- what it tells --------------------------------------------------------------------------

    def sights(self) -> Sequence[Sight]:
        return self._sights

    def _count_deaths(self) -> int:
        hosts = self.lab.hosts.values()
        return sum(host.processes["node"].restarts for host in hosts if "node" in host.processes)

    def facts(self) -> dict[str, Json]:
        spec = LabSpec(self._system.regions) if self._lab is None else self._lab.plan.spec
        return {
            "target": self.name,
            "what": spec.shown,
            "regions": self._roles,
            "llm_orchestrator": __version__,
            "python": platform.python_version(),
            "node_deaths": self._deaths if self._lab is None else self._count_deaths(),
        }

    def logs(self) -> Sequence[Path]:
        return sorted(self.folder.glob("*.log"))

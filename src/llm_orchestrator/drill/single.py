"""One supervised `llmo serve` on SQLite, with the fake LLM server beside it: no root, no cluster.

Every process dies with the drill (PDEATHSIG), so a drill that is killed leaves nothing that runs;
what it has damaged is a store of its own in a folder of its own. What each fault does is in
single_faults.py; here is how the system is made, reached and taken down.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp

from llm_orchestrator import __version__
from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill.child import Child, ChildError
from llm_orchestrator.drill.memory_group import ROOT, MemoryGroup
from llm_orchestrator.drill.scenario import Fault, System
from llm_orchestrator.drill.single_backups import Copies
from llm_orchestrator.drill.single_faults import FAULTS
from llm_orchestrator.drill.target import Injected, Looks, NotPossible, Sight

Json = Any
FLOWS = Path(__file__).with_name("fault_flows.py")
_HOST = "127.0.0.1"
_READY_S = 60.0
_POLL_S = 0.02
_SETTINGS = f"""\
outgoing_allow = ["{_HOST}"]
log_format = "json"
"""


class SingleTarget:
    """A node and its provider in `folder`, which must be new or empty."""

    name = "single"

    def __init__(self, folder: Path, clock: RealClock, system: System) -> None:
        self.folder = folder
        self.clock = clock
        self.http: aiohttp.ClientSession | None = None
        self._ports = free_ports(4)
        folder.mkdir(parents=True, exist_ok=True)
        self.archive = folder / "archive"
        self._sabotage = system.sabotage
        self.copies = Copies(folder, system, port=self._ports[3], clock=clock)
        self._llm_ports = (self._ports[0], self._ports[2])[: system.providers]
        self._settings = _SETTINGS + self.copies.settings()
        if system.archive:
            if system.object_store != "archive":
                self._settings += f'archive_place = "{self.archive}"\n'
            self._settings += f'archive_mode = "{system.archive}"\n'
        (folder / "llm-orchestrator.toml").write_text(self._settings)
        environment = self.environment()
        python = (sys.executable, "-m")
        node = ("--port", str(self._ports[1]), "--import", str(FLOWS))
        self.llms = []
        for port, ledger in zip(self._llm_ports, self.llm_ledgers, strict=True):
            llm = ("--port", str(port), "--ledger", str(ledger))
            words = (*python, "llm_orchestrator.drill.fake_llm", *llm)
            log = ledger.with_suffix(".log")
            self.llms.append(Child(words, log, environment=environment, clock=clock))
        self.group: MemoryGroup | None = None
        self._memory = system.memory_mb << 20
        serve: tuple[str, ...] = (*python, "llm_orchestrator", "serve", *node)
        if self._memory:
            self.group = MemoryGroup(ROOT / f"llmo-drill-{os.getpid()}")
            serve = self.group.command(*serve)
        self.node = Child(
            serve,
            folder / "node.log",
            environment=environment,
            clock=clock,
        )

    # -- where it is ----------------------------------------------------------------------------

    @property
    def llm(self) -> Child:
        """The fake LLM server that every step names first."""
        return self.llms[0]

    @property
    def llm_urls(self) -> Sequence[str]:
        """The fake LLM servers, without a path: OpenAI's, then Anthropic's if there are two."""
        return [f"http://{_HOST}:{port}" for port in self._llm_ports]

    @property
    def llm_url(self) -> str:
        """The one that every step names first."""
        return self.llm_urls[0]

    @property
    def endpoints(self) -> Sequence[str]:
        return [f"http://{_HOST}:{self._ports[1]}"]

    @property
    def client_host(self) -> str:
        return _HOST

    def command(self, *words: str) -> Sequence[str]:
        return words

    @property
    def store_path(self) -> Path:
        """The database file."""
        return self.folder / "runs.db"

    @property
    def store_url(self) -> str:
        return f"sqlite:///{self.store_path}"

    @property
    def looks(self) -> Looks:
        return Looks(self.store_url, [str(each) for each in self.llm_ledgers])

    @property
    def llm_ledger(self) -> Path:
        return self.folder / "llm.jsonl"

    @property
    def llm_ledgers(self) -> Sequence[Path]:
        return [self.llm_ledger, self.folder / "llm_anthropic.jsonl"][: len(self._llm_ports)]

    def environment(self) -> dict[str, str]:
        """What our processes and commands find in their environment, and nothing else."""
        return {
            "PATH": os.defpath,
            "HOME": str(self.folder),
            "PYTHONPATH": os.pathsep.join(filter(None, [self._sabotage, *sys.path])),
            "PYTHONUNBUFFERED": "1",
            "LLM_ORCHESTRATOR_URL": self.store_url,
            "LLM_ORCHESTRATOR_DATA": str(self.folder / "data"),
            "LLM_ORCHESTRATOR_CONFIG": str(self.folder / "llm-orchestrator.toml"),
            "OPENAI_API_KEY": "drill",
            "OPENAI_BASE_URL": f"{self.llm_url}/v1",
            "ANTHROPIC_API_KEY": "drill",
            "ANTHROPIC_BASE_URL": self.llm_urls[-1],
            **self.copies.environment(),
        }

    # -- its life -------------------------------------------------------------------------------

    async def start(self) -> None:
        if self.group is not None:
            if not self.group.is_possible():
                raise NotPossible("not run: needs root (a control group of version 1 for memory)")
            self.group.make(self._memory)
        self.http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10, connect=1))
        for llm, url in zip(self.llms, self.llm_urls, strict=True):
            await llm.start()
            await self.until_answers(f"{url}/health")
        if self.copies.store is not None:
            await self.copies.store.start()
            await self.copies.ready(self.http)
        await self.node.start()
        await self.until_answers(f"{self.endpoints[0]}/health/ready")

    async def stop(self) -> None:
        await self.node.stop()
        for llm in self.llms:
            await llm.stop()
        if self.copies.store is not None:
            await self.copies.store.stop()
        if self.group is not None:
            await asyncio.to_thread(self.group.remove)
        if self.http is not None:
            await self.http.close()

    async def answers(self, url: str) -> bool:
        """Whether a GET gets a good answer now."""
        assert self.http is not None
        try:
            async with self.http.get(url) as response:
                return response.ok
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def until_answers(self, url: str) -> None:
        """Raises ChildError when that takes too long."""
        end_s = self.clock.monotonic() + _READY_S
        while not await self.answers(url):
            if self.clock.monotonic() > end_s:
                raise ChildError(f"{url} does not answer", hint=f"see the logs in {self.folder}")
            await self.clock.sleep(_POLL_S)

    # -- faults ---------------------------------------------------------------------------------

    async def inject(self, fault: Fault) -> Injected:
        found = FAULTS.get(fault.kind)
        if found is None:
            raise NotPossible(f"{self.name} has no fault {fault.kind}", hint="llmo drill list")
        return await found(self, fault)

    async def undo(self) -> None:
        self.copies.undo()
        if self.copies.store is not None:
            assert self.http is not None
            await self.copies.ready(self.http)
        self.node.send(signal.SIGCONT)
        self.node.release()
        (self.folder / "keep").unlink(missing_ok=True)
        self.llm.send(signal.SIGCONT)
        self.llm.release()
        await self.until_answers(f"{self.llm_url}/health")
        await self.control(reset=True)

    async def control(self, **order: Json) -> None:
        """Steer the fake LLM server."""
        await self.post(f"{self.llm_url}/control", order)

    async def post(self, url: str, body: Json) -> None:
        """One POST. Raises ChildError."""
        assert self.http is not None
        try:
            async with self.http.post(url, json=body) as response:
                response.raise_for_status()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ChildError(f"{url}: {error}") from error

    async def is_redundant(self) -> bool | None:
        return None

    def undo_commands(self) -> Sequence[Sequence[str]]:
        if self.group is None:
            return []
        module = "llm_orchestrator.drill.memory_group"
        return [(sys.executable, "-m", module, str(self.group.folder))]

    # -- what it tells --------------------------------------------------------------------------

    def sights(self) -> Sequence[Sight]:
        return self.node.sights

    def facts(self) -> dict[str, Json]:
        return {
            "target": self.name,
            "llm_orchestrator": __version__,
            "python": platform.python_version(),
            "settings": self._settings,
            "node_lives": self.node.lives,
            "node_deaths": len(self.node.codes),
            "exit_codes": list(self.node.codes),
        }

    def logs(self) -> Sequence[Path]:
        names = ("node.log", "object-store.log")
        found = [path for name in names if (path := self.folder / name).exists()]
        return [*found, *(each.with_suffix(".log") for each in self.llm_ledgers)]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, each another one."""
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in taken:
            each.bind((_HOST, 0))
        return [int(each.getsockname()[1]) for each in taken]

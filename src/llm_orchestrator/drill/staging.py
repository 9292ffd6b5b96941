"""A user's own staging system as the target of a drill: broken and mended by the user's commands.

The file (staging_file.py) declares a command for each thing that a target must do: `inject` a
fault, `confirm` that it works (asked again until it says so), `undo` it. This module runs them with
time limits and believes exit codes only. Whatever happens after `inject` was begun, `undo` is run:
here in the ordinary way and when the fault is not confirmed, by the dead-man timer when the drill
is killed. What the file gives nobody to look at is not judged, and the verdict says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from llm_orchestrator import __version__
from llm_orchestrator.clock import RealClock
from llm_orchestrator.config import resolve_secret, without_password
from llm_orchestrator.drill.lab import tools
from llm_orchestrator.drill.scenario import Fault, Scenario
from llm_orchestrator.drill.staging_file import UNDO_S, Check, Staging
from llm_orchestrator.drill.target import (
    Injected,
    Looks,
    NotConfirmed,
    NotPossible,
    Sight,
    UndoFailed,
)
from llm_orchestrator.errors import OperatorError
from llm_orchestrator.telemetry.redact import redact

Json = Any
_POLL_S = 0.2
_READY_S = 30.0
_BEFORE_MS = 600_000
"""Clocks of its nodes may be so far behind ours; a run's id begins with its node's time."""
_TIMEOUT = aiohttp.ClientTimeout(total=10, connect=3)
_MISBEHAVE = "drill_misbehave"


class HookFailed(OperatorError):
    """A command of the file has failed, or took too long."""


class StagingTarget:
    """The system that `staging` describes, for one scenario; logs of the commands in `folder`."""

    def __init__(
        self, folder: Path, clock: RealClock, staging: Staging, *, scenario: Scenario
    ) -> None:
        self.folder = folder
        self.clock = clock
        self._staging = staging
        self._scenario = scenario
        self._begun: list[list[str]] = []
        self._log = folder / "hooks.log"
        self._first_run = _lowest_id(clock.now_us() // 1000 - _BEFORE_MS)
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def name(self) -> str:
        return self._staging.name

    # -- where it is ----------------------------------------------------------------------------

    @property
    def endpoints(self) -> Sequence[str]:
        return [url.rstrip("/") for url in self._staging.endpoints]

    @property
    def client_host(self) -> str:
        return self._staging.client_host

    def command(self, *words: str) -> Sequence[str]:
        return words

    @property
    def looks(self) -> Looks:
        staging, told = self._staging, {}
        if urlsplit(staging.store_url).scheme.startswith("postgres"):
            psql = Path(tools.find("psql", hint="install PostgreSQL's client"))
            told = {**tools.environment(), "PATH": f"{psql.parent}{os.pathsep}{os.defpath}"}
        if staging.store_password:
            told["PGPASSWORD"] = resolve_secret(staging.store_password)
        return Looks(
            staging.store_url,
            [staging.llm_ledger] if staging.llm_ledger else [],
            self._first_run,
            self._token,
            environment=told,
        )

    @property
    def _token(self) -> str:
        return resolve_secret(self._staging.token) if self._staging.token else ""

    @property
    def llm_ledgers(self) -> Sequence[Path]:
        return [self.folder / "llm.jsonl"]

    # -- its life -------------------------------------------------------------------------------

    async def start(self) -> None:
        """It runs already: see whether everything is there that the scenario needs."""
        if missing := self._staging.missing(self._scenario):
            raise NotPossible(f"the file of {self.name} lacks {', '.join(missing)}")
        _ = self.looks  # what it needs and is not here is said now
        headers = {"authorization": f"Bearer {self._token}"} if self._token else {}
        async with aiohttp.ClientSession(timeout=_TIMEOUT, headers=headers) as http:
            await self._until_ready(http)
            await self._check_workflows(http)

    async def _until_ready(self, http: aiohttp.ClientSession) -> None:
        check = self._staging.ready
        limit_s = _READY_S if check is None else check.limit_s
        end_s = self.clock.monotonic() + limit_s
        while True:
            why = await self._why_not_ready(http)
            if not why:
                return
            if self.clock.monotonic() > end_s:
                raise NotPossible(f"{self.name} is not ready after {limit_s:g} s: {why}")
            await self.clock.sleep(_POLL_S)

    async def _why_not_ready(self, http: aiohttp.ClientSession) -> str:
        if self._staging.ready is not None:
            return "" if await self._says_yes(self._staging.ready) else "the command says no"
        for endpoint in self.endpoints:
            try:
                status, text = await _get(http, f"{endpoint}/health/ready")
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                return f"{endpoint}: {type(error).__name__} {error}"
            if status != 200:
                return f"{endpoint}/health/ready: {status} {text[:200]}"
        return ""

    async def _check_workflows(self, http: aiohttp.ClientSession) -> None:
        """Whether we may look at its workflows, and those of a drill's nodes are there."""
        wanted = [""]
        if any(fault.kind == "misbehave" for fault in self._scenario.faults):
            wanted.append(f"/{_MISBEHAVE}")
        for endpoint in self.endpoints:
            for path in wanted:
                url = f"{endpoint}/api/v1/workflows{path}"
                try:
                    status, text = await _get(http, url)
                except (aiohttp.ClientError, OSError, TimeoutError) as error:
                    raise NotPossible(f"{url}: {type(error).__name__} {error}") from error
                if status == 404 and path:
                    raise NotPossible(
                        f"{endpoint} does not know {_MISBEHAVE}: start each node with `--import`"
                        " and the file fault_flows.py of the package's folder drill"
                    )
                if status in (401, 403):
                    raise NotPossible(f"{url}: {status}, is `token` in the file right?")
                if status != 200:
                    raise NotPossible(f"{url}: {status} {text[:200]}")

    async def stop(self) -> None:
        """Leave it as it was; also after a drill that was interrupted in between."""
        await self.undo()

    # -- faults ---------------------------------------------------------------------------------

    async def inject(self, fault: Fault) -> Injected:
        hooks = self._staging.faults[fault.kind]
        self._begun.append(hooks.filled("undo", fault))
        began_s = self.clock.monotonic()
        try:
            await self._do(hooks.filled("inject", fault), hooks.limit_s)
            at_s = await self._confirm(hooks.filled("confirm", fault), hooks.limit_s)
        except HookFailed as error:
            await self.undo()
            raise NotConfirmed(f"{fault.kind}: {error.message}") from error
        took_s = at_s - began_s
        return Injected(at_s, f"confirmed {took_s:.2f} s after its command was begun")

    async def _confirm(self, command: Sequence[str], limit_s: float) -> float:
        """When it was seen that the fault works, on the steady clock. Raises HookFailed."""
        end_s = self.clock.monotonic() + limit_s
        while True:
            left_s = end_s - self.clock.monotonic()
            if left_s <= 0:
                raise HookFailed(f"not confirmed within {limit_s:g} s by {command[0]}")
            if await self._run(command, left_s, dies_with_us=True) == 0:
                return self.clock.monotonic()
            await self.clock.sleep(_POLL_S)

    async def undo(self) -> None:
        """Take away what was begun. Raises UndoFailed; then it can be tried again."""
        left, troubles = [], []
        for command in reversed(self._begun):
            try:
                code = await self._run(command, UNDO_S)
                trouble = "" if code == 0 else f"exit code {code}"
            except HookFailed as error:
                trouble = error.message
            if trouble:
                left.append(command)
                troubles.append(f"{' '.join(command)}: {trouble}")
        self._begun = left[::-1]
        if troubles:
            raise UndoFailed(f"undo has failed, see hooks.log: {'; '.join(troubles)}")

    async def is_redundant(self) -> bool | None:
        check = self._staging.redundant
        return None if check is None else await self._says_yes(check)

    async def fail_back(self, limit_s: float) -> str:
        check = self._staging.failback
        if check is None:
            raise NotPossible(f"the file of {self.name} lacks failback")
        await self._do(check.command, check.limit_s)
        return "the command of the file has ended"

    def undo_commands(self) -> Sequence[Sequence[str]]:
        if self._staging.missing(self._scenario):
            return []
        return self._staging.undo_commands(self._scenario)

    # -- commands -------------------------------------------------------------------------------

    async def _says_yes(self, check: Check) -> bool:
        try:
            return await self._run(check.command, check.limit_s) == 0
        except HookFailed:
            return False

    async def _do(self, command: Sequence[str], limit_s: float) -> None:
        code = await self._run(command, limit_s, dies_with_us=True)
        if code != 0:
            raise HookFailed(f"{' '.join(command)} ended with {code}, see hooks.log")

    async def _run(
        self, command: Sequence[str], limit_s: float, *, dies_with_us: bool = False
    ) -> int:
        """Its exit code. It finds our environment and folder. Raises HookFailed."""
        before = ("setpriv", "--pdeathsig=KILL") if dies_with_us else ()
        with tempfile.TemporaryFile() as said:  # what it leaves running may hold it, as no pipe
            try:
                process = await asyncio.create_subprocess_exec(
                    *before,
                    *command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=said,
                    stderr=said,
                    start_new_session=True,
                )
            except OSError as error:
                raise HookFailed(f"{command[0]}: {error.strerror}") from error
            try:
                return await asyncio.wait_for(process.wait(), limit_s)
            except TimeoutError as error:
                raise HookFailed(f"{' '.join(command)} takes more than {limit_s:g} s") from error
            finally:
                if process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    await process.wait()
                said.seek(0)
                self._note(command, process.returncode, said.read())

    def _note(self, command: Sequence[str], code: int | None, said: bytes) -> None:
        line = f"{self.clock.now_us()} {' '.join(command)}: exit code {code}\n"
        with self._log.open("a", encoding="utf-8") as file:
            file.write(redact(line + said.decode("utf-8", "replace")))

    # -- what it tells --------------------------------------------------------------------------

    def sights(self) -> Sequence[Sight]:
        return []

    def facts(self) -> dict[str, Json]:
        unseen = []
        if self._staging.redundant is None:
            unseen.append("when it was redundant again (no [redundant])")
        return {
            "target": self.name,
            "what": f"a staging system of {len(self.endpoints)} endpoints",
            "endpoints": [without_password(url) for url in self.endpoints],
            "llm_orchestrator": __version__,
            "python": platform.python_version(),
            "node_deaths": None,
            "not_judged": unseen,
        }

    def logs(self) -> Sequence[Path]:
        return [self._log]


async def _get(http: aiohttp.ClientSession, url: str) -> tuple[int, str]:
    async with http.get(url) as response:
        return response.status, await response.text()


def _lowest_id(at_ms: int) -> str:
    """The lowest uuid of version 7 of that moment (RFC 9562)."""
    time = f"{max(at_ms, 0):012x}"
    return f"{time[:8]}-{time[8:]}-7000-8000-{0:012x}"

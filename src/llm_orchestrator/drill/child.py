"""A child process that dies with us, its log, and a supervisor that starts it again.

The picture is systemd's `Restart=always`: the end of the child is noticed at once (wait), then
comes a short pause, then the next life. What was noticed is kept as sights for the drill's marks.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill.lab_process import state
from llm_orchestrator.drill.target import Sight
from llm_orchestrator.errors import OperatorError

RESTART_S = 0.1
_POLL_S = 0.01
_END_S = 30.0


class ChildError(OperatorError):
    """A process of the drill did not do what was asked of it."""


class Child:
    """One program, started again whenever it ends, unless it is `held`."""

    def __init__(
        self, command: Sequence[str], log: Path, *, environment: Mapping[str, str], clock: RealClock
    ) -> None:
        self._command = list(command)
        self._log = log
        self._environment = dict(environment)
        self._clock = clock
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._is_free = asyncio.Event()
        self._is_free.set()
        self.lives = 0
        self.codes: list[int] = []
        self.sights: list[Sight] = []

    @property
    def ended_at_s(self) -> float:
        """When its last life was seen to be over, on the steady clock."""
        return [sight.at_s for sight in self.sights if sight.mark == "t1"][-1]

    @property
    def pid(self) -> int:
        """Its process id; 0 while it does not run."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else 0

    async def start(self) -> None:
        """The first life; from now on it is kept alive."""
        await self._spawn()
        self._keeper = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """End it for good."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        if self.pid:
            self.send(signal.SIGKILL)
            self.send(signal.SIGCONT)
        if self._process is not None:
            await self._process.wait()

    def hold(self) -> None:
        """Let it stay dead when it ends, until `release`."""
        self._is_free.clear()

    def release(self) -> None:
        """Start it again if it is dead."""
        self._is_free.set()

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, if it is there."""
        if pid := self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    async def end_with(self, number: signal.Signals) -> int:
        """Send a signal and wait until this life is over; its exit code. Raises ChildError."""
        lives = len(self.codes)
        self.send(number)
        return await self.ended(lives)

    async def ended(self, lives: int) -> int:
        """The exit code of the life after so many that have ended. Raises ChildError."""
        await self.until(lambda: len(self.codes) > lives, "its process does not end")
        return self.codes[lives]

    async def until(self, happens: Callable[[], bool], what: str, limit_s: float = _END_S) -> None:
        """Look every 10 ms. Raises ChildError after `limit_s`."""
        end_s = self._clock.monotonic() + limit_s
        while not happens():
            if self._clock.monotonic() > end_s:
                raise ChildError(f"{self._log.stem}: {what}", hint=f"see {self._log}")
            await self._clock.sleep(_POLL_S)

    def state(self) -> str:
        """One letter as in proc(5), X while it does not run."""
        return state(self.pid) if self.pid else "X"

    def said(self) -> str:
        """All of its log."""
        return self._log.read_text("utf-8", "replace") if self._log.exists() else ""

    async def _spawn(self) -> None:
        self.lives += 1
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                "setpriv",
                "--pdeathsig=KILL",
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                cwd=self._log.parent,
                start_new_session=True,  # Ctrl-C is for the drill, which ends it in its own order
            )

    async def _keep(self) -> None:
        while True:
            assert self._process is not None
            code = await self._process.wait()
            self._see("t1", f"the supervisor saw its process end with {code}")
            self.codes.append(code)
            await self._is_free.wait()
            self._see("t2", "it is to be started again")
            await self._clock.sleep(RESTART_S)
            self._see("t3", "the supervisor starts it")
            await self._spawn()

    def _see(self, mark: str, text: str) -> None:
        self.sights.append(Sight(self._clock.monotonic(), mark, text))

"""The local model's server: llama.cpp as a child process that speaks the OpenAI wire format.

A C++ crash must stay outside the engine, so the model never runs in our process. Run as a program
(`python -m llm_orchestrator.providers.local_server --model PATH --port 0`) this module hands over
to local_llama.py, which serves. Imported, it offers `LocalServer`, which starts that program and
ends it, and `discover`, which finds one that `llmo local up` left running.

Who ends the server: a private one reads a pipe from its parent and dies the moment the pipe closes,
however the parent dies; a shared one (`is_detached`) lives until SIGTERM. Only a shared or
foreground server writes the state file, so nobody comes to lean on a private one.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_orchestrator.clock import Clock, RealClock
from llm_orchestrator.errors import ConfigError, OperatorError
from llm_orchestrator.model import Json
from llm_orchestrator.providers import local_model

HOST = "127.0.0.1"
STATE_FILE = "local-server.json"
LOG_FILE = "local-server.log"

_START_S_MAX = 120.0
_STOP_S_MAX = 5.0
_HEALTH_S_MAX = 2.0
_POLL_S = 0.02
_LOG_TAIL = 400


class LocalServerFailed(OperatorError):
    """The local server did not start, or died while starting."""

    kind = "local_server"


@dataclass(frozen=True, slots=True)
class ServerState:
    """What the state file says about a running server."""

    port: int
    pid: int
    started: str
    """When the process started, in the kernel's own words: a reused pid has another."""

    @property
    def base_url(self) -> str:
        """Where its OpenAI-compatible API is."""
        return _base_url(self.port)


class LocalServer:
    """One server process. Not shared between event loops."""

    def __init__(
        self, *, clock: Clock | None = None, port: int = 0, context: int = 4096, slots: int = 2
    ) -> None:
        self._clock: Clock = clock or RealClock()
        self._options = ["--port", str(port), "--ctx", str(context), "--slots", str(slots)]
        self._process: subprocess.Popen[bytes] | None = None
        self.base_url = ""
        self.pid = 0

    @property
    def is_running(self) -> bool:
        """True while the process lives."""
        return self._process is not None and self._process.poll() is None

    async def start(
        self, data_dir: Path, *, is_shared: bool = False, is_detached: bool = False
    ) -> str:
        """Start the server with the model in `data_dir`; returns its base URL once it answers.

        `is_shared` lets `discover` find it; `is_detached` (implies shared) lets it outlive us: end
        that one with `stop_shared`.
        Raises ConfigError when the extra `local` or the model is missing, LocalServerFailed else.
        """
        if self.is_running:
            return self.base_url
        await self.stop()  # what is left of one that died
        _require_extra()
        model = local_model.require(data_dir)
        command = [sys.executable, "-m", "llm_orchestrator.providers.local_server"]
        command += ["--model", str(model), *self._options]
        if is_shared or is_detached:
            command += ["--state", str(data_dir / STATE_FILE)]
        if not is_detached:
            command.append("--until-stdin-closes")
        log = data_dir / LOG_FILE
        self._process = _spawn(command, log, is_detached=is_detached)
        try:
            answer = await self._first_line(log)
        except BaseException:
            await self.stop()
            raise
        self.pid = int(answer["pid"])
        self.base_url = _base_url(int(answer["port"]))
        if is_detached:
            self._release()
        return self.base_url

    async def stop(self) -> None:
        """End the server, gently at first; returns when it is gone. Safe to call twice."""
        process, self._process = self._process, None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        process.terminate()
        deadline = self._clock.monotonic() + _STOP_S_MAX
        while process.poll() is None:
            if self._clock.monotonic() > deadline:
                process.kill()
            await self._clock.sleep(_POLL_S)

    async def wait(self) -> int:
        """Until the process ends by itself; returns its exit code."""
        while self._process is not None and self._process.poll() is None:
            await self._clock.sleep(_POLL_S * 10)
        return self._process.returncode if self._process is not None else 0

    def _release(self) -> None:
        """Forget a detached server without ending it."""
        process, self._process = self._process, None
        assert process is not None
        assert process.stdout is not None
        process.stdout.close()
        process.returncode = 0  # else Popen warns about a child that it never saw end

    async def _first_line(self, log: Path) -> dict[str, Json]:
        """The one line that the server prints: where it is, or why it cannot be."""
        process = self._process
        assert process is not None
        assert process.stdout is not None
        descriptor = process.stdout.fileno()
        os.set_blocking(descriptor, False)
        deadline = self._clock.monotonic() + _START_S_MAX
        received = b""
        while b"\n" not in received:
            try:
                piece = os.read(descriptor, 65536)
            except BlockingIOError:
                piece = None
            if piece == b"":
                raise LocalServerFailed(
                    f"the local server ended before it answered (exit code {process.wait()}): "
                    f"{_tail(log)}",
                    hint=f"read {log}; the hash of the model is checked by: llmo local pull",
                )
            if self._clock.monotonic() > deadline:
                raise LocalServerFailed(
                    f"the local server did not answer within {_START_S_MAX:g} s", hint=f"read {log}"
                )
            received += piece or b""
            await self._clock.sleep(0 if piece else _POLL_S)
        answer: dict[str, Json] = json.loads(received.split(b"\n", 1)[0])
        if "error" in answer:
            raise LocalServerFailed(str(answer["error"]), hint=answer.get("hint"))
        return answer


class OnDemand:
    """The address of a local server: a shared one when there is one, else our own, started once.

    `url()` is asked before every request, so a server that died is replaced by the next request.
    """

    def __init__(self, data_dir: Path, *, clock: Clock | None = None) -> None:
        self._data_dir = data_dir
        self._own = LocalServer(clock=clock)
        self._starting = asyncio.Lock()

    @property
    def pid(self) -> int:
        """Process id of the server that we started last; 0 when we never did."""
        return self._own.pid

    async def url(self) -> str:
        """Base URL of a server that answers. Starting one takes about a second."""
        async with self._starting:
            if self._own.is_running:
                return self._own.base_url
            found = await discover(self._data_dir)
            return found or await self._own.start(self._data_dir)

    async def close(self) -> None:
        """End our own server; a shared one is left alone."""
        await self._own.stop()


async def discover(data_dir: Path) -> str | None:
    """Base URL of the shared server of `data_dir` when it lives and answers, else None."""
    state = read_state(data_dir)
    if state is None or process_start(state.pid) != state.started:
        return None
    is_healthy = await asyncio.to_thread(_is_healthy, state.port)
    return state.base_url if is_healthy else None


def read_state(data_dir: Path) -> ServerState | None:
    """What the state file says, whether or not it still holds; None when there is none."""
    try:
        data = json.loads((data_dir / STATE_FILE).read_text())
        return ServerState(int(data["port"]), int(data["pid"]), str(data["started"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


async def stop_shared(data_dir: Path, *, clock: Clock | None = None) -> bool:
    """End the shared server of `data_dir`; False when none runs."""
    clock = clock or RealClock()
    state = read_state(data_dir)
    if state is None or process_start(state.pid) != state.started:
        return False
    os.kill(state.pid, signal.SIGTERM)
    deadline = clock.monotonic() + _STOP_S_MAX
    while process_start(state.pid) == state.started:
        if clock.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.kill(state.pid, signal.SIGKILL)
        await clock.sleep(_POLL_S)
    return True


def _base_url(port: int) -> str:
    return f"http://{HOST}:{port}/v1"


def _require_extra() -> None:
    if importlib.util.find_spec("xllamacpp") is None:
        raise ConfigError(
            "the local model needs the package xllamacpp, which is not installed",
            hint="pip install 'llm-orchestrator[local]'",
        )


def _spawn(command: Sequence[str], log: Path, *, is_detached: bool) -> subprocess.Popen[bytes]:
    try:
        log.write_bytes(b"")
        with log.open("ab") as errors:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL if is_detached else subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # Ctrl-C in the terminal is the parent's matter
            )
    except OSError as error:
        raise LocalServerFailed(
            f"cannot start the local server: {error}", hint=f"is {log.parent} writable?"
        ) from error


def _tail(log: Path) -> str:
    try:
        return log.read_bytes()[-_LOG_TAIL:].decode(errors="replace").strip() or "it said nothing"
    except OSError:
        return "its log cannot be read"


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=_HEALTH_S_MAX)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def process_start(pid: int) -> str:
    """When process `pid` started; empty when it is gone or a zombie, "?" where /proc is missing."""
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return ""
        return "" if fields[0] == "Z" else fields[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass  # it lives, and is somebody else's
    return "?"


if __name__ == "__main__":
    from llm_orchestrator.providers.local_llama import main

    sys.exit(main())

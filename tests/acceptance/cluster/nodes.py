"""Real nodes: processes of the real command line on one database, and a fake LLM beside them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_orchestrator.drill.lab_process import state
from tests.acceptance.cli_support import Done
from tests.acceptance.fake_server import FakeServer

HANG_S = 100.0
"""Ten times what anything here takes on a busy machine: only something that hangs takes longer."""
_POLL_S = 0.05


def until(happens: Callable[[], Any], what: str) -> Any:
    """What `happens` gives as soon as it gives something; fails when it hangs."""
    pause, end = threading.Event(), time.monotonic() + HANG_S
    while time.monotonic() < end:
        if found := happens():
            return found
        pause.wait(_POLL_S)
    raise AssertionError(f"it hangs: {what}")


class NodeProcess:
    """One `llmo serve`. `life` counts how often it was started in its folder."""

    def __init__(self, place: Path, command: list[str], environment: Mapping[str, str]) -> None:
        self._place = place
        self._command = command
        self._environment = environment
        self.life = 0
        self.start()

    def start(self) -> None:
        """A new life in the same folder, as a supervisor would give it."""
        self.life += 1
        self._log = self._place / f"stderr-{self.life}"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                self._command,
                cwd=self._place,
                env=dict(self._environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def said(self) -> str:
        """Everything on its stderr in this life."""
        return self._log.read_text(errors="replace")

    @property
    def is_dead(self) -> bool:
        return self.process.poll() is not None

    @property
    def node_id(self) -> str:
        """The name of this life, once it is ready."""
        until(lambda: "ready: " in self.said or self.is_dead, "a node that gets ready")
        line = next((line for line in self.said.splitlines() if "ready: " in line), None)
        assert line is not None, f"it ended before it was ready: {self.said}"
        return line.partition("served by ")[2].partition(" on ")[0].strip()

    def kill(self) -> None:
        """SIGKILL; it is gone when this returns."""
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        """SIGSTOP; it stands still when this returns."""
        self.process.send_signal(signal.SIGSTOP)
        until(lambda: state(self.process.pid) == "T", "a process that stops")

    def thaw(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    def terminate(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(HANG_S)


class Cluster:
    """Nodes by name, a shell on the same database, and everything ended in the end."""

    def __init__(self, folder: Path, url: str, fake: FakeServer) -> None:
        self.folder = folder
        self.url = url
        self.fake = fake
        self.nodes: list[NodeProcess] = []
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
        self._environment = {
            **kept,
            "LLM_ORCHESTRATOR_URL": url,
            "LLM_ORCHESTRATOR_DATA": str(folder / "client"),
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONUNBUFFERED": "1",
            "OPENAI_API_KEY": "key",
            "OPENAI_BASE_URL": f"{fake.url}/v1",
        }

    def configure(self, text: str) -> None:
        """The settings file of every node and command that is started from now on."""
        (self.folder / "settings.toml").write_text(text)
        self._environment["LLM_ORCHESTRATOR_CONFIG"] = str(self.folder / "settings.toml")

    def node(self, name: str, *words: str) -> NodeProcess:
        """Start `llmo serve` with a data folder of its own. It is not ready yet."""
        place = self.folder / name
        place.mkdir()
        node = NodeProcess(
            place,
            [
                *_LLMO,
                "serve",
                "--port",
                "0",
                "--store",
                self.url,
                "--data",
                str(place / "data"),
                *words,
            ],
            {**self._environment, "LLM_ORCHESTRATOR_NODE_NAME": name},
        )
        self.nodes.append(node)
        return node

    def ready(self, *names: str, words: Sequence[str] = ()) -> list[NodeProcess]:
        """Start several at once, with the same options, and wait until each is ready."""
        nodes = [self.node(name, *words) for name in names]
        for node in nodes:
            assert node.node_id
        return nodes

    def llmo(self, *words: str, stdin: str = "") -> Done:
        """One command of a client, from start to end."""
        done = subprocess.run(
            [*_LLMO, *words],
            cwd=self.folder,
            env=self._environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=HANG_S,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Done(done.returncode, done.stdout, done.stderr)

    def ok(self, *words: str, stdin: str = "") -> str:
        """What a command that succeeds prints."""
        done = self.llmo(*words, stdin=stdin)
        assert done.code == 0, done
        return done.out.strip()

    def stop(self) -> None:
        """End every process, however it stands."""
        for node in self.nodes:
            if not node.is_dead:
                node.thaw()
                node.process.send_signal(signal.SIGTERM)
        for node in self.nodes:
            try:
                node.process.wait(20)
            except subprocess.TimeoutExpired:
                node.kill()


_LLMO = [sys.executable, "-m", "llm_orchestrator"]

"""Starts the fake LLM server as a process of its own and reads its ledger."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class FakeServer:
    """A running fake. `url` has no path."""

    def __init__(self, url: str, ledger: Path) -> None:
        self.url = url
        self.ledger = ledger

    def control(self, **order: Any) -> None:
        """POST /control: script, default, reset."""
        request = urllib.request.Request(
            f"{self.url}/control",
            data=json.dumps(order).encode(),
            headers={"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request).close()

    def wait_idle(self) -> None:
        """Block until no request is under way."""
        urllib.request.urlopen(f"{self.url}/control/idle", timeout=30).close()

    def lines(self, contains: str = "") -> list[dict[str, Any]]:
        """Ledger lines of requests whose prompt contains a text, both events of each."""
        with urllib.request.urlopen(f"{self.url}/control/ledger") as response:
            lines = json.load(response)
        ids = {line["id"] for line in lines if contains in line.get("prompt", "")}
        return [line for line in lines if line["id"] in ids]

    def arrived(self, contains: str) -> list[dict[str, Any]]:
        """Requests that came."""
        return [line for line in self.lines(contains) if line["event"] == "arrived"]

    def ended(self, contains: str) -> list[dict[str, Any]]:
        """Requests that ended, and how."""
        return [line for line in self.lines(contains) if line["event"] == "ended"]


@contextmanager
def fake_server(folder: Path, port: int = 0) -> Iterator[FakeServer]:
    """Run `python -m llm_orchestrator.drill.fake_llm` until the block ends."""
    ledger = folder / "ledger.jsonl"
    command = [sys.executable, "-m", "llm_orchestrator.drill.fake_llm"]
    with subprocess.Popen(
        [*command, "--port", str(port), "--ledger", str(ledger)], stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, "the fake server did not start"
            yield FakeServer(json.loads(line)["url"], ledger)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)

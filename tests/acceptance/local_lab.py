"""What the tests of the local model share: the model, pulled once, and one server.

The model lies in `.tools/models` (98 MB, ignored by git) and is pulled by our own code.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
from pathlib import Path

from llm_orchestrator.providers import local_model
from llm_orchestrator.providers.local_server import LocalServer

TOOLS = Path(__file__).resolve().parents[2] / ".tools"


def pulled_model() -> Path:
    """The model's path; quick when it is there."""
    return local_model.pull(TOOLS, lambda _: None)


def data_dir_with_model(folder: Path) -> Path:
    """A data folder of its own, in which the model is found without a copy."""
    target = folder / "models" / local_model.MODEL_FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(pulled_model())
    return folder


def wait_until_gone(pid: int) -> None:
    """By the kernel's own event, not by looking again and again."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with os.fdopen(descriptor) as file:
        assert select.select([file], [], [], 60)[0], f"process {pid} is still there"


class SharedServer:
    """One real server, which a test may kill; `url` starts it again. A `ServerSource`."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.server = LocalServer()

    async def url(self) -> str:
        return await self.server.start(self.data_dir)

    async def close(self) -> None:
        """Stays up for the next test."""

    def stop(self) -> None:
        asyncio.run(self.server.stop())

    def kill(self) -> None:
        """As the kernel's out-of-memory killer would; returns when the process is gone."""
        os.kill(self.server.pid, signal.SIGKILL)
        wait_until_gone(self.server.pid)

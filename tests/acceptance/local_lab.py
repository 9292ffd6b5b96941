"""What the tests of the local model share: the model, pulled once, and one server.

The model lies in `.tools/models` (98 MB, ignored by git) and is pulled by our own code.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
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


class SharedServer:
    """One real server, which a test may kill; `url` starts it again. A `ServerSource`."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.server = LocalServer()
        self.url_of: Callable[[str], str] = lambda url: url
        """What the test's client is told instead: the address of a proxy that cuts."""

    async def url(self) -> str:
        return self.url_of(await self.server.start(self.data_dir))

    async def close(self) -> None:
        """Stays up for the next test."""

    def stop(self) -> None:
        asyncio.run(self.server.stop())

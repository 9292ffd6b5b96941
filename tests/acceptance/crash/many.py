"""Many runs at once in a real process.

    python -m tests.acceptance.crash.many FOLDER URL COUNT

asks for COUNT runs under their idempotency keys, so that a process that comes after a killed one
asks for the same ones, and says on stdout what happens, one JSON line each: how many steps have
finished, when every run is in this process, when all are complete.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from llm_orchestrator.config import Config
from llm_orchestrator.wire import Orchestrator

FLOW = """
name: many
inputs: {number: {type: integer}}
steps:
  - {id: first, type: llm, provider: openai, model: fake, max_tokens: 2, stream: false,
     prompt: "First of {{ inputs.number }} [[fake: delay_ms=2000]]"}
  - {id: second, type: llm, provider: openai, model: fake, max_tokens: 2, stream: false,
     prompt: "Second {{ steps.first.text }} [[fake: delay_ms=2000]]"}
outputs: {said: {value: "{{ steps.first.text }}, {{ steps.second.text }}"}}
"""


class Progress:
    """Counts what the engine publishes."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self.finished = 0

    def heard(self, run_id: str, what: str, key: str, attempt: int, data: dict[str, Any]) -> None:
        if what == "finished":
            self.finished += 1
            say({"finished": self.finished})

    def elapsed(self) -> float:
        return time.monotonic() - self._begun


def say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


async def main(folder: Path, url: str, count: int) -> None:
    flow = folder / "many.yaml"
    await asyncio.to_thread(flow.write_text, FLOW)
    progress = Progress()
    config = Config(
        data_dir=folder,
        runs_max=count,
        secrets={"OPENAI_API_KEY": "key", "OPENAI_BASE_URL": f"{url}/v1"},
    )
    store = f"sqlite:///{folder / 'runs.db'}"
    async with Orchestrator(store, config=config, publish=progress.heard) as engine:
        say({"opened": progress.elapsed()})  # what a dead one left has been taken over
        ids = [await engine.start(flow, {"number": 0}, idempotency_key="0")]  # registers it
        ids += await asyncio.gather(
            *(
                engine.start("many", {"number": number}, idempotency_key=str(number))
                for number in range(1, count)
            )
        )
        say({"accepted": len(set(ids))})
        results = await asyncio.gather(*(engine.result(run_id) for run_id in ids))
    say({"complete": len(results), "results": results, "seconds": progress.elapsed()})


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))

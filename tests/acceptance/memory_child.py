"""A process with an engine whose runs take more memory than it may have: `python -m` this.

Arguments: a folder, the limit in MiB (0: nobody watches), how many runs. Prints what each returned.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from llm_orchestrator import Context, workflow
from llm_orchestrator.engine.driver import NodeOptions
from llm_orchestrator.engine.memory import Memory
from llm_orchestrator.wire import Orchestrator

ROUNDS = 24
MIB = 1 << 20


@workflow
async def hog(ctx: Context, number: int) -> int:
    """Take a little more again and again; all of it is free when the run leaves the process."""
    kept = []
    for _ in range(ROUNDS):
        kept.append(bytearray(b"x") * MIB)
        await ctx.sleep(0.3)
    return len(kept) + number


async def main(folder: Path, limit: int, runs: int) -> None:
    """All runs at once, to the end."""
    memory = Memory(limit * MIB) if limit else None
    engine = Orchestrator(f"sqlite:///{folder}/runs.db", options=NodeOptions(memory=memory))
    async with engine:
        ids = [await engine.start(hog, {"number": number}) for number in range(runs)]
        print(*[await engine.result(run_id) for run_id in ids])


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))

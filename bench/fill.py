"""A store of a wanted size, filled as engines fill it: whole journals, through `commit`.

python -m bench.fill --store URL --megabytes 250 [--archive PLACE]
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections.abc import Iterator

from llm_orchestrator.clock import RealClock, new_run_id
from llm_orchestrator.config import Config
from llm_orchestrator.engine.acceptance import accepted_draft
from llm_orchestrator.engine.machine import Event, Happening, decide
from llm_orchestrator.model import Draft, Entry, Kind, NewRun, RunState, Workflow
from llm_orchestrator.store.base import Append, Batch, Database, Register
from llm_orchestrator.store.check import definition_digest
from llm_orchestrator.store.journal import GENESIS, canonical, encode, link
from llm_orchestrator.wire import make_store

STEPS = 20
RESULT_BYTES = 1_000
UNFINISHED_OF = 50
"""One run in so many waits in the middle of its steps."""
AT_ONCE = 25
_DEFINITION = canonical({"name": "filled", "version": "1", "steps": []})
FLOW = Workflow("filled", "1", definition_digest(_DEFINITION), _DEFINITION)


async def fill(store: Database, size_bytes: int, *, seed: int = 1) -> int:
    """Add runs of STEPS results each until their payloads are `size_bytes`; how many runs."""
    dice = random.Random(seed)
    clock = RealClock()
    await store.commit(Batch(changes=(Register(FLOW),)))
    runs = -(-size_bytes // (STEPS * RESULT_BYTES))
    for start in range(0, runs, AT_ONCE):
        numbers = range(start, min(start + AT_ONCE, runs))
        appends = [_run(new_run_id(clock), number, dice, clock.now_us()) for number in numbers]
        receipt = await store.commit(Batch(appends=appends))
        assert not receipt.refused
    return runs


def _run(run_id: str, number: int, dice: random.Random, now_us: int) -> Append:
    """All of a run in one append."""
    new = NewRun(run_id, FLOW.name, FLOW.version, FLOW.digest, input={"n": number})
    is_unfinished = number % UNFINISHED_OF == 0
    epoch = 1 << 40
    claim = decide(RunState.PENDING, epoch, Happening(Event.CLAIM, owner="a-node-that-is-gone"))
    happening = Happening(Event.WAIT, "signal") if is_unfinished else Happening(Event.COMPLETE)
    end = decide(claim.state, claim.epoch, happening)
    drafts = [accepted_draft(new), claim.draft]
    drafts += _steps(dice, STEPS // 2 if is_unfinished else STEPS)
    drafts.append(end.draft)
    entries: list[Entry] = []
    digest = GENESIS
    for seq, draft in enumerate(drafts, 1):
        columns = (seq, claim.epoch, *draft)
        digest = link(digest, run_id, columns)
        entries.append(Entry(run_id, *columns, digest, now_us))
    return Append(run_id, 0, GENESIS, entries, new, end.change)


def _steps(dice: random.Random, count: int) -> Iterator[Draft]:
    for number in range(count):
        text = dice.randbytes(RESULT_BYTES // 2).hex()
        payload = encode({"result": {"text": text}, "usage": {"output_tokens": 100}})
        yield Draft(Kind.STEP_FINISHED, f"step-{number}", 1, payload)


async def _main(url: str, megabytes: float, archive: str) -> None:
    store = make_store(Config(archive_place=archive), RealClock(), url=url)
    await store.open_as_client(may_create=True)
    runs = await fill(store, int(megabytes * 1e6))
    await store.close()
    print(f"{runs} runs of {STEPS} steps in {store.shown}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.fill")
    parser.add_argument("--store", required=True)
    parser.add_argument("--megabytes", type=float, default=250.0)
    parser.add_argument("--archive", default="", metavar="PLACE", help="a stream archive as well")
    given = parser.parse_args()
    asyncio.run(_main(given.store, given.megabytes, given.archive))

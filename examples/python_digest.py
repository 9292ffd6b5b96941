"""A workflow in Python: fetch several pages at once, then make one digest of them.

Shows: `@workflow`, `@step` with retries, `ctx.gather`, `ctx.map`, and that a finished step is not
done again when the program is started a second time.

    python examples/python_digest.py            # and again: the same run, nothing is read twice
    llmo run examples/python_digest.py:digest -i '{"pages": ["eels", "terns"]}'
"""

import asyncio
import sys
from pathlib import Path

from llm_orchestrator import Context, Orchestrator, step, workflow
from llm_orchestrator.model import Retry

PAGES = {
    "whales": "Whales are mammals. They breathe air.",
    "terns": "Terns fly from pole to pole. They see two summers a year.",
    "eels": "Eels cross an ocean to breed. Nobody has seen them do it.",
}


@step(retry=Retry(max_attempts=5, initial_delay_ms=200))
async def read(page: str) -> str:
    """Anything that may fail or costs money is a step. This one stands for an HTTP request."""
    print(f"reading {page}", file=sys.stderr)
    return PAGES[page]


@step
def first_sentence(text: str) -> str:
    """A plain function is a step as well; it runs in a thread."""
    return text.partition(".")[0] + "."


@workflow
async def digest(ctx: Context, pages: list[str]) -> dict[str, object]:
    """Only what is deterministic stands here; time, chance and the world go through `ctx`."""
    texts = await ctx.gather(*(ctx.step(read, page) for page in pages))
    sentences = await ctx.map(lambda text: ctx.step(first_sentence, text), texts, max_concurrency=2)
    return {"digest": " ".join(sentences), "made_at": ctx.now().isoformat()}


async def main(store: str) -> dict[str, object]:
    async with Orchestrator(store, workflows=[digest]) as orchestrator:
        # The same key gives the same run: started twice, it answers from the journal.
        return await orchestrator.run(digest, {"pages": sorted(PAGES)}, idempotency_key="digest-1")


if __name__ == "__main__":
    place = sys.argv[1] if len(sys.argv) > 1 else "sqlite:///" + str(Path("digest.db"))
    print(asyncio.run(main(place)))

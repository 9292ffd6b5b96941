"""A process of its own for tests of the SQLite store.

`python -m tests.acceptance.sqlite_child WORD PATH` prints one line per fact, and dies as told.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import sys
from pathlib import Path

from llm_orchestrator import Context, Orchestrator, step, workflow
from llm_orchestrator.clock import RealClock
from llm_orchestrator.errors import OrchestratorError
from llm_orchestrator.store.base import Batch
from llm_orchestrator.store.sqlite import SQLiteStore
from tests.store.support import accepting, draft, new_run

NOBODY = 65_534


def say(*words: object) -> None:
    print(*words, flush=True)


def store_of(path: Path) -> SQLiteStore:
    return SQLiteStore(path, node_id=f"child-{os.getpid()}", clock=RealClock())


async def serve(path: Path) -> None:
    """An engine that serves until its standard input ends, or it is killed."""
    store = store_of(path)
    await store.open_as_engine()
    store.on_news(lambda news: say("commit", news.is_due))
    say("ready", store.node_id)
    await asyncio.to_thread(sys.stdin.read)
    await store.close()
    say("closed")


async def die(path: Path) -> None:
    """An engine that is killed while it holds lock, socket and log."""
    store = store_of(path)
    await store.open_as_engine()
    _, append = accepting(new_run(1))
    await store.commit(Batch((append,)))
    say("accepted", append.run_id)
    os.kill(os.getpid(), signal.SIGKILL)


async def client(path: Path) -> None:
    """Another process: accepts two runs, whoever writes."""
    store = store_of(path)
    await store.open_as_client(may_create=True)
    for number in (11, 12):
        _, append = accepting(new_run(number))
        receipt = await store.commit(Batch((append,)))
        say("receipt", len(receipt.refused))
    say("runs", len(await store.look.run_ids()))
    await store.close()


@step
async def grow(size: int) -> str:
    return os.urandom(size // 2).hex()


@workflow
async def fill(ctx: Context, number: int) -> int:
    text = ""
    for _ in range(4):
        text = await ctx.step(grow, 200_000)
        say("finished", number)
    return len(text)


class Complaint(logging.Handler):
    """Waits for the writer to say that there is no room."""

    def __init__(self) -> None:
        super().__init__()
        self.heard = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if "takes no more" in record.getMessage():
            say("complaint", record.getMessage())
            self.heard.set()


async def full(path: Path) -> None:
    """Works against a limit on the size of files, which is lifted once the store complains."""
    complaint = Complaint()
    logging.getLogger("llm_orchestrator").addHandler(complaint)
    async with Orchestrator(f"sqlite:///{path}") as engine:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, resource.RLIM_INFINITY))
        runs = [asyncio.ensure_future(engine.run(fill, {"number": n})) for n in range(16)]
        await complaint.heard.wait()
        say("ended", sum(run.done() for run in runs))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        say("results", set(await asyncio.gather(*runs)))


async def unprivileged(path: Path) -> None:
    """As a user who may not write there."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    store = store_of(path)
    try:
        await store.open_as_engine(patience_s=0)
    except OrchestratorError as error:
        say(type(error).__name__, error.message, "|", error.hint)
    else:
        say("opened")
    await store.close()


async def work(path: Path) -> None:
    """A driver that appends until it is killed; says what was acknowledged."""
    store = store_of(path)
    await store.open_as_engine()
    writer, append = accepting(new_run(1))
    await store.commit(Batch((append,)))
    while True:
        await store.commit(Batch((writer.append(draft()),)))
        say("acknowledged", writer.seq)


WORDS = {
    "serve": serve,
    "die": die,
    "client": client,
    "full": full,
    "unprivileged": unprivileged,
    "work": work,
}


if __name__ == "__main__":
    asyncio.run(WORDS[sys.argv[1]](Path(sys.argv[2])))

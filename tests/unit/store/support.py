"""A spool, a writer that uses it, and a store that says what it sees."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from llm_orchestrator.model import Draft, Kind
from llm_orchestrator.store.base import Batch, Receipt
from llm_orchestrator.store.journal import encode
from llm_orchestrator.store.spool import Spool
from llm_orchestrator.store.spool_file import Offer, SpoolFile, parse
from llm_orchestrator.store.writer import GroupWriter, Head
from tests.store.support import START_US, HandClock

STORE = "5e1f"
PAYLOAD = encode({"result": "a paid answer", "usage": {"cost_usd": 0.25}})
DAY_US = 86_400_000_000


class Disk:
    """A store: says what is on the spool's disk when it is asked; may wait, refuse or fail."""

    def __init__(self, folder: Path, *answers: Receipt | BaseException) -> None:
        self.folder = folder
        self.answers = list(answers)
        self.seen: list[list[str]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = asyncio.Event()

    async def commit(self, batch: Batch) -> Receipt:
        self.seen.append(on_disk(self.folder))
        self.asked.set()
        await self.gate.wait()
        answer = self.answers.pop(0) if self.answers else Receipt()
        if isinstance(answer, BaseException):
            raise answer
        return answer


def open_spool(folder: Path, **changed: Any) -> Spool:
    values = {"store_id": STORE, "clock": HandClock(), **changed}
    return Spool.open(folder, values.pop("node_id", "node-1"), **values)


@asynccontextmanager
async def writing(spool: Spool, disk: Disk) -> AsyncIterator[GroupWriter]:
    writer = GroupWriter(disk, HandClock(), sinks=(spool,))
    writer.start()
    yield writer
    disk.gate.set()
    await writer.close()
    await spool.close()


def paid(writer: GroupWriter, head: Head, step: str = "a") -> asyncio.Future[None]:
    return writer.append(head, (Draft(Kind.STEP_FINISHED, step, 1, PAYLOAD),), is_paid=True)


def free(writer: GroupWriter, head: Head, step: str = "a") -> asyncio.Future[None]:
    return writer.append(head, (Draft(Kind.STEP_FINISHED, step, 1, PAYLOAD),))


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.spool"))


def on_disk(folder: Path) -> list[str]:
    """Runs and steps of all records that are whole and not done with."""
    found = [offer for path in files(folder) for offer in parse(path.read_bytes())[0].values()]
    return sorted(f"{offer.run_id}/{offer.step}" for offer in found)


def names(offers: dict[str, list[Offer]]) -> list[str]:
    return sorted(f"{run_id}/{offer.step}" for run_id, each in offers.items() for offer in each)


async def tidied(spool: Spool) -> None:
    """What was put so far is written, and what the spool's thread was asked for is done."""
    while True:
        is_idle = not spool._in_flight and not spool._waiting and not spool._gone
        await spool._submit(lambda: None)
        if is_idle:
            return


def offer(number: int = 1, **changed: Any) -> Offer:
    made = Offer(f"run-{number}", "a", 1, 7, STORE, 3, b"\x01" * 32, START_US, PAYLOAD)
    return made._replace(**changed)


def leave(folder: Path, *offers: Offer, name: str = "node-1.1.spool") -> Path:
    """A file as an earlier life left it."""
    folder.mkdir(exist_ok=True)
    file = SpoolFile(folder / name)
    file.append(dict(enumerate(offers)))
    file.close()
    return file.path

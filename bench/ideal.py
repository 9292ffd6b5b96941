"""The least that durable steps cost: a sketch, not a product, as the bar to measure against.

One thread commits what has gathered (SQLite, write-ahead log, synchronous=FULL); nothing is read,
no lease, no fencing, no chain, no retries, no record of what a step was called.
"""

from __future__ import annotations

import asyncio
import json
import queue
import sqlite3
import threading
from itertools import count
from pathlib import Path
from typing import NamedTuple

from bench.measure import (
    FAN,
    IN_FLIGHT,
    SEQUENCE,
    STEPS,
    Meter,
    arguments,
    drive,
    finish,
    payload,
    size_of,
)

SCHEMA = """
PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;
CREATE TABLE runs (id TEXT PRIMARY KEY, state TEXT) WITHOUT ROWID;
CREATE TABLE journal (run TEXT, seq INT, output TEXT, PRIMARY KEY (run, seq)) WITHOUT ROWID;
"""
START = "INSERT INTO runs VALUES (?, 'running')"
STEP = "INSERT INTO journal VALUES (?, ?, ?)"
END = "UPDATE runs SET state = 'done' WHERE id = ?"


class Row(NamedTuple):
    """One statement to make durable, and who waits for it."""

    sql: str
    values: tuple[object, ...]
    future: asyncio.Future[None]


class Writer:
    """The thread."""

    def __init__(self, file: Path) -> None:
        self.rows = self.commits = 0
        self._file = file
        self._queue: queue.SimpleQueue[Row] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._work, daemon=True).start()

    def put(self, sql: str, *values: object) -> asyncio.Future[None]:
        future: asyncio.Future[None] = self._loop.create_future()
        self._queue.put(Row(sql, values, future))
        return future

    def _work(self) -> None:
        database = sqlite3.connect(self._file, isolation_level=None)
        database.executescript(SCHEMA)
        while True:
            batch = [self._queue.get()]
            while not self._queue.empty():
                batch.append(self._queue.get_nowait())
            database.execute("BEGIN IMMEDIATE")
            for row in batch:
                database.execute(row.sql, row.values)
            database.execute("COMMIT")
            self.rows, self.commits = self.rows + len(batch), self.commits + 1
            self._loop.call_soon_threadsafe(_land, batch)


def _land(batch: list[Row]) -> None:
    for row in batch:
        row.future.set_result(None)


async def main() -> None:
    chosen = arguments()
    writer, result = Writer(chosen.folder / "ideal.db"), payload(size_of(chosen.work))
    numbers = count()

    async def run(steps: int, *, is_fan: bool = False) -> None:
        run_id = f"0198c0de-0000-7000-8000-{next(numbers):012d}"
        await writer.put(START, run_id)
        rows = (writer.put(STEP, run_id, seq, json.dumps(result)) for seq in range(steps))
        if is_fan:
            await asyncio.gather(*rows)
        else:
            for row in rows:
                await row
        await writer.put(END, run_id)

    await run(5)
    rows, commits, meter = writer.rows, writer.commits, Meter()
    if chosen.work in ("W1", "W4"):
        await drive(lambda: run(STEPS), chosen.runs, IN_FLIGHT)
        done = meter.per_step(chosen.runs * STEPS)
        done["rows_commit"] = round((writer.rows - rows) / (writer.commits - commits), 1)
    elif chosen.work == "W2":
        await run(SEQUENCE)
        done = meter.per_step(SEQUENCE)
    else:
        await run(FAN, is_fan=True)
        done = meter.per_step(FAN)
    finish(**done)


if __name__ == "__main__":
    asyncio.run(main())

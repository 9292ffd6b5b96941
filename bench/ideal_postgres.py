"""The least that durable steps cost on PostgreSQL: a sketch, not a product, as the bar.

One connection commits what has gathered, each kind of row as arrays; nothing is read, no lease, no
fencing, no chain, no retries, no record of what a step was called. W2 is the raw commit: one row
as our journal has them, by a prepared INSERT that commits by itself, one after the other.
"""

from __future__ import annotations

import asyncio
import json
import time
from itertools import count
from typing import Any

import asyncpg  # type: ignore[import-untyped]

from bench.measure import (
    FAN,
    SEQUENCE,
    Meter,
    arguments,
    drive,
    finish,
    in_flight,
    payload,
    size_of,
    steps_of,
)
from llm_orchestrator.clock import RealClock
from llm_orchestrator.store.postgres import PostgresStore

TABLES = """
CREATE TABLE ideal_runs (run_id uuid PRIMARY KEY, state text) WITH (fillfactor = 70);
CREATE TABLE ideal_journal (run_id uuid, seq bigint, output bytea, PRIMARY KEY (run_id, seq));
ALTER TABLE ideal_journal ALTER output SET STORAGE EXTERNAL;
"""
STATEMENTS = (
    "INSERT INTO ideal_runs SELECT unnest($1::uuid[]), 'running'",
    "INSERT INTO ideal_journal SELECT * FROM unnest($1::uuid[], $2::bigint[], $3::bytea[])",
    "UPDATE ideal_runs SET state = 'done' WHERE run_id = ANY ($1::uuid[])",
)
START, STEP, END = range(3)
RAW = """INSERT INTO journal (run_id, seq, epoch, kind, step, attempt, payload, digest, recorded_at)
VALUES ($1, $2, 1, 'step_finished', 'no_op', 1, $3, $4, $5)"""


class Writer:
    """The connection, and the rows that wait for it by kind."""

    def __init__(self, connection: Any, prepared: list[Any]) -> None:
        self.rows = self.commits = 0
        self._connection = connection
        self._prepared = prepared
        self._waiting: list[tuple[int, tuple[Any, ...], asyncio.Future[None]]] = []
        self._wake = asyncio.Event()
        self._task = asyncio.create_task(self._work())

    def put(self, kind: int, *values: object) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((kind, values, future))
        self._wake.set()
        return future

    async def _work(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            batch, self._waiting = self._waiting, []
            kinds = {kind for kind, _, _ in batch}
            if len(kinds) > 1:
                async with self._connection.transaction():
                    await self._send(batch, kinds)
            else:
                await self._send(batch, kinds)
            self.rows, self.commits = self.rows + len(batch), self.commits + 1
            for _, _, future in batch:
                future.set_result(None)

    async def _send(self, batch: list[Any], kinds: set[int]) -> None:
        for kind in sorted(kinds):
            rows = [values for one, values, _ in batch if one == kind]
            await self._prepared[kind].fetch(*zip(*rows, strict=True))


async def raw(connection: Any, url: str) -> dict[str, float]:
    """The raw commit, into the very table that our steps go to."""
    store = PostgresStore(url, node_id="raw", clock=RealClock())
    await store.open()
    await store.close()
    insert = await connection.prepare(RAW)
    value = json.dumps(payload(200)).encode()
    run_id = "0198c0de-0000-7000-8000-000000000000"

    async def one(seq: int) -> None:
        await insert.fetch(run_id, seq, value, bytes(32), time.time_ns() // 1_000)

    for seq in range(10):
        await one(seq)
    meter = Meter()
    for seq in range(10, 10 + SEQUENCE):
        await one(seq)
    return meter.per_step(SEQUENCE)


async def main() -> None:
    chosen = arguments()
    connection = await asyncpg.connect(chosen.store)
    if chosen.work == "W2":
        finish(**await raw(connection, chosen.store))
    await connection.execute(TABLES)
    prepared = [await connection.prepare(statement) for statement in STATEMENTS]
    writer, result = Writer(connection, prepared), payload(size_of(chosen.work))
    numbers = count()

    async def run(steps: int, *, is_fan: bool = False) -> None:
        run_id = f"0198c0de-0000-7000-8000-{next(numbers):012d}"
        await writer.put(START, run_id)
        rows = (writer.put(STEP, run_id, seq, json.dumps(result).encode()) for seq in range(steps))
        if is_fan:
            await asyncio.gather(*rows)
        else:
            for row in rows:
                await row
        await writer.put(END, run_id)

    await run(5)
    rows, commits = writer.rows, writer.commits
    meter = Meter()
    if chosen.work == "W3":
        await run(FAN, is_fan=True)
        finish(**meter.per_step(FAN))
    steps = steps_of(chosen.work)
    await drive(lambda: run(steps), chosen.runs, in_flight(chosen.work))
    done = meter.per_step(chosen.runs * steps)
    done["rows_commit"] = round((writer.rows - rows) / (writer.commits - commits), 1)
    finish(**done)


if __name__ == "__main__":
    asyncio.run(main())

"""The rows that the drivers are compared with: as our journal has them, 200 bytes of result.

Standard library only: it is imported in psycopg's environment, too.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from bench.measure import payload

SIZES = (1, 10, 100, 1_000)
COLUMNS = ("run_id", "seq", "epoch", "kind", "step", "attempt", "payload", "digest", "recorded_at")
TYPES = ("uuid", "bigint", "bigint", "text", "text", "bigint", "bytea", "bytea", "bigint")
TABLE = f"""CREATE TABLE journal (
{", ".join(f"{name} {kind} NOT NULL" for name, kind in zip(COLUMNS, TYPES, strict=True))},
PRIMARY KEY (run_id, seq));
ALTER TABLE journal ALTER payload SET STORAGE EXTERNAL"""
_ARRAYS = ", ".join(f"{{{number}}}::{kind}[]" for number, kind in enumerate(TYPES))
UNNEST = f"INSERT INTO journal ({', '.join(COLUMNS)}) SELECT * FROM unnest({_ARRAYS})"
INSERT = f"INSERT INTO journal ({', '.join(COLUMNS)}) VALUES ({', '.join(['{}'] * len(COLUMNS))})"
COPY = f"COPY journal ({', '.join(COLUMNS)}) FROM STDIN"
Rows = list[tuple[object, ...]]


class Chosen(NamedTuple):
    """What a process is to measure."""

    form: str
    size: int
    url: str
    seconds: float


def arguments() -> Chosen:
    form, size, url, seconds = sys.argv[1:]
    return Chosen(form, int(size), url, float(seconds))


async def measure(send: Callable[[Rows], Awaitable[object]], chosen: Chosen) -> None:
    """Send batches until the time is over; prints rows, seconds, processor seconds."""
    value, seq = json.dumps(payload(200)).encode(), 0
    runs = [uuid.UUID(int=number) for number in range(chosen.size)]
    now = time.time_ns() // 1_000

    def batch() -> Rows:
        nonlocal seq
        seq += 1
        return [(r, seq, 1, "step_finished", "no_op", 1, value, bytes(32), now) for r in runs]

    for _ in range(10):
        await send(batch())
    print("READY", flush=True)
    sys.stdin.readline()
    start, before, rows = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF), 0
    while (wall_s := time.perf_counter() - start) < chosen.seconds:
        await send(batch())
        rows += chosen.size
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(rows, wall_s, cpu_s, flush=True)

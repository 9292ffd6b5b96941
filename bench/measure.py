"""What every contestant measures with: one payload, one way to drive runs, one clock.

Standard library only, because it is imported in every peer's environment, too. Processor time is
that of the whole process, all threads, and is the number that a busy machine spoils least. What
the database spends meanwhile is the session's to measure: it is told when a meter starts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

PROSE = (
    "the model returned a structured answer with several fields that the next step parses into "
    "tool calls and then continues until done invoice order payment context window token budget "
    "retrieval chunk score"
)
IN_FLIGHT = 100
STEPS = 10
SEQUENCE = 200
FAN = 500
STEPS_LONG = 50
"""W1.long: fewer and longer runs, to tell what a step writes from what a run writes."""
CRASH_RUNS = 1_000
WAITING_RUNS = 10_000
SESSION = "BENCH_SESSION"
"""Set in the environment of a contestant whose standard input is the session's."""


def payload(size: int) -> dict[str, Any]:
    """A JSON object of about `size` bytes of word salad; compresses about as well as an answer."""
    chance = random.Random(7)
    value: dict[str, Any] = {"id": 123456, "status": "ok", "usage": {"in": 812, "out": 344}}
    room = max(0, size - len(json.dumps(value)) - 12)
    known = PROSE.split()
    words: list[str] = []
    while sum(map(len, words)) + len(words) < room:
        number = "" if chance.random() < 0.7 else str(chance.randint(0, 99_999))
        words += [chance.choice(known) + number for _ in range(20)]
    value["text"] = " ".join(words)[:room]
    return value


class Meter:
    """Wall and processor seconds since it was made, in this process and in `others`."""

    def __init__(self, others: Sequence[int] = ()) -> None:
        if SESSION in os.environ:  # which looks at the database before we begin
            say("START")
            sys.stdin.readline()
        self._others = others
        self._wall, self._cpu = time.perf_counter(), self._cpu_s()

    def _cpu_s(self) -> float:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime + sum(cpu_s_of(pid) for pid in self._others)

    def per_step(self, steps: int) -> dict[str, float]:
        """What `steps` steps took, as the fields of a result."""
        wall_s, cpu_s = time.perf_counter() - self._wall, self._cpu_s() - self._cpu
        return {
            "steps": steps,
            "steps_s": round(steps / wall_s, 1),
            "ms_step": round(wall_s / steps * 1e3, 4),
            "cpu_ms_step": round(cpu_s / steps * 1e3, 4),
            "wall_s": round(wall_s, 4),
        }


def cpu_s_of(pid: int, *, has_children: bool = False) -> float:
    """Processor seconds of another process, all threads; with those of its dead children, too."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11 : 15 if has_children else 13])) / os.sysconf("SC_CLK_TCK")


def rss_kb() -> int:
    """The process's resident memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") // 1024


async def drive(one: Callable[[], Awaitable[object]], runs: int, in_flight: int) -> None:
    """`runs` runs, at most `in_flight` at once."""
    left = iter(range(runs))

    async def worker() -> None:
        for _ in left:
            await one()

    await asyncio.gather(*(worker() for _ in range(in_flight)))


async def until(is_true: Callable[[], bool], pause_s: float = 0.02) -> None:
    """Look until it is true: the one way that works for every contestant."""
    while not is_true():  # noqa: ASYNC110 - not all of them have an event to wait for
        await asyncio.sleep(pause_s)


def canary(folder: Path, count: int = 40) -> dict[str, float]:
    """How fast disk and processor are right now, so that two rounds can be compared."""
    file = folder / "canary"
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT)
    os.pwrite(descriptor, bytes(1 << 20), 0)
    os.fsync(descriptor)
    delays = []
    for turn in range(count):
        os.pwrite(descriptor, b"x" * 8192, turn * 8192 % (1 << 20))
        start = time.perf_counter()
        os.fdatasync(descriptor)
        delays.append(time.perf_counter() - start)
    os.close(descriptor)
    file.unlink()
    start = time.perf_counter()
    total = 0
    for number in range(1_000_000):
        total += number
    loop_ms = (time.perf_counter() - start) * 1e3
    return {"fsync_us": round(sorted(delays)[count // 2] * 1e6), "loop_ms": round(loop_ms, 1)}


def say(word: str) -> None:
    """A line that the session waits for."""
    print(word, flush=True)


def finish(**fields: object) -> None:
    """Hand the result to the session and leave at once, whatever threads there are."""
    print(json.dumps(fields), flush=True)
    sys.stdout.flush()
    os._exit(0)


def arguments() -> argparse.Namespace:
    """What every contestant is called with."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", help="W1 ... W9, some in two parts: W5-before, W5-after")
    parser.add_argument("--folder", type=Path, required=True, help="where its files may lie")
    parser.add_argument("--store", default="", metavar="URL", help="a database; else a file")
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--archive", default="", metavar="PLACE", help="ours: a stream archive")
    parser.add_argument("--mode", default="sync", help="ours: the archive's, sync or async")
    return parser.parse_args()


def size_of(work: str) -> int:
    """Bytes of a step's result."""
    return 20_000 if work == "W4" else 200


def in_flight(work: str) -> int:
    """How many runs there are at once: W1.500 says it itself."""
    return 500 if work == "W1.500" else IN_FLIGHT


def steps_of(work: str) -> int:
    """Steps of a run in W1, W4 and W8."""
    return STEPS_LONG if work == "W1.long" else STEPS

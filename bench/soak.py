"""Two nodes under mixed load for a while: do they stay as they are?

    python -m bench.soak [--minutes 10] [--rate 15]

One PostgreSQL, two `llmo serve` processes, the fake LLM server with its ledger, and clients that
start runs of every kind through the API, read their streams, send signals, cancel, and scrape
/metrics. Ends with a table: memory and descriptors of each node by minute, their slope over the
second half, p50 and p99 of runs by kind, and what was lost. Exit code 1 when a run did not end as
it must, a call was paid for twice, or memory or descriptors grow.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

from bench.api import percentile, serving
from bench.database import Database
from bench.table import align
from llm_orchestrator.client import AsyncClient, Held
from llm_orchestrator.errors import OrchestratorError
from tests.acceptance.fake_server import FakeServer, fake_server

SAMPLE_S = 5.0
WARM_SHARE = 0.5
"""Caches fill and allocators settle in the first half; the slope is that of the second."""
RSS_KB_PER_MINUTE_MAX = 1_024.0
DESCRIPTORS_PER_MINUTE_MAX = 2.0
WORKFLOWS = """
name: quick
steps:
  - {id: a, type: transform, function: template, template: "{{ inputs.n }} is done", output: [text]}
inputs: {n: {type: integer}}
---
name: says
steps:
  - {id: a, type: llm, provider: fake, model: m, stream: true, output: [text],
     prompt: "soak {{ inputs.n }} [[fake: tokens=30 chunk_delay_ms=20]]"}
inputs: {n: {type: integer}}
---
name: many
steps:
  - id: each
    type: map
    items: "{{ range(20) }}"
    steps:
      - {id: one, type: transform, function: template, template: "item {{ item }}", output: [text]}
---
name: waits
steps:
  - {id: go, type: wait, signal: go, timeout_seconds: 120, output: [got]}
  - {id: after, type: transform, function: template, template: "went", depends_on: [go]}
---
name: sleeps
steps:
  - {id: nap, type: wait, seconds: 3}
  - {id: after, type: transform, function: template, template: "woke", depends_on: [nap]}
"""


class Soak:
    """What was asked and what came of it."""

    def __init__(self, clients: list[AsyncClient], until: float) -> None:
        self.clients = clients
        self.until = until
        self.took_ms: dict[str, list[float]] = defaultdict(list)
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()

    async def load(self, rate: float) -> None:
        """Start `rate` runs a second of all kinds until the time is over, then wait for them."""
        kinds: list[tuple[str, Callable[[int], Coroutine[Any, Any, None]]]] = [
            ("quick", self.quick),
            ("says", self.says),
            ("many", self.many),
            ("waits", self.waits),
            ("sleeps", self.sleeps),
            ("cancelled", self.cancelled),
        ]
        while time.monotonic() < self.until:
            kind, work = random.choices(kinds, weights=[6, 4, 1, 2, 2, 1])[0]
            task = asyncio.create_task(self._one(kind, work))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            await asyncio.sleep(random.expovariate(rate))
        await asyncio.gather(*self._tasks)

    async def _one(self, kind: str, work: Callable[[int], Coroutine[Any, Any, None]]) -> None:
        number, started = next(self._numbers), time.monotonic()
        try:
            await work(number)
            self.outcomes[f"{kind} ok"] += 1
        except (OrchestratorError, AssertionError, LookupError, OSError) as error:
            self.outcomes[f"{kind} WRONG"] += 1
            self.wrong.append(f"{kind} {number}: {error!r}")
        self.took_ms[kind].append((time.monotonic() - started) * 1_000)

    @property
    def client(self) -> AsyncClient:
        return random.choice(self.clients)

    async def finish(self, name: str, inputs: dict[str, Any]) -> Any:
        run = await self.client.execute(name, inputs)
        return await self.client.result(run["run_id"], wait_s=60)

    async def quick(self, number: int) -> None:
        found = await self.finish("quick", {"n": number})
        assert found["state"] == "completed", found

    async def says(self, number: int) -> None:
        run = await self.client.execute("says", {"n": number})
        held = Held()
        async for event in self.client.events(run["run_id"]):
            held.apply(event)
        found = await self.client.result(run["run_id"])
        assert found["state"] == "completed", found
        assert held.text["a"] == found["output"]["a"]["text"], (held.text, found)

    async def many(self, number: int) -> None:
        found = await self.finish("many", {})
        assert found["state"] == "completed", found

    async def waits(self, number: int) -> None:
        run = await self.client.execute("waits", {})
        await asyncio.sleep(random.uniform(0, 2))
        await self.client.signal(run["run_id"], "go", {"n": number})
        found = await self.client.result(run["run_id"], wait_s=60)
        assert found["state"] == "completed", found

    async def sleeps(self, number: int) -> None:
        found = await self.finish("sleeps", {})
        assert found["state"] == "completed", found

    async def cancelled(self, number: int) -> None:
        run = await self.client.execute("waits", {})
        await asyncio.sleep(random.uniform(0, 1))
        await self.client.cancel(run["run_id"])
        found = await self.client.result(run["run_id"], wait_s=60)
        assert found["state"] == "cancelled", found


async def watch(pids: list[int], clients: list[AsyncClient], until: float) -> list[list[float]]:
    """Per sample: minute, then resident KB and descriptors of each node."""
    rows, started = [], time.monotonic()
    while time.monotonic() < until:
        row = [(time.monotonic() - started) / 60]
        for pid in pids:
            row += [rss_kb(pid), descriptors(pid)]
        rows.append(row)
        for client in clients:
            await client.request("GET", "/metrics")
        await asyncio.sleep(SAMPLE_S)
    return rows


def rss_kb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 1024


def descriptors(pid: int) -> float:
    return float(sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()))


def slope(rows: list[list[float]], column: int) -> float:
    """Growth per minute in the second half."""
    half = rows[int(len(rows) * WARM_SHARE) :]
    return linear_regression([row[0] for row in half], [row[column] for row in half]).slope


def report(rows: list[list[float]], soak: Soak, paid_twice: int) -> bool:
    """Print it; True when everything is as it must be."""
    every = max(1, len(rows) // 10)
    names = ["minute", "node 1 KB", "node 1 fds", "node 2 KB", "node 2 fds"]
    print(align([names, *([f"{each:.1f}" for each in row] for row in rows[::every])]))
    slopes = [slope(rows, column) for column in (1, 2, 3, 4)]
    shown = ", ".join(f"{name} {each:+.1f}" for name, each in zip(names[1:], slopes, strict=True))
    print(f"\nslope per minute over the second half: {shown}\n")
    times = [
        [kind, str(len(took)), f"{median(took):.1f}", f"{percentile(took, 99):.1f}"]
        for kind, took in sorted(soak.took_ms.items())
    ]
    print(align([["kind", "runs", "p50 ms", "p99 ms"], *times]))
    print(f"\noutcomes: {dict(soak.outcomes)}; calls paid for twice: {paid_twice}")
    for line in soak.wrong[:20]:
        print(f"wrong: {line}")
    is_flat = max(slopes[0], slopes[2]) <= RSS_KB_PER_MINUTE_MAX
    is_flat = is_flat and max(slopes[1], slopes[3]) <= DESCRIPTORS_PER_MINUTE_MAX
    is_right = is_flat and not soak.wrong and not paid_twice
    print("verdict: " + ("flat, nothing lost" if is_right else "NOT as it must be"))
    return is_right


def paid_twice(fake: FakeServer) -> int:
    """Prompts that were answered more than once."""
    answered = Counter(line["prompt"] for line in fake.arrived("soak "))
    return sum(count - 1 for count in answered.values())


async def work(urls: list[str], pids: list[int], chosen: argparse.Namespace) -> tuple[Any, Soak]:
    until = time.monotonic() + chosen.minutes * 60
    clients = [AsyncClient([url]) for url in urls]
    for text in WORKFLOWS.split("---\n"):
        await clients[0].register(text)
    soak = Soak(clients, until)
    rows, _ = await asyncio.gather(watch(pids, clients, until), soak.load(chosen.rate))
    for client in clients:
        await client.aclose()
    return rows, soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.soak")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=15.0, help="runs per second")
    chosen = parser.parse_args()
    database = Database()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        database.start()
        stack.callback(database.server.stop)
        fake = stack.enter_context(fake_server(folder))
        url = stack.enter_context(database.fresh())
        urls, pids = [], []
        for name in ("one", "two"):
            place = folder / name
            place.mkdir()
            settings = f'[providers.fake]\nbase_url = "{fake.url}/v1"\n'
            (place / "llm-orchestrator.toml").write_text(settings)
            address, process = stack.enter_context(serving(url, place))
            urls.append(address)
            pids.append(process.pid)
        print(
            f"soak: {chosen.minutes:g} minutes on {json.dumps(urls)}", file=sys.stderr, flush=True
        )
        rows, soak = asyncio.run(work(urls, pids, chosen))
        is_right = report(rows, soak, paid_twice(fake))
    return 0 if is_right else 1


if __name__ == "__main__":
    raise SystemExit(main())

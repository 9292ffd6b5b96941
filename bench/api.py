"""What the HTTP side costs: a real `llmo serve`, asked by another process.

    python -m bench.api [--rounds 5] [--postgres] [--write]

A1  runs of one step of 200 bytes by `POST execute`, 100 in flight, against the same runs submitted
    in process; processor time of the server per run
A2  execute and wait, one after the other on an idle system
A3  `/health` while A1 runs
A4  from the provider's writing of a token to its arrival at a reader of the event stream

Each round has a fresh store. Both sides share the machine: the asking process takes a core's part.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
from aiohttp import web

from bench.contestants import ROOT
from bench.database import Database
from bench.measure import canary, cpu_s_of
from bench.page import ROUNDS_MIN, write_part
from bench.table import align, show
from llm_orchestrator.config import Config
from llm_orchestrator.wire import Orchestrator

IN_FLIGHT, RUNS, IDLE_RUNS, STREAMS = 100, 2_000, 100, 20
ONE_STEP = """
name: one
steps:
  - {id: a, type: transform, function: template, template: "%s", output: [text]}
""" % ("x" * 190)
SAYS = """
name: says
steps:
  - {id: a, type: llm, provider: timed, model: m, prompt: hello, stream: true, output: [text]}
"""
GOALS = {"A1 of in process, %": (">=", 40.0), "A4 token to reader, p50 ms": ("<=", 5.0)}
Numbers = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.api")
    parser.add_argument("--rounds", type=int, default=ROUNDS_MIN)
    parser.add_argument("--postgres", action="store_true", help="on PostgreSQL, not SQLite")
    parser.add_argument("--write", action="store_true", help="into docs/explanation/performance.md")
    parser.add_argument("--note", default="", help="a sentence for the page")
    chosen = parser.parse_args()
    found: dict[str, list[float]] = {}
    database = Database() if chosen.postgres else None
    try:
        if database is not None:
            database.start()
        for turn in range(1, chosen.rounds + 1):
            print(f"bench: round {turn} of {chosen.rounds}", file=sys.stderr, flush=True)
            for name, value in asyncio.run(one_round(database)).items():
                found.setdefault(name, []).append(value)
    finally:
        if database is not None:
            database.server.stop()
    text = page(found, chosen)
    print(text)
    if chosen.write:
        write_part("api postgres" if chosen.postgres else "api sqlite", text)


def page(found: dict[str, list[float]], chosen: argparse.Namespace) -> str:
    rows = [("what", "median [min..max]", "goal", "verdict")]
    for name, values in found.items():
        sign, bound = GOALS.get(name, ("", 0.0))
        middle = median(values)
        is_met = middle >= bound if sign == ">=" else middle <= bound
        verdict = ("met" if is_met else "missed") if sign else ""
        spread = f"{show(middle)} [{show(min(values))}..{show(max(values))}]"
        rows.append((name, spread, f"{sign} {bound:g}" if sign else "", verdict))
    head = "**Preliminary**: " if chosen.rounds < ROUNDS_MIN else ""
    store = "PostgreSQL" if chosen.postgres else "SQLite"
    fsync_us = canary(ROOT / ".tools")["fsync_us"]
    note = f" {chosen.note}." if chosen.note else ""
    return (
        f"{head}{time.strftime('%Y-%m-%d')}, {chosen.rounds} rounds on {store}, "
        f"fdatasync {fsync_us:.0f} us.{note}\n\n{align(rows)}"
    )


async def one_round(database: Database | None) -> Numbers:
    async with provider() as provider_url:
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            (folder / "llm-orchestrator.toml").write_text(
                f'[providers.timed]\nbase_url = "{provider_url}/v1"\n'
            )
            with store(database, folder) as url:
                inside = await in_process(url, folder)
            with store(database, folder / "2") as url, serving(url, folder) as (address, process):
                outside = await over_http(address, process.pid)
    outside["A1 in process, runs/s"] = inside
    outside["A1 of in process, %"] = 100 * outside["A1 by POST execute, runs/s"] / inside
    return dict(sorted(outside.items()))


@contextlib.contextmanager
def store(database: Database | None, folder: Path) -> Iterator[str]:
    if database is None:
        folder.mkdir(exist_ok=True)
        yield f"sqlite:///{folder}/runs.db"
        return
    with database.fresh() as url:
        yield url


@contextlib.contextmanager
def serving(url: str, folder: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    environment = {**os.environ, "LLM_ORCHESTRATOR_URL": url, "LLM_ORCHESTRATOR_DATA": str(folder)}
    process = subprocess.Popen(
        [sys.executable, "-m", "llm_orchestrator", "serve", "--port", "0"],
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r'http://[^\s"]+', line):
                break
        else:
            raise SystemExit("bench: the server did not start")
        with (folder / "log").open("w") as log:
            drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=log)
            yield found.group(), process
            process.terminate()
            process.wait(30)
            drain.wait(5)
    finally:
        process.kill()
        process.wait()


async def in_process(url: str, folder: Path) -> float:
    """Runs per second of the same workflow, submitted to an engine in this process."""
    file = folder / "one.yaml"
    file.write_text(ONE_STEP)
    async with Orchestrator(url, config=Config(data_dir=folder)) as engine:
        await engine.run(file)
        places = asyncio.Semaphore(IN_FLIGHT)

        async def one() -> None:
            async with places:
                await engine.run("one")

        started = time.monotonic()
        await asyncio.gather(*(one() for _ in range(RUNS)))
        return RUNS / (time.monotonic() - started)


async def over_http(address: str, pid: int) -> Numbers:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(address, connector=connector) as http:
        for text in (ONE_STEP, SAYS):
            headers = {"content-type": "application/yaml"}
            async with http.post("/api/v1/workflows", data=text, headers=headers) as answer:
                assert answer.status in (200, 201), await answer.text()
        await execute(http, "one")
        numbers = await idle(http)
        numbers |= await crowd(http, pid)
        return numbers | await tokens(http)


async def execute(http: aiohttp.ClientSession, name: str) -> None:
    url = f"/api/v1/workflows/{name}/execute?wait=20"
    async with http.post(url, json={"inputs": {}}) as answer:
        found = await answer.json()
        assert answer.status == 200, found
        assert found["state"] == "completed", found


async def idle(http: aiohttp.ClientSession) -> Numbers:
    times = [await timed(execute(http, "one")) for _ in range(IDLE_RUNS)]
    return {
        "A2 execute and wait, idle, p50 ms": median(times),
        "A2 execute and wait, idle, p99 ms": percentile(times, 99),
    }


async def crowd(http: aiohttp.ClientSession, pid: int) -> Numbers:
    places, health = asyncio.Semaphore(IN_FLIGHT), []

    async def one() -> None:
        async with places:
            await execute(http, "one")

    async def look() -> None:
        while True:
            health.append(await timed(get(http, "/health")))
            await asyncio.sleep(0.02)

    looking = asyncio.create_task(look())
    cpu_s, started = cpu_s_of(pid), time.monotonic()
    await asyncio.gather(*(one() for _ in range(RUNS)))
    took_s, used_s = time.monotonic() - started, cpu_s_of(pid) - cpu_s
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)
    return {
        "A1 by POST execute, runs/s": RUNS / took_s,
        "A1 processor ms per run, server": 1_000 * used_s / RUNS,
        "A3 /health under load, p50 ms": median(health),
        "A3 /health under load, p99 ms": percentile(health, 99),
    }


async def tokens(http: aiohttp.ClientSession) -> Numbers:
    """The provider's tokens are the time at which it wrote them."""
    first, every = [], []
    for _ in range(STREAMS):
        async with http.post("/api/v1/workflows/says/execute", json={"inputs": {}}) as answer:
            run_id = (await answer.json())["run_id"]
        async with http.get(f"/api/v1/runs/{run_id}/events") as stream:
            lags, kind = [], ""
            async for raw in stream.content:
                line = raw.decode().strip()
                if line.startswith("event:"):
                    kind = line[6:].strip()
                elif line.startswith("data:") and kind == "chunk":
                    now = time.monotonic_ns()
                    written = [int(word) for word in json.loads(line[5:])["text"].split()]
                    lags += [(now - each) / 1e6 for each in written]
                elif kind == "end":
                    break
        first.append(lags[0])
        every += lags
    return {
        "A4 first token to reader, p50 ms": median(first),
        "A4 token to reader, p50 ms": median(every),
        "A4 token to reader, p99 ms": percentile(every, 99),
    }


async def get(http: aiohttp.ClientSession, path: str) -> None:
    async with http.get(path) as answer:
        await answer.read()


async def timed(work: Any) -> float:
    started = time.monotonic()
    await work
    return (time.monotonic() - started) * 1_000


def percentile(values: list[float], share: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * share // 100)]


@contextlib.asynccontextmanager
async def provider() -> AsyncIterator[str]:
    """An OpenAI-compatible server whose tokens are times. The first one waits for readers."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for number in range(20):
            await asyncio.sleep(0.2 if number == 0 else 0.02)
            delta = {"content": f"{time.monotonic_ns()} "}
            chunk = {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
            await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        last: Any = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
        last["usage"] = {"prompt_tokens": 1, "completion_tokens": 20}
        await response.write(b"data: " + json.dumps(last).encode() + b"\n\ndata: [DONE]\n\n")
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


if __name__ == "__main__":
    main()

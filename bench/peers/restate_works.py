"""W1 to W5 on Restate: its own server with its own log, no PostgreSQL; a worker behind hypercorn.

Processor time is that of the server, the worker and this driver (perhaps a third) together. In W5
the worker is killed, the server stays: it is timed from the start of the next worker.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from bench.measure import (
    CRASH_RUNS,
    FAN,
    SEQUENCE,
    STEPS,
    Meter,
    arguments,
    drive,
    finish,
    in_flight,
    size_of,
    until,
)

CHOSEN = arguments()
PEER = Path(sys.executable).parents[1]
SERVER = PEER / "server/node_modules/@restatedev/restate-server-linux-x64/bin/restate-server"
UP_S = 30.0


def free_ports(many: int) -> list[int]:
    places = [socket.create_server(("127.0.0.1", 0)) for _ in range(many)]
    ports = [int(place.getsockname()[1]) for place in places]
    for place in places:
        place.close()
    return ports


INGRESS, ADMIN, NODE, WORKER = (f"127.0.0.1:{port}" for port in free_ports(4))


def wait_until_up(url: str) -> None:
    deadline = time.monotonic() + UP_S
    while time.monotonic() < deadline:
        try:
            if httpx.get(url, timeout=2).status_code < 500:
                return
        except httpx.HTTPError:
            time.sleep(0.05)
    raise SystemExit(f"no answer from {url}")


def start_server() -> subprocess.Popen[bytes]:
    settings = {
        "RESTATE_BASE_DIR": str(CHOSEN.folder / "restate"),
        "RESTATE_CLUSTER_NAME": "bench",
        "RESTATE_NODE_NAME": "n1",
        "RESTATE_BIND_IP": "127.0.0.1",
        "RESTATE_INGRESS__BIND_ADDRESS": INGRESS,
        "RESTATE_ADMIN__BIND_ADDRESS": ADMIN,
        "RESTATE_BIND_ADDRESS": NODE,
        "RESTATE_ADVERTISED_ADDRESS": f"http://{NODE}",
        "RESTATE_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
        "RESTATE_LOG_FILTER": "warn",
    }
    with (CHOSEN.folder / "restate.log").open("w") as log:
        server = subprocess.Popen(
            [SERVER, "--listen-mode", "tcp"],
            env={**os.environ, **settings},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    wait_until_up(f"http://{ADMIN}/health")
    return server


def start_worker(*, is_stuck: bool = False) -> subprocess.Popen[bytes]:
    kept = {name: value for name, value in os.environ.items() if name != "BENCH_IS_STUCK"}
    worker = subprocess.Popen(
        [
            *(PEER / "bin" / "hypercorn", "bench.peers.restate_app:app", "--bind", WORKER),
            *("--workers", "0", "--log-level", "ERROR"),
        ],
        env={**kept, **({"BENCH_IS_STUCK": "1"} if is_stuck else {})},
        stdout=subprocess.DEVNULL,
    )
    wait_until_up(f"http://{WORKER}/stat")
    return worker


def stat() -> list[int]:
    return [int(word) for word in httpx.get(f"http://{WORKER}/stat", timeout=30).text.split()]


async def crash(client: httpx.AsyncClient, worker: subprocess.Popen[bytes]) -> None:
    sends = (client.post(f"http://{INGRESS}/bench/crash/send", json={}) for _ in range(CRASH_RUNS))
    await asyncio.gather(*sends)
    await until(lambda: stat()[0] >= CRASH_RUNS, 0.1)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    start = time.perf_counter()
    start_worker()
    await until(lambda: stat()[1] >= CRASH_RUNS)
    finish(s=round(time.perf_counter() - start, 4))


async def main() -> None:
    work = CHOSEN.work
    server, worker = start_server(), start_worker(is_stuck=work == "W5")
    limits = httpx.Limits(max_connections=1_000, max_keepalive_connections=1_000)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        where = {"uri": f"http://{WORKER}", "force": True}
        (await client.post(f"http://{ADMIN}/deployments", json=where)).raise_for_status()

        async def call(handler: str, steps: int) -> Any:
            given = {"steps": steps, "size": size_of(work)}
            answer = await client.post(f"http://{INGRESS}/bench/{handler}", json=given)
            return answer.raise_for_status().json()

        if work == "W5":
            await crash(client, worker)
        await call("chain", 5)
        meter = Meter((server.pid, worker.pid))
        if work == "W2":
            await call("chain", SEQUENCE)
            finish(**meter.per_step(SEQUENCE))
        if work == "W3":
            await call("fan", FAN)
            finish(**meter.per_step(FAN))
        await drive(lambda: call("chain", STEPS), CHOSEN.runs, in_flight(work))
        finish(**meter.per_step(CHOSEN.runs * STEPS))


if __name__ == "__main__":
    asyncio.run(main())

"""While the database is away the API says so at once, and what it accepted before is there later.

Away means here: it refuses connections, it breaks them, or the network swallows everything.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill.postgres_lab import PostgresServer
from llm_orchestrator.drill.proxy import Proxy
from tests.server.support import ECHO, Site, make_config, serve

RESTING = "is not asked for a moment"
KEYS = ["one", "two", "three"]


class Outage(NamedTuple):
    """A database, and how it goes and comes back."""

    url: str
    go: Callable[[], None]
    come_back: Callable[[], None]


@contextlib.contextmanager
def outage(fault: str) -> Iterator[Outage]:
    """`refused`: nobody listens; `reset`: a peer that breaks; `black hole`: nothing comes."""
    with PostgresServer() as server, Proxy(server.port) as proxy:
        url = server.create_database("away")
        through = url.replace(f":{server.port}/", f":{proxy.port}/")
        if fault == "refused":
            yield Outage(url, server.kill, server.start)
        elif fault == "reset":
            yield Outage(through, server.kill, server.start)
        else:
            yield Outage(through, proxy.black_hole, proxy.heal)


@contextlib.asynccontextmanager
async def away(fault: str, parts: str, folder: Path) -> AsyncIterator[tuple[Site, Outage]]:
    with outage(fault) as lab:
        async with serve(make_config(lab.url, folder), parts=parts) as site:
            await site.register(ECHO)
            try:
                yield site, lab
            except BaseException:
                lab.come_back()  # or its node waits long for its last entries
                raise


async def until(site: Site, path: str, status: int) -> httpx.Response:
    """Ask until it is so; the answer then."""
    clock = RealClock()
    while (answer := await site.get(path)).status_code != status:
        await clock.sleep(0.05)
    return answer


async def breaker(site: Site) -> dict[str, Any]:
    found: dict[str, Any] = (await site.get("/health")).json()["components"]["store_breaker"]
    return found


def start(site: Site, key: str) -> Any:
    headers, body = {"idempotency-key": key}, {"inputs": {"topic": key}}
    return site.post("/workflows/echo/execute", body, headers=headers)


def is_problem(answer: httpx.Response) -> bool:
    found = answer.json()
    assert answer.status_code == 503, answer.text
    assert answer.headers["content-type"].startswith("application/problem+json")
    assert int(answer.headers["retry-after"]) >= 1
    assert (found["code"], found["retryable"]) == ("store_unavailable", True)
    return RESTING in found["detail"]


@pytest.mark.parametrize("parts", ["api,worker", "api"])
@pytest.mark.parametrize("fault", ["refused", "reset", "black hole"])
async def test_a_database_that_is_away_is_503_at_once_and_no_key_starts_a_second_run(
    tmp_path: Path, fault: str, parts: str
) -> None:
    async with away(fault, parts, tmp_path) as (site, lab):
        first = (await start(site, "first")).json()["run_id"]
        assert (await breaker(site))["status"] == "healthy"
        lab.go()
        # The first ones find out; each has its limit of time.
        lost = await asyncio.gather(*(start(site, key) for key in KEYS), site.get("/runs"))
        assert [answer.status_code for answer in lost] == [503] * 4
        while (await breaker(site))["status"] != "unhealthy":
            is_problem(await site.get("/runs"))
        crowd = await asyncio.gather(
            *(site.get("/runs") for _ in range(20)),
            *(start(site, "never") for _ in range(10)),
            *(site.post(f"/runs/{first}/cancel") for _ in range(5)),
            *(site.register(ECHO) for _ in range(5)),
        )
        resting = [is_problem(answer) for answer in crowd]
        assert resting.count(True) >= 35, "the store was asked by a crowd"
        assert (await site.get("/health/live")).status_code == 200
        told = await until(site, "/health/ready", 503)
        assert any("the store cannot be written" in each for each in told.json()["reasons"])
        health = (await site.get("/health")).json()
        assert health["status"] == "unhealthy"
        assert "open" in health["components"]["store_breaker"]["detail"]
        lab.come_back()
        await until(site, "/health/ready", 200)
        while (await breaker(site))["status"] != "healthy":
            await site.get("/runs")
        again = [(await start(site, key)).json()["run_id"] for key in ["first", *KEYS]]
        assert again[0] == first
        found = (await site.get("/runs")).json()["items"]
        assert sorted(run["run_id"] for run in found) == sorted(again)
        if parts == "api":
            return
        for run_id in again:
            await site.until(run_id, "completed")
        assert (await site.execute("echo", {"topic": "y"}))["output"] == {"said": "y!"}

"""While the database is away the API says so, and what it accepted before is there afterwards."""

from __future__ import annotations

from pathlib import Path

from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill.postgres_lab import PostgresServer
from tests.server.support import ECHO, Site, make_config, serve


async def ready(site: Site, status: int) -> None:
    """Ask until it is so."""
    clock = RealClock()
    while (await site.get("/health/ready")).status_code != status:
        await clock.sleep(0.05)


async def test_a_database_that_is_away_is_503_and_no_key_starts_a_second_run(
    tmp_path: Path,
) -> None:
    headers, body = {"idempotency-key": "k"}, {"inputs": {"topic": "x"}}
    with PostgresServer() as server:
        async with serve(make_config(server.create_database("away"), tmp_path)) as site:
            await site.register(ECHO)
            first = await site.post(
                "/workflows/echo/execute", body, headers=headers, params={"wait": 20}
            )
            server.kill()
            await ready(site, 503)
            assert (await site.get("/health/live")).status_code == 200
            health = await site.get("/health")
            assert (health.status_code, health.json()["status"]) == (503, "unhealthy")
            assert health.json()["components"]["store"]["detail"]
            refused = await site.get("/runs")
            assert (refused.status_code, refused.json()["retryable"]) == (503, True)
            assert int(refused.headers["retry-after"]) >= 1
            server.start()
            await ready(site, 200)
            again = await site.post("/workflows/echo/execute", body, headers=headers)
            assert again.json()["run_id"] == first.json()["run_id"]
            found = (await site.get("/runs")).json()["items"]
            assert [run["run_id"] for run in found] == [first.json()["run_id"]]
            assert (await site.execute("echo", {"topic": "y"}))["output"] == {"said": "y!"}

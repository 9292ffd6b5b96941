"""Health at the root: what it says, and what it does not need."""

from __future__ import annotations

import httpx

from tests.server.support import Site


async def test_health_names_every_component_without_a_token(site: Site) -> None:
    async with httpx.AsyncClient(base_url=site.serving.url, trust_env=False) as http:
        answer = await http.get("/health")
    found = answer.json()
    assert (answer.status_code, found["status"]) == (200, "healthy")
    assert {"store", "node", "providers", "maintenance"} <= set(found["components"])
    assert found["components"]["store"]["latency_ms"] > 0
    assert found["node"] == site.serving.name


async def test_a_server_that_works_is_live_started_and_ready(site: Site) -> None:
    for name in ("live", "startup", "ready"):
        answer = await site.get(f"/health/{name}")
        assert (answer.status_code, answer.json()["status"]) == (200, "healthy"), answer.text

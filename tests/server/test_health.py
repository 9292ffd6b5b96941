"""Health at the root: what it says, and what it does not need."""

from __future__ import annotations

import httpx
import pytest

from llm_orchestrator.model import Draft, Kind
from llm_orchestrator.server import routes_health
from llm_orchestrator.store.writer import Head
from tests.server.support import Site


async def test_health_names_every_component_without_a_token(site: Site) -> None:
    async with httpx.AsyncClient(base_url=site.serving.url, trust_env=False) as http:
        answer = await http.get("/health")
    found = answer.json()
    assert (answer.status_code, found["status"]) == (200, "healthy")
    assert {"store", "store_breaker", "node", "providers", "maintenance"} <= set(
        found["components"]
    )
    assert found["components"]["store"]["latency_ms"] > 0
    assert found["node"] == site.serving.name


async def test_a_server_that_works_is_live_started_and_ready(site: Site) -> None:
    for name in ("live", "startup", "ready"):
        answer = await site.get(f"/health/{name}")
        assert (answer.status_code, answer.json()["status"]) == (200, "healthy"), answer.text


async def test_results_that_wait_for_the_store_degrade_health(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = site.serving.surface.node
    assert node is not None
    before = (await site.get("/health")).json()["components"].get("spool")
    if node.spool is None:  # a file has no second place that would be safer
        assert before is None
        return
    assert (before["status"], before["detail"]) == ("healthy", "0 results are held, 0 bytes")
    draft = Draft(Kind.STEP_FINISHED, "paid", 1, b"x" * 1_000)
    copy = node.spool.put(Head("00000000-0000-7000-8000-000000000000"), draft)
    await copy.written()
    assert (await site.get("/health")).json()["components"]["spool"]["status"] == "healthy"
    monkeypatch.setattr(routes_health, "LANDING_S", 0.0)
    found = (await site.get("/health")).json()
    assert (found["status"], found["components"]["spool"]["status"]) == ("degraded", "degraded")
    assert "1 results are held, 1000 bytes" in found["components"]["spool"]["detail"]
    copy.settle(is_landed=True)
    after = (await site.get("/health")).json()
    assert (after["status"], after["components"]["spool"]) == ("healthy", before)

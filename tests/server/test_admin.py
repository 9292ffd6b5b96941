"""The server itself over HTTP: settings, statistics, nodes, maintenance, breakers."""

from __future__ import annotations

from llm_orchestrator.providers.breaker import State, Verdict
from llm_orchestrator.store.base import Batch, PutRecord
from tests.server.support import ECHO, TOKEN, WAITS, Site


async def test_settings_are_told_with_their_origin_and_without_secrets(site: Site) -> None:
    answer = await site.get("/admin/config")
    found = {item["name"]: item for item in answer.json()["items"]}
    assert found["port"]["origin"] == "default"
    assert found["token"]["value"] == "***"
    assert TOKEN not in answer.text


async def test_statistics_count_runs_and_nodes(site: Site) -> None:
    await site.register(ECHO)
    for _ in range(2):
        await site.execute("echo", {"topic": "x"})
    found = (await site.get("/admin/stats")).json()
    assert {"state": "completed", "workflow": "echo", "count": 2} in found["runs"]
    assert found["nodes"] == {"alive": 1}
    assert (found["waiting"], found["stalled"], found["epoch"]) == (0, 0, 1)


async def test_maintenance_refuses_new_runs_and_says_who_and_why(site: Site) -> None:
    await site.register(ECHO)
    await site.register(WAITS)
    run_id = (await site.execute("waits", wait=0))["run_id"]
    body = {"inputs": {"topic": "x"}}
    keyed = {"headers": {"idempotency-key": "k"}, "params": {"wait": 20}}
    first = await site.post("/workflows/echo/execute", body, **keyed)
    await site.until(run_id, "waiting")
    on = await site.post("/admin/maintenance/enable", {"reason": "disk", "retry_after_s": 7})
    assert (on.status_code, on.json()["by"], on.json()["reason"]) == (200, "token", "disk")
    refused = await site.post("/workflows/echo/execute", body)
    assert (refused.status_code, refused.json()["code"]) == (503, "maintenance")
    assert refused.headers["retry-after"] == "7"
    again = await site.post("/workflows/echo/execute", body, **keyed)
    assert again.json() == first.json() | {"is_repeat": True}
    ready = await site.get("/health/ready")
    assert (ready.status_code, len(ready.json()["reasons"])) == (503, 1)
    health = await site.get("/health")
    assert (health.status_code, health.json()["status"]) == (200, "degraded")
    assert (await site.post(f"/runs/{run_id}/approve")).status_code == 200
    assert (await site.get(f"/runs/{run_id}/result", wait=20)).json()["state"] == "completed"
    off = await site.post("/admin/maintenance/disable")
    assert (off.status_code, off.json()["enabled"]) == (200, False)
    assert (await site.post("/workflows/echo/execute", body)).status_code == 202


async def test_a_drained_node_is_not_ready_until_it_is_undrained(site: Site) -> None:
    node = (await site.get("/admin/nodes")).json()["items"][0]
    assert (node["state"], node["is_drained"]) == ("alive", False)
    name = node["node_id"]
    drained = await site.post(f"/admin/nodes/{name}/drain", {"reason": "moving"})
    assert drained.json() == {"node_id": name, "is_drained": True}
    ready = await site.get("/health/ready")
    assert (ready.status_code, "drained" in ready.json()["reasons"][0]) == (503, True)
    assert (await site.get("/admin/nodes")).json()["items"][0]["is_drained"] is True
    assert (await site.post(f"/admin/nodes/{name}/undrain")).status_code == 200
    assert (await site.get("/health/ready")).status_code == 200
    assert (await site.post("/admin/nodes/nobody/drain")).status_code == 404


async def test_an_open_breaker_is_told_and_can_be_reset(site: Site) -> None:
    opened = Verdict(State.OPEN, until=9e9, openings=2).to_json()
    change = PutRecord("breaker", "openai/gpt", opened, 0)
    await site.serving.surface.store.commit(Batch(changes=(change,)))
    found = (await site.get("/admin/circuit-breakers")).json()["items"]
    assert [(each["name"], each["state"]) for each in found] == [("openai/gpt", "open")]
    health = (await site.get("/health")).json()
    assert health["components"]["providers"]["status"] == "degraded"
    for was_open in (True, False):
        done = await site.post("/admin/circuit-breaker/reset", {"name": "openai/gpt"})
        assert done.json() == {"name": "openai/gpt", "was_open": was_open, "woken": 0}
    unknown = await site.post("/admin/circuit-breaker/reset", {"name": "nobody/x"})
    assert unknown.status_code == 404

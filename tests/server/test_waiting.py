"""Waiting for a run's end: told at once where it is driven, found out elsewhere, nothing left."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.server.support import ECHO, WAITS, Site, make_config, serve


async def test_whoever_gives_up_waiting_leaves_nothing_behind(site: Site) -> None:
    await site.register(WAITS)
    run_id = (await site.execute("waits", wait=0.05))["run_id"]
    for _ in range(3):
        assert (await site.get(f"/runs/{run_id}/result", wait=0.05)).status_code == 202
    node = site.serving.surface.node
    assert node is not None
    assert node.driver._ends == {}


async def test_an_end_here_is_told_without_a_look_at_the_store(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    await site.register(ECHO)
    await site.execute("echo", {"topic": "x"})
    look = site.serving.surface.store.look
    looks: list[str] = []
    for name in ("load", "run", "row"):

        async def spy(*given: Any, _name: str = name, **named: Any) -> None:
            looks.append(_name)

        monkeypatch.setattr(look, name, spy)
    found = await site.execute("echo", {"topic": "y"})
    assert (found["output"], looks) == ({"said": "y!"}, [])


async def test_many_who_wait_for_one_run_are_all_told(site: Site) -> None:
    await site.register(WAITS)
    run_id = (await site.execute("waits", wait=0))["run_id"]
    await site.until(run_id, "waiting")
    waiting = [asyncio.create_task(site.get(f"/runs/{run_id}/result", wait=60)) for _ in range(20)]
    assert (await site.post(f"/runs/{run_id}/approve")).status_code == 200
    states = {(await each).json()["state"] for each in waiting}
    assert states == {"completed"}


async def test_a_process_without_a_node_finds_out_when_a_run_ends_elsewhere(
    store_url: str, tmp_path: Path
) -> None:
    config = make_config(store_url, tmp_path)
    async with serve(config) as worker, serve(config, parts="api") as api:
        await api.register(ECHO)
        found = await api.execute("echo", {"topic": "x"}, wait=60)
        assert (found["state"], found["output"]) == ("completed", {"said": "x!"})
        await worker.register(WAITS)
        run_id = (await api.execute("waits", wait=0))["run_id"]
        await worker.until(run_id, "waiting")
        waiting = asyncio.create_task(api.get(f"/runs/{run_id}/result", wait=60))
        assert (await api.post(f"/runs/{run_id}/cancel")).status_code == 200
        assert (await waiting).json()["state"] == "cancelled"
        assert api.serving.surface.waiting._bells == {}

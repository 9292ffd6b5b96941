"""SIGHUP's work on an open engine: what can change is in force at once, the rest is named."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from llm_orchestrator import Context, step, workflow
from llm_orchestrator.config import Config
from llm_orchestrator.engine.driver import NodeOptions
from llm_orchestrator.errors import ConfigError, RunFailed
from llm_orchestrator.store.base import QueueLimit
from llm_orchestrator.wire import Orchestrator
from llm_orchestrator.wire.orchestrator import node_options
from llm_orchestrator.wire.reload import RELOADABLE, reload


class Meter:
    """How many steps are done at a time; each waits until `wanted` have been."""

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.running = self.most = 0
        self.reached = asyncio.Event()

    async def pass_through(self) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        if self.most >= self.wanted:
            self.reached.set()
        await self.reached.wait()
        await asyncio.sleep(0)
        self.running -= 1


meters: list[Meter] = []
FETCH = """
name: fetch
steps:
  - {{id: get, type: action, action: http, url: "http://127.0.0.1:{port}/",
     retry: {{max_attempts: 1}}}}
outputs:
  said: "{{{{ steps.get.body }}}}"
"""


@step
async def count(number: int) -> int:
    """As the meter has it."""
    await meters[-1].pass_through()
    return number


@workflow(queue="narrow")
async def narrow(ctx: Context, number: int) -> int:
    return await ctx.step(count, number)


def settings(folder: Path, **more: Any) -> Config:
    return Config(data_dir=folder, store=f"sqlite:///{folder}/runs.db", **more)


async def test_queues_and_bounds_change_while_it_runs(tmp_path: Path) -> None:
    old = settings(tmp_path, queues={"narrow": 1}, steps_max=10)
    async with Orchestrator(config=old) as engine:
        for limit in (1, 3):
            new = replace(old, queues={"narrow": limit}, memory_limit_mb=123_456)
            reload(old, new, engine)
            meters.append(Meter(limit))
            ids = [await engine.start(narrow, {"number": n}) for n in range(12)]
            assert [await engine.result(run_id) for run_id in ids] == list(range(12))
            assert meters[-1].most == limit
        options = engine.node.driver.options
        assert options.queues == {"narrow": QueueLimit(3)}
        assert options.memory is not None
        assert 123_456 << 20 in [bound.limit for bound in options.memory.bounds]
        assert options.steps_max == 10


async def test_what_cannot_change_is_named_and_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = settings(tmp_path)
    async with Orchestrator(config=old) as engine:
        new = replace(old, port=9, region="mars", drain_timeout_s=3.0, runs_max=7)
        done = reload(old, new, engine)
        assert (set(done.changed), set(done.waiting)) == (
            {"drain_timeout_s", "runs_max"},
            {"port", "region"},
        )
        assert (done.config.drain_timeout_s, done.config.runs_max) == (3.0, 7)
        assert (done.config.port, done.config.region) == (old.port, old.region)
        assert engine.node.driver.options.runs_max == 7
        said = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
        assert any("need a restart" in text and "region" in text for text in said)
        assert reload(done.config, done.config, engine)[:2] == ((), ())


async def test_what_the_command_line_set_stays_as_it_is(tmp_path: Path) -> None:
    old = settings(tmp_path)
    options: NodeOptions = node_options(old, runs_max=5)
    async with Orchestrator(config=old, options=options) as engine:
        reload(old, replace(old, steps_max=3), engine)
        assert engine.node.driver.options.runs_max == 5
        assert engine.node.driver.options.steps_max == 3


async def test_nonsense_changes_nothing(tmp_path: Path) -> None:
    old = settings(tmp_path, queues={"narrow": 1})
    async with Orchestrator(config=old) as engine:
        with pytest.raises(ConfigError, match="narrow"):
            reload(old, replace(old, queues={"narrow": "many"}, runs_max=3), engine)
        assert engine.node.driver.options.queues == {"narrow": QueueLimit(1)}
        assert engine.node.driver.options.runs_max == old.runs_max


async def test_a_providers_limit_changes_but_not_its_address(tmp_path: Path) -> None:
    def provider(**table: Any) -> dict[str, Any]:
        return {"house": {"base_url": "http://h/v1", **table}}

    old = settings(tmp_path, providers=provider(requests_per_minute=5))
    async with Orchestrator(config=old) as engine:
        tools = engine._make_tools()
        tools.providers.llm("house")
        guard = tools.providers._guards.of("house", "m")  # type: ignore[attr-defined]
        assert guard.limiter._limit.requests_per_minute == 5
        new = replace(old, providers=provider(requests_per_minute=50))
        assert reload(old, new, engine).changed == ("providers",)
        assert guard.limiter._limit.requests_per_minute == 50
        gone = replace(old, providers=provider())
        assert reload(new, gone, engine).changed == ("providers",)
        assert guard.limiter is None
        moved = replace(old, providers={"house": {"base_url": "http://other/v1"}})
        assert reload(gone, moved, engine).waiting == ("providers",)


async def test_what_workflows_may_reach_changes_for_the_next_request(tmp_path: Path) -> None:
    visits = 0

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        nonlocal visits
        visits += 1
        return web.Response(text="here")

    runner = web.ServerRunner(web.Server(handle), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    flow = tmp_path / "fetch.yaml"
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
    flow.write_text(FETCH.format(port=port))
    closed = settings(tmp_path)
    open_ = replace(closed, outgoing_allow=["127.0.0.0/8"])
    async with Orchestrator(config=closed) as engine:
        with pytest.raises(RunFailed, match="may not reach"):
            await engine.run(flow)
        assert reload(closed, open_, engine).changed == ("outgoing_allow",)
        assert await engine.run(flow) == {"said": "here"}
        with pytest.raises(ConfigError, match="outgoing_allow"):
            reload(open_, replace(open_, outgoing_allow=["a b"], runs_max=3), engine)
        assert engine.node.driver.options.runs_max == open_.runs_max
        assert await engine.run(flow) == {"said": "here"}
        assert reload(open_, closed, engine).changed == ("outgoing_allow",)
        with pytest.raises(RunFailed, match="may not reach"):
            await engine.run(flow)
    assert visits == 2
    await runner.cleanup()


def test_every_name_is_a_setting() -> None:
    assert set(Config.__dataclass_fields__) >= RELOADABLE

"""`/metrics` of a real server: what Prometheus reads, also while the store is away."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill.postgres_lab import PostgresServer
from llm_orchestrator.drill.proxy import Proxy
from tests.server.support import ECHO, FAILS, WAITS, Site, make_config, serve
from tests.store.trouble.support import through

ROOT = Path(__file__).resolve().parents[2]
PROMTOOL = shutil.which("promtool", path=f"{ROOT}/.tools/bin{os.pathsep}{os.environ['PATH']}")
TALK = """
name: talk
inputs: {}
steps: [{id: say, type: llm, provider: echo, model: parrot, prompt: one two three}]
"""


class Page:
    """One reading of `/metrics`."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float | None:
        """A value by its name without our prefix; None when it is not there."""
        return self.samples.get((f"llm_orchestrator_{name}", frozenset(labels.items())))

    def all(self, name: str) -> dict[frozenset[tuple[str, str]], float]:
        """Every value of a name."""
        whole = f"llm_orchestrator_{name}"
        return {labels: value for (own, labels), value in self.samples.items() if own == whole}


async def scrape(site: Site) -> Page:
    answer = await site.http.get("/metrics")
    assert answer.status_code == 200
    return Page(answer.text)


@pytest.fixture(params=["sqlite", "postgres"])
async def site(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Site]:
    url = f"sqlite:///{tmp_path / 'runs.db'}"
    if request.param == "postgres":
        url = request.getfixturevalue("postgres_url")
    async with serve(make_config(url, tmp_path)) as found:
        yield found


async def test_work_shows_on_the_page(site: Site) -> None:
    for text in (ECHO, FAILS, WAITS, TALK):
        assert (await site.register(text)).status_code == 201
    for _ in range(3):
        await site.execute("echo", {"topic": "whales"})
    await site.execute("fails")
    await site.execute("talk")
    waits = await site.execute("waits", wait=0)
    await site.until(waits["run_id"], "waiting")
    page = await scrape(site)
    assert page("runs", state="completed", workflow="echo") == 3
    assert page("runs", state="waiting", workflow="waits") == 1
    assert page("runs_accepted_total", workflow="echo") == 3
    assert page("runs_finished_total", workflow="fails", state="failed") == 1
    assert page("run_duration_seconds_count", workflow="echo") == 3
    assert page("steps_total", type="transform", outcome="completed") == 5
    assert page("steps_total", type="transform", outcome="failed") == 1
    model = {"provider": "echo", "model": "parrot"}
    assert page("llm_requests_total", outcome="ok", **model) == 1
    tokens = page("llm_tokens_total", direction="output", **model)
    assert tokens is not None
    assert tokens > 0
    assert page("queue_depth", queue="default") == 0
    assert page("runs_accepted_minus_advanced") == 0
    assert page("nodes", state="alive") == 1
    assert page("epoch") == 1
    assert page("store_reachable") == page("store_writable") == 1
    landed = page("commits_total", outcome="landed")
    assert landed is not None
    assert landed > 10
    execute = {"method": "POST", "route": "/api/v1/workflows/{name}/execute"}
    assert page("http_requests_total", status="200", **execute) == 5
    old = {("workflow_name", "echo"), ("status", "completed")}
    assert page.samples["orchestrator_workflow_executions_total", frozenset(old)] == 3


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool here")
async def test_promtool_accepts_the_live_page(site: Site) -> None:
    await site.register(ECHO)
    await site.execute("echo", {"topic": "whales"})
    await scrape(site)
    page = await scrape(site)
    assert PROMTOOL is not None
    done = await asyncio.to_thread(
        subprocess.run,
        [PROMTOOL, "check", "metrics"],
        input=page.text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


async def test_nobody_needs_a_token_and_no_run_is_named(site: Site) -> None:
    await site.register(WAITS)
    waits = await site.execute("waits", wait=0)
    await site.until(waits["run_id"], "waiting")
    async with httpx.AsyncClient(trust_env=False) as stranger:
        answer = await stranger.get(f"{site.serving.url}/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert waits["run_id"] not in answer.text


async def test_openmetrics_comes_to_who_accepts_it(site: Site) -> None:
    wanted = {"accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"}
    answer = await site.http.get("/metrics", headers=wanted)
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


async def test_paths_that_lead_nowhere_are_one_series(site: Site) -> None:
    for number in range(50):
        await site.http.get(f"/nowhere/{number}")
    page = await scrape(site)
    assert page("http_requests_total", method="GET", route="other", status="404") == 50
    assert not [labels for labels in page.all("http_requests_total") if "nowhere" in str(labels)]


async def test_a_stream_is_open_while_somebody_listens(site: Site) -> None:
    await site.register(WAITS)
    waits = await site.execute("waits", wait=0)
    async with site.http.stream("GET", f"/api/v1/runs/{waits['run_id']}/events") as answer:
        assert answer.status_code == 200
        assert (await scrape(site))("streams_open") == 1
    clock = RealClock()
    while (await scrape(site))("streams_open"):
        await clock.sleep(0.01)


async def test_a_process_that_only_executes_shows_its_page_too(tmp_path: Path) -> None:
    config = make_config(f"sqlite:///{tmp_path / 'runs.db'}", tmp_path)
    async with serve(config, parts="worker") as site:
        assert (await scrape(site))("nodes", state="alive") == 1
        assert (await site.get("/workflows")).status_code == 404


async def test_the_page_is_there_while_the_store_is_away(
    postgres_server: PostgresServer, postgres_url: str, tmp_path: Path
) -> None:
    with Proxy(postgres_server.port) as proxy:
        config = make_config(through(postgres_url, proxy.port), tmp_path)
        async with serve(config) as site:
            await site.register(ECHO)
            await site.execute("echo", {"topic": "whales"})
            page = await scrape(site)
            assert (page("store_reachable"), page("store_writable")) == (1, 1)
            assert page("pool_size") == 10
            assert page("replication_standbys", sync="true") == 0
            assert page.all("node_lease_age_seconds")
            proxy.black_hole()
            clock = RealClock()
            while (page := await scrape(site))("store_reachable"):
                await clock.sleep(0.05)  # what it knew was still fresh
            assert page("store_writable") == 0
            assert page.all("runs") == {}
            assert page("runs_finished_total", workflow="echo", state="completed") == 1
            proxy.heal(is_old_lost=True)
            while not (await scrape(site))("store_writable"):
                await clock.sleep(0.05)

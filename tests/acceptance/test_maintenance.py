"""Maintenance mode on real nodes: no new runs anywhere, also after a restart; reads work."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llm_orchestrator.engine.maintenance import KIND, MODE
from tests.acceptance.cluster.nodes import Cluster, NodeProcess, until
from tests.acceptance.fake_server import FakeServer, fake_server
from tests.acceptance.site import DATABASES, Site, site_on

pytestmark = [pytest.mark.serial, pytest.mark.timeout(300)]
FLOW = """\
name: slow
inputs: {number: {type: integer, default: 0}}
steps:
  - {id: first, type: llm, provider: house, model: fake, max_tokens: 2, stream: false,
     prompt: "First of {{ inputs.number }} [[fake: delay_ms=1500]]"}
  - {id: second, type: llm, provider: house, model: fake, max_tokens: 2, stream: false,
     depends_on: [first], prompt: "Then {{ inputs.number }}"}
"""


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    with fake_server(tmp_path_factory.mktemp("fake")) as made:
        yield made


@pytest.fixture(params=DATABASES)
def site(request: pytest.FixtureRequest, tmp_path: Path, fake: FakeServer) -> Iterator[Site]:
    with site_on(request.param, tmp_path, fake) as made:
        made.fake.control(reset=True)
        yield made


def url_of(node: NodeProcess) -> str:
    assert node.node_id
    line = next(line for line in node.said.splitlines() if "ready: " in line)
    return str(re.findall(r"http://[\w.:]+", line)[-1])


def ask(url: str, body: Any = None) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of one request."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, dict(response.headers), json.loads(response.read() or b"null")
    except urllib.error.HTTPError as error:
        headers = {key.lower(): value for key, value in error.headers.items()}
        return error.code, headers, json.loads(error.read() or b"null")


def execute(node: NodeProcess) -> tuple[int, dict[str, str], Any]:
    """Ask a node for a new run over HTTP."""
    return ask(f"{url_of(node)}/api/v1/workflows/slow/execute", {"inputs": {"number": 9}})


def refuses(node: NodeProcess) -> bool:
    """True while a new run is sent away."""
    return execute(node)[0] == 503


def takes(node: NodeProcess) -> bool:
    """True when a new run is taken."""
    return execute(node)[0] < 300


def switch(cluster: Cluster, *words: str) -> None:
    cluster.ok("maintenance", *words)


def test_new_runs_are_refused_at_every_door_and_the_old_ones_go_on(site: Site) -> None:
    nodes = [site.cluster.node(name) for name in (("a", "b") if site.is_shared else ("a",))]
    assert all(node.node_id for node in nodes)
    site.submit(FLOW, [{"number": n} for n in range(6)])
    until(lambda: len(site.calls()) == 6, "first steps under way")
    switch(site.cluster, "enable", "--reason", "new disks", "--retry-after", "77", "--by", "ada")
    for node in nodes:
        until(partial(refuses, node), "a node that has heard of it")
        status, headers, problem = execute(node)
        assert (status, headers["retry-after"], problem["code"]) == (503, "77", "maintenance")
        assert problem["retryable"]
        assert "ada" in problem["detail"]
        assert "new disks" in problem["detail"]
        assert ask(f"{url_of(node)}/api/v1/workflows")[0] == 200
    refused = site.cluster.llmo("run", "flow.yaml", "--detach")
    assert refused.code == 1
    assert "ada switched maintenance on: new disks" in refused.err
    fork = site.cluster.llmo("runs", "fork", site.runs()[0].run_id)
    assert "new disks" in fork.err
    site.wait_completed(6)
    assert "maintenance" in site.cluster.ok("nodes", "list")
    for node in nodes:
        assert node.terminate() == 0
        node.start()
    assert execute(nodes[0])[0] == 503, "a restart has forgotten it"
    assert '"reason": "new disks"' in site.cluster.ok("maintenance", "show", "-o", "json")
    switch(site.cluster, "disable")
    for node in nodes:
        until(partial(takes, node), "a node that takes runs again")
    site.wait_completed(6 + len(nodes))


def test_a_draining_maintenance_lets_everything_go_and_takes_it_up_again(site: Site) -> None:
    nodes = [site.cluster.node(name) for name in (("a", "b") if site.is_shared else ("a",))]
    assert all(node.node_id for node in nodes)
    site.submit(FLOW, [{"number": n} for n in range(6)])
    until(lambda: len(site.calls()) == 6, "first steps under way")
    switch(site.cluster, "enable", "--drain", "--reason", "move")
    until(lambda: site.states() == {"pending": 6}, "runs that are let go after their first step")
    assert all(node.process.poll() is None for node in nodes)
    switch(site.cluster, "disable")
    site.wait_completed(6)
    assert all(len(asked) == 1 for asked in site.calls().values())


def test_an_order_is_found_by_looking_when_nobody_tells_of_it(
    tmp_path: Path, fake: FakeServer
) -> None:
    with site_on("postgres", tmp_path, fake) as site:
        site.configure("maintenance_poll_s = 0.2")
        node = site.cluster.node("a")
        assert node.node_id
        site.submit(FLOW, [{}])
        site.wait_completed(1)
        record = {"enabled": True, "mode": "keep", "by": "sql", "reason": "by hand", "since": 0}
        put_unheard(site, {**record, "retry_after_s": 5.0})
        until(partial(refuses, node), "a node that looks by itself")


def put_unheard(site: Site, value: Any) -> None:
    """Write the record as a store does, without the news of it."""
    from llm_orchestrator.store.base import Batch, Database, PutRecord
    from llm_orchestrator.store.postgres import PostgresStore

    async def work(store: Database) -> None:
        assert isinstance(store, PostgresStore)
        store._ring = lambda news: _nothing()  # type: ignore[method-assign]
        await store.commit(Batch(changes=(PutRecord(KIND, MODE, value, 0),)))

    site.ask(work)


async def _nothing() -> None: ...

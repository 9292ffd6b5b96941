"""Two regions and an arbiter: the primary and the work move together, and a region is lost whole.

One cluster for the module; the tests stand in the order in which they use it up. The times that
are printed are for people, nothing is judged by them.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_orchestrator.drill.lab import Lab, LabSpec, down, up
from tests.drill.test_lab_cluster import Client, needs_root, with_client

LIMIT_S = 150.0
B_NODE = 2
"""Where the endpoints of region b begin."""
pytestmark = [pytest.mark.serial, pytest.mark.timeout(400), needs_root]


class Desk:
    """An operator at the client's host."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab = lab
        self.run_ids: set[str] = set()
        """Every run that was acknowledged."""
        urls = [lab.plan.url(place, "patroni") for place in lab.plan.running("patroni")]
        settings = folder / "settings.toml"
        settings.write_text(f"patroni_urls = {json.dumps(urls)}\n")
        self._environment = {
            **os.environ,
            "LLM_ORCHESTRATOR_URL": lab.store_url,
            "LLM_ORCHESTRATOR_DATA": str(folder / "data"),
            "LLM_ORCHESTRATOR_CONFIG": str(settings),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }

    def ask(self, *words: str) -> subprocess.CompletedProcess[str]:
        """One command of `llmo region`."""
        return subprocess.run(
            self.lab.command(sys.executable, "-m", "llm_orchestrator", "region", *words),
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )

    async def json(self, *words: str) -> Any:
        """What one that succeeds says."""
        done = await asyncio.to_thread(self.ask, *words)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    async def can_move(self, to: str) -> bool:
        """True when nothing speaks against a failover."""
        done = await asyncio.to_thread(self.ask, "plan", "--to", to)
        return done.returncode == 0

    async def roles(self) -> dict[str, str]:
        """By region, those that only the arbiter is in left out."""
        told = await self.json("status", "-o", "json")
        return {each["region"]: each["role"] for each in told["regions"]}


@pytest.fixture(scope="module")
def desk() -> Iterator[Desk]:
    """Regions a (at home) and b, and an arbiter in c."""
    with tempfile.TemporaryDirectory(prefix="lab-", ignore_cleanup_errors=True) as base:
        Path(base).chmod(0o711)
        folder = Path(base).resolve() / "lab"
        lab = up(LabSpec(regions=2, has_network=True), folder, tell=lambda _: None)
        try:
            with_client(lab, Client.register)
            made = Desk(lab, Path(base))
            done = made.ask("policy", "active-passive", "--home", "a", "--sync", "strict")
            assert done.returncode == 0, done.stderr
            yield made
        finally:
            down(folder)


async def load(desk: Desk, client: Client, numbers: range) -> None:
    """Runs asked of region b's nodes, all at once, to their ends; none of them is new twice."""
    found = set(await asyncio.gather(*(client.run(number, B_NODE) for number in numbers)))
    assert len(found) == len(numbers)
    assert not found & desk.run_ids
    desk.run_ids |= found


def test_the_primary_and_the_work_move_there_and_back(desk: Desk) -> None:
    async def work(client: Client) -> None:
        told = await desk.json("status", "-o", "json")
        assert (told["primary"], told["primary_region"], told["sync"]) == ("a-db1", "a", "strict")
        standby = next(each for each in told["servers"] if each["server"] == "b-db1")
        assert standby["role"] == "sync_standby"
        assert standby["note"] == "outside the primary's region"
        for to, primary, words in (
            ("b", "b-db1", ["failover", "--to", "b", "--yes"]),
            ("a", "a-db1", ["failback", "--yes"]),
        ):
            await client.until(lambda to=to: desk.can_move(to), f"a plan to move to {to}")
            first = 100 if to == "b" else 200
            numbers = range(first, first + 20)
            done, _ = await asyncio.gather(desk.json(*words), load(desk, client, numbers))
            assert done["primary_moved_to"] == await client.primary() == primary
            assert (done["runs_left"], done["nodes_that_have_not_heard"]) == (0, [])
            assert (await desk.roles())[to] == "active"
            print(f"\nmoved to region {to}: nothing was written for {done['write_gap_s']} s")

    with_client(desk.lab, work)


def test_a_region_is_lost_whole_and_the_other_takes_over_without_a_human(desk: Desk) -> None:
    lab = desk.lab

    async def work(client: Client) -> None:
        # strict stalls while the only server left has no second copy outside its region
        done = await asyncio.to_thread(desk.ask, "policy", "--sync", "degrade")
        assert done.returncode == 0, done.stderr
        assert (await desk.json("status", "-o", "json"))["sync"] == "degrade"
        await client.until(client.is_whole, "a second copy in the other region after the move")
        lost = [host for host in lab.hosts.values() if host.region == "a"]
        for host in lost:
            await host.cut()
        await asyncio.gather(*(host.kill_all() for host in lost))
        await load(desk, client, range(300, 320))
        assert await client.primary() == "b-db1"
        assert (await desk.roles())["b"] == "active"
        for host in lost:
            await host.heal()
            await host.start()
        await client.until(client.is_whole, "members that come back")
        assert (await desk.roles())["a"] == "standby", "who comes back stands by"
        await client.until(lambda: desk.can_move("a"), "a plan to move home")
        done = await desk.json("failback", "--yes")
        assert done["primary_moved_to"] == await client.primary() == "a-db1"
        print(f"\nfailback: nothing was written for {done['write_gap_s']} s")
        await load(desk, client, range(400, 405))
        assert await desk.roles() | {"c": ""} == {"a": "active", "b": "standby", "c": ""}

    with_client(lab, work)
    said = [json.loads(line) for line in lab.llm_ledger.read_text().splitlines()]
    calls = {each["idempotency_key"] for each in said if each["event"] == "arrived"}
    assert len(calls) == len(desk.run_ids), "a run was accepted twice, or never called"

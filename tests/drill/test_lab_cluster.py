"""Whole clusters: everything is there, a host's loss is survived, and nothing is left of them.

One cluster for the module, as root; the tests stand in the order in which they use it up.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import boto3
import pytest
from botocore.config import Config

from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill.lab import Lab, LabSpec, down, reach, up
from llm_orchestrator.drill.lab_process import LabError, state, wait
from tests.drill.lab_support import HELLO, llmo, network_of, segments, traces
from tests.recovery.barman_lab import tools_on_path

HANG_S = 100.0
pytestmark = [pytest.mark.serial, pytest.mark.timeout(300)]
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root: network namespaces")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Three databases, two nodes; each host a namespace."""
    with tempfile.TemporaryDirectory(prefix="lab-", ignore_cleanup_errors=True) as base:
        Path(base).chmod(0o711)
        folder = Path(base).resolve() / "lab"
        told: list[str] = []
        made = up(LabSpec(has_network=True, disk_mb=400, has_barman=True), folder, tell=told.append)
        print(f"\n{told[-1]}")
        with_client(made, Client.register)
        yield made
        down(folder)


class Client:
    """Asks the nodes from the client's host, patiently."""

    def __init__(self, lab: Lab, session: aiohttp.ClientSession) -> None:
        self.lab = lab
        self._session = session
        self._clock = RealClock()

    async def register(self) -> None:
        """The workflow of the runs here."""
        url, kind = f"{self.lab.endpoints[0]}/api/v1/workflows", "application/yaml"
        async with self._session.post(url, data=HELLO, headers={"content-type": kind}) as answer:
            assert answer.status == 201

    async def run(self, number: int, node: int = 0) -> str:
        """One run to its end, asked for as often as it takes, with one key."""
        url = f"{self.lab.endpoints[node]}/api/v1/workflows/hello/execute?wait=5"
        body = json.dumps({"inputs": {"number": number}}).encode()
        headers = {"content-type": "application/json", "Idempotency-Key": f"number-{number}"}
        found: list[str] = []

        async def is_done() -> bool:
            try:
                async with self._session.post(url, data=body, headers=headers) as answer:
                    told = await answer.json()
            except (aiohttp.ClientError, TimeoutError):
                return False
            found[:] = [told.get("run_id", "")]
            return bool(told.get("state") == "completed")

        await self.until(is_done, f"run {number}")
        return found[0]

    async def until(self, happens: Any, what: str) -> None:
        """Until it does; fails when it hangs."""
        end = self._clock.monotonic() + HANG_S
        while not await happens():
            assert self._clock.monotonic() < end, f"it hangs: {what}"
            await asyncio.sleep(0.1)

    async def primary(self) -> str:
        """Who leads, once its Patroni says so."""
        found: list[str] = []

        async def is_known() -> bool:
            found[:] = filter(None, [await self.lab.primary()])
            return bool(found)

        await self.until(is_known, "a primary")
        return found[0]

    async def get(self, url: str) -> Mapping[str, Any]:
        return (await reach.get(self._session, url))[1]

    async def is_whole(self) -> bool:
        """Every member follows or leads, and one of them synchronously."""
        members = await self.lab.members()
        roles = sorted(str(member["role"]) for member in members)
        return roles == ["leader", "replica", "sync_standby"] and all(
            member["state"] in ("running", "streaming") for member in members
        )


def with_client(lab: Lab, work: Any) -> Any:
    """Run `work(client)` on an event loop of its own."""

    async def main() -> Any:
        timeout = aiohttp.ClientTimeout(total=20)
        async with aiohttp.ClientSession(connector=lab.connector(), timeout=timeout) as session:
            return await work(Client(lab, session))

    return asyncio.run(main())


@needs_root
def test_everything_is_there(lab: Lab) -> None:
    async def work(client: Client) -> None:
        assert await client.is_whole()
        assert await lab.primary() == "a-db1"

        async def are_scraped() -> bool:
            found = await client.get(f"{lab.prometheus_url}/api/v1/targets")
            targets = found["data"]["activeTargets"]
            return len(targets) == 5 and all(each["health"] == "up" for each in targets)

        await client.until(are_scraped, "targets that Prometheus reaches")
        rules = await client.get(f"{lab.prometheus_url}/api/v1/rules")
        names = {rule["name"] for group in rules["data"]["groups"] for rule in group["rules"]}
        assert "StoreUnreachable" in names

    with_client(lab, work)
    with lab.inside():
        store = boto3.client(
            "s3",
            endpoint_url=lab.s3["endpoint_url"],
            aws_access_key_id=lab.s3["access_key"],
            aws_secret_access_key=lab.s3["secret_key"],
            region_name="us-east-1",
            config=Config(
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
        store.put_object(Bucket=lab.s3["bucket"], Key="one", Body=b"1")
        assert store.get_object(Bucket=lab.s3["bucket"], Key="one")["Body"].read() == b"1"
    here = network_of("thread-self")
    spaces = {
        network_of(host.processes[what].pid)
        for host in lab.hosts.values()
        for what in host.place.runs
    }
    assert here not in spaces
    assert len(spaces) == 9  # one a host that runs something
    etcd = lab.process("a-db1/etcd").pid
    assert os.getpriority(os.PRIO_PROCESS, etcd) == -10
    assert Path(f"/proc/{lab.process('a-db1/patroni').pid}").stat().st_uid != 0


@needs_root
def test_writes_go_on_when_the_primarys_host_is_lost(lab: Lab) -> None:
    async def work(client: Client) -> None:
        first = await client.run(1)
        lost = lab.hosts[await client.primary()]
        assert lost.postmaster
        await lost.cut()
        await lost.kill_all()
        assert lab.network is not None
        assert lab.network.heard("client", lost.name) == 0
        assert not lost.postmaster
        await client.run(2)
        assert await client.primary() != lost.name
        assert await client.run(1, node=1) == first  # the same run, not another one
        assert not any(process.pid for process in lost.processes.values())
        await client.until(partial(barman_is_well, lab), "Barman at the new primary")
        await lost.heal()
        await lost.start()
        await client.until(client.is_whole, "a member that comes back")

    with_client(lab, work)
    said = lab.llm_ledger.read_text().splitlines()
    keys = [line["idempotency_key"] for line in map(json.loads, said) if line["event"] == "arrived"]
    assert len(keys) == len(set(keys)) == 2


async def barman_is_well(lab: Lab) -> bool:
    """It has a base of this cluster, and streams the log of whoever leads."""
    words = ("barman", "-c", str(lab.barman_config), "check", "--nagios", "orchestrator")
    done = await asyncio.to_thread(
        subprocess.run, lab.command(*words), capture_output=True, check=False, cwd="/"
    )
    return done.returncode == 0


@needs_root
def test_barman_has_a_base_and_the_log(lab: Lab) -> None:
    settings = lab.folder / "a-node1" / "llm-orchestrator.toml"
    words = (sys.executable, "-m", "llm_orchestrator", "--store", lab.store_url)
    with lab.inside(), tools_on_path():
        environment = {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "LLM_ORCHESTRATOR_CONFIG": str(settings),
        }
        for more in (("backup", "create", "--type", "full"), ("backup", "check")):
            done = subprocess.run(
                [*words, *more],
                capture_output=True,
                text=True,
                check=False,
                env=os.environ | environment,
                cwd=lab.folder,
                timeout=HANG_S,
            )
            print(done.stdout, done.stderr)
    assert re.search(r"barman base +ok", done.stdout)
    assert re.search(r"barman log +ok", done.stdout)


@needs_root
def test_patroni_alone_is_back_within_a_moment(lab: Lab) -> None:
    primary = asyncio.run(lab.primary())
    patroni = lab.process(f"{primary}/patroni")
    before, count = patroni.pid, patroni.restarts
    postmaster = lab.hosts[str(primary)].postmaster
    patroni.kill()
    assert wait(lambda: patroni.restarts == count + 1 and bool(patroni.pid), HANG_S)
    assert patroni.pid != before
    assert lab.hosts[str(primary)].postmaster == postmaster


@needs_root
def test_postgresql_can_be_frozen_and_killed_without_patroni(lab: Lab) -> None:
    async def work(client: Client) -> None:
        primary = await client.primary()
        follower = next(h for n, h in lab.hosts.items() if n != primary and h.postmaster)
        await follower.freeze_postgres()
        assert state(follower.postmaster) == "T"
        assert state(lab.process(f"{follower.name}/patroni").pid) in "SRD"
        await follower.thaw()
        assert state(follower.postmaster) in "SRD"
        await client.until(client.is_whole, "a standby that was frozen")
        await lab.hosts[primary].kill_postgres()
        await client.run(3)
        assert await client.primary() != primary
        assert lab.process(f"{primary}/patroni").pid

    with_client(lab, work)


@needs_root
def test_a_databases_disk_can_be_filled_and_freed(lab: Lab) -> None:
    async def work(client: Client) -> None:
        await client.until(client.is_whole, "members that follow")
        host = lab.hosts["a-db3"]
        disk = host.folder / "disk"
        assert await host.fill_disk() > 1 << 20
        with pytest.raises(OSError, match="No space left"):
            (disk / "more").write_bytes(bytes(1 << 16))
        await host.free_disk()
        (disk / "more").write_bytes(bytes(1 << 16))
        with pytest.raises(LabError, match="no disk of its own"):
            await lab.hosts["a-node1"].fill_disk()
        await client.until(client.is_whole, "members that follow")

    with_client(lab, work)


@needs_root
def test_one_call_undoes_every_fault(lab: Lab) -> None:
    async def work(client: Client) -> None:
        first, second = lab.hosts["a-node1"], lab.hosts["a-node2"]
        assert lab.network is not None
        await first.cut_from("llm", both_ways=False)
        await first.lose(100)
        await first.freeze()
        await second.kill_all()
        assert lab.network.heard("client", "a-node1") == 0
        assert (state(first.processes["node"].pid), second.processes["node"].pid) == ("T", 0)
        await lab.calm()
        assert lab.network.heard("client", "a-node1") == lab.network.heard("a-node1", "llm") == 3
        await client.run(4)
        await client.run(5, node=1)

    with_client(lab, work)


@needs_root
def test_after_kill_9_of_everything_that_could_clean_up_nothing_is_left(lab: Lab) -> None:
    processes = traces(lab.folder).processes
    assert set(segments().values()) & processes  # PostgreSQL has some
    assert not any("/dev/shm/" in Path(f"/proc/{pid}/maps").read_text() for pid in processes)
    os.kill(lab.supervisor, signal.SIGKILL)
    assert wait(lambda: not lab.supervisor, HANG_S)
    orphans = [host.postmaster for host in lab.hosts.values() if host.postmaster]
    assert orphans  # they are nobody's children now
    assert traces(lab.folder).namespaces
    assert llmo("down", folder=lab.folder).returncode == 0
    assert not traces(lab.folder)
    assert not lab.folder.exists()
    assert not set(segments().values()) & processes


def test_without_root_the_same_servers_run_on_loopback_addresses() -> None:
    with tempfile.TemporaryDirectory(prefix="lab-", ignore_cleanup_errors=True) as base:
        Path(base).chmod(0o711)
        folder = Path(base).resolve() / "lab"
        try:
            lab = up(LabSpec(regions=2, postgres=18), folder, tell=print)
            with_client(lab, _check_two_regions)
        finally:
            down(folder)
        assert not traces(folder)


async def _check_two_regions(client: Client) -> None:
    lab = client.lab
    assert await client.is_whole()
    roles = {str(member["name"]): str(member["role"]) for member in await lab.members()}
    # The synchronous standby is never in the primary's region.
    assert roles == {"a-db1": "leader", "a-db2": "replica", "b-db1": "sync_standby"}
    assert set(lab.hosts["c-arbiter"].processes) == {"etcd"}
    regions = [host.region for host in lab.hosts.values() if "node" in host.processes]
    assert sorted(regions) == ["a", "a", "b", "b"]
    await client.register()
    await client.run(1)
    version = await client.get(f"{lab.plan.url(lab.hosts['a-db1'].place, 'patroni')}/patroni")
    assert version["server_version"] // 10_000 == 18

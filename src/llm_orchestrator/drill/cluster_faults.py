"""What faults of processes, servers, clocks do to a ClusterTarget, and how each is confirmed.

Those of the network and of disks have modules of their own, made in the same way.

`fault.on` names hosts: `primary` (of the database, now), `sync_standby`, `region_a`, `nodes`,
`node` (the first one), `etcd`, `patroni`, or a host of the layout (cluster.toml). What a fault
changes besides the lab's own switches is given to `target.undone`: healing takes it away, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import aiohttp

from llm_orchestrator.drill.cluster_spool import spool_damage
from llm_orchestrator.drill.lab import network, tools
from llm_orchestrator.drill.lab.host import Host, Process
from llm_orchestrator.drill.lab.servers import ARCHIVE_BROKEN
from llm_orchestrator.drill.lab_process import state
from llm_orchestrator.drill.scenario import Fault
from llm_orchestrator.drill.target import Injected, NotConfirmed, NotPossible

if TYPE_CHECKING:
    from llm_orchestrator.drill.cluster import ClusterTarget

Json = Any
Does = Callable[["ClusterTarget", Fault], Awaitable[Injected]]
_CONFIRM_S = 30.0
_POLL_S = 0.02
_HTTP_S = 30.0
_DATABASE = "postgres"
_DATE_S = 5.0


class Undone:
    """What is to be taken away besides what the lab's `calm` does."""

    def __init__(self) -> None:
        self._deeds: list[Callable[[], Awaitable[None]]] = []

    def add(self, deed: Callable[[], Awaitable[None]]) -> None:
        """Do this when the fault is undone."""
        self._deeds.append(deed)

    async def run(self) -> None:
        """Do all of it, the last first."""
        while self._deeds:
            await self._deeds.pop()()


# --- who ---


async def hosts_of(target: ClusterTarget, on: str) -> list[Host]:
    """The hosts that a fault's `on` means. Raises NotConfirmed, NotPossible."""
    hosts = target.lab.hosts
    if on in hosts:
        return [hosts[on]]
    if on in ("primary", "sync_standby"):
        role = {"primary": "leader"}.get(on, on)
        members = await target.lab.members()
        found = [hosts[str(each["name"])] for each in members if each["role"] == role]
        if not found:
            raise NotConfirmed(f"there is no {on} now")
        return found[:1]
    if on.startswith("region_"):
        return [host for host in hosts.values() if host.region == on.removeprefix("region_")]
    nodes = [host for host in hosts.values() if "node" in host.processes]
    if on in ("nodes", "node"):
        return nodes if on == "nodes" else nodes[:1]
    if on in ("etcd", "patroni"):
        return [host for host in hosts.values() if on in host.processes]
    raise NotPossible(f"the lab has no {on}")


async def one_of(target: ClusterTarget, on: str) -> Host:
    """The first of them."""
    return (await hosts_of(target, on))[0]


async def _until(target: ClusterTarget, happens: Callable[[], bool], what: str) -> None:
    """Raises NotConfirmed."""
    end_s = target.clock.monotonic() + _CONFIRM_S
    while not happens():
        if target.clock.monotonic() > end_s:
            raise NotConfirmed(what)
        await target.clock.sleep(_POLL_S)


# --- processes ---


def _chosen(hosts: Sequence[Host], fault: Fault) -> list[Process]:
    what = str(fault.options.get("what", "node"))
    return [host.processes[what] for host in hosts]


async def process_kill(target: ClusterTarget, fault: Fault) -> Injected:
    """SIGKILL to `what` (node) on each host; `held`: it stays dead until it is undone.

    Confirmed: the kernel knows the process no more.
    """
    chosen = _chosen(await hosts_of(target, fault.on), fault)
    pids = [process.pid for process in chosen]
    for process in chosen:
        await asyncio.to_thread(process.kill, is_held=bool(fault.options.get("held", False)))
    at_s = target.clock.monotonic()
    if any(state(pid) not in "XZ" for pid in pids) or not all(pids):
        raise NotConfirmed("a process is not dead")
    return Injected(at_s, f"{', '.join(process.name for process in chosen)} killed")


async def process_freeze(target: ClusterTarget, fault: Fault) -> Injected:
    """SIGSTOP to `what` alone. Confirmed: the kernel says that it is stopped."""
    chosen = _chosen(await hosts_of(target, fault.on), fault)
    for process in chosen:
        await asyncio.to_thread(process.freeze)
    if any(state(process.pid) != "T" for process in chosen):
        raise NotConfirmed("a process is not frozen")
    names = ", ".join(process.name for process in chosen)
    return Injected(target.clock.monotonic(), f"{names} in state T")


async def graceful_stop(target: ClusterTarget, fault: Fault) -> Injected:
    """SIGTERM to a node that stays away. t0 is the order; confirmed: it ended."""
    (process,) = _chosen([await one_of(target, fault.on)], fault)
    pid, at_s = process.pid, target.clock.monotonic()
    (target.lab.hosts[process.name.partition("/")[0]].folder / "hold").touch()
    process.terminate()
    await _until(target, lambda: state(pid) in "XZ", f"{process.name} does not end")
    return Injected(at_s, f"{process.name} ended after it was told to")


async def misbehave(target: ClusterTarget, fault: Fault) -> Injected:
    """A step of user code does `how` to its node (fault_flows.py), once or each time (`always`).

    Confirmed: its flag is there; where it kills (`kills` times), so often a node has died.
    """
    how, kills = str(fault.options["how"]), int(fault.options.get("kills", 0))
    flag = target.lab.folder / "client" / f"flag-{how}"
    flag.parent.mkdir(mode=0o777, exist_ok=True)
    before = target.facts()["node_deaths"]
    inputs = {"key": how, "how": how, "flag": str(flag)}
    if fault.options.get("always"):
        inputs["flag"] = ""
    url = f"{target.endpoints[0]}/api/v1/workflows/drill_misbehave/execute"
    with contextlib.suppress(NotConfirmed) if kills else contextlib.nullcontext():
        await _post(target, url, {"inputs": inputs})  # it may die before it has answered
    if not kills:
        await _until(target, flag.exists, "the step is not made")
        return Injected(target.clock.monotonic(), f"the step has met its {how}")

    def has_died(times: int) -> bool:
        return bool(target.facts()["node_deaths"] >= before + times)

    await _until(target, partial(has_died, 1), "no node dies of it")
    at_s = target.clock.monotonic()
    await _until(target, partial(has_died, kills), f"fewer than {kills} nodes die of it")
    return Injected(at_s, f"{kills} nodes died of a run")


async def _post(target: ClusterTarget, url: str, body: Json) -> Json:
    timeout = aiohttp.ClientTimeout(total=_HTTP_S)
    try:
        async with target.http.post(url, json=body, timeout=timeout) as answer:
            if not answer.ok:
                raise NotConfirmed(f"{url}: {answer.status} {(await answer.text())[:200]}")
            return await answer.json(content_type=None) if "json" in answer.content_type else {}
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise NotConfirmed(f"{url}: {error}") from error


# --- the database ---


async def postmaster_kill(target: ClusterTarget, fault: Fault) -> Injected:
    """SIGKILL to PostgreSQL's first process. Confirmed: it is dead."""
    host = await one_of(target, fault.on)
    pid = host.postmaster
    if not pid:
        raise NotConfirmed(f"{host.name} has no PostgreSQL")
    await host.kill_postgres()
    return Injected(target.clock.monotonic(), f"postmaster {pid} of {host.name} killed")


async def disk_full(target: ClusterTarget, fault: Fault) -> Injected:
    """Not a byte is left on the database's disk. Confirmed: a write fails."""
    host = await one_of(target, fault.on)
    size = await host.fill_disk()
    return Injected(target.clock.monotonic(), f"{host.name}: full with {size / 1e6:.0f} MB more")


async def archiving_broken(target: ClusterTarget, fault: Fault) -> Injected:
    """The archive command fails. Confirmed: the server says that it has failed."""
    host = await one_of(target, fault.on)
    flag = host.folder / ARCHIVE_BROKEN
    flag.touch()
    target.undone.add(lambda: asyncio.to_thread(flag.unlink, missing_ok=True))
    await psql(target, host, "SELECT pg_switch_wal()")
    end_s = target.clock.monotonic() + _CONFIRM_S
    while (failed := await psql(target, host, "SELECT failed_count FROM pg_stat_archiver")) == "0":
        if target.clock.monotonic() > end_s:
            raise NotConfirmed("the archive command does not fail")
        await target.clock.sleep(_POLL_S * 10)
    return Injected(target.clock.monotonic(), f"{host.name}: {failed} segments were not archived")


async def psql(
    target: ClusterTarget, host: Host, statement: str, *, database: str = "postgres"
) -> str:
    """As the superuser, by the host's own socket. Raises NotConfirmed."""
    port = str(target.lab.plan.ports[_DATABASE])
    words = ("psql", "-XAtq", "-U", "postgres", "-h", str(host.folder), "-p", port, "-d", database)
    process = await asyncio.create_subprocess_exec(
        *words,
        "-c",
        statement,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    said, wrong = await asyncio.wait_for(process.communicate(), _HTTP_S)
    if process.returncode != 0:
        raise NotConfirmed(f"{host.name}: {wrong.decode(errors='replace').strip()}")
    return said.decode().strip()


async def connections_taken(target: ClusterTarget, fault: Fault) -> Injected:
    """Somebody takes every connection that the primary has, and lets none go.

    They begin to log in and never say who they are, so that the server keeps a place for each.
    Nodes lose theirs first: what they have is reset. Confirmed: the server has no place left.
    """
    host = await one_of(target, fault.on)
    address = (host.address, target.lab.plan.ports[_DATABASE])
    await host.refuse(address[1])
    await target.clock.sleep(_POLL_S * 50)  # who is connected notices
    taken: list[socket.socket] = []
    target.undone.add(lambda: asyncio.to_thread(_close, taken))
    await host.heal()
    place = target.lab.hosts["client"].place
    is_full = await asyncio.to_thread(_take_all, place.namespace, address, taken)
    if not is_full:
        raise NotConfirmed(f"{len(taken)} connections, and there is room left")
    return Injected(target.clock.monotonic(), f"{len(taken)} connections, then: too many clients")


_STARTUP = struct.pack(">I", 196608) + b"user\0nobody\0database\0nothing\0\0"
_TAKE_MAX = 400


def _take_all(namespace: str, address: tuple[str, int], taken: list[socket.socket]) -> bool:
    """Until the server answers with an error (E) instead of asking for a password (R)."""
    for _ in range(_TAKE_MAX):
        with network.inside(namespace):
            each = socket.socket()
        each.settimeout(_HTTP_S)
        each.connect(address)
        each.sendall(struct.pack(">I", len(_STARTUP) + 4) + _STARTUP)
        if each.recv(1) != b"R":
            each.close()
            return True
        taken.append(each)
    return False


def _close(taken: Sequence[socket.socket]) -> None:
    for each in taken:
        each.close()


async def switchover(target: ClusterTarget, fault: Fault) -> Injected:
    """A planned change of the primary to host `to`, by Patroni. Confirmed: it leads.

    t0 is the moment at which the old one leads no more: from then on nothing can be written.
    """
    leader, to = (await one_of(target, "primary")).name, str(fault.options["to"])
    place = target.lab.hosts[leader].place
    url = f"{target.lab.plan.url(place, 'patroni')}/switchover"
    order = asyncio.create_task(_post(target, url, {"leader": leader, "candidate": to}))
    end_s = target.clock.monotonic() + _CONFIRM_S
    at_s = 0.0
    while (leads := await target.lab.primary()) != to:
        if not at_s and leads != leader:
            at_s = target.clock.monotonic()
        if target.clock.monotonic() > end_s:
            order.cancel()
            raise NotConfirmed(f"{to} does not lead")
        await target.clock.sleep(_POLL_S)
    await order
    seen_s = at_s or target.clock.monotonic()
    return Injected(seen_s, f"{to} leads instead of {leader}, in order")


# --- the clock ---


async def clock_wrong(target: ClusterTarget, fault: Fault) -> Injected:
    """A node is started again with a wall clock that is wrong by `by`, then by each of `then`.

    Confirmed: the date of its answers is.
    """
    host = await one_of(target, fault.on)
    library = tools.library("libfaketime.so.1")
    steps = str(fault.options["by"]).split()
    file = host.folder / "faketime"
    file.write_text(f"{steps[0]}\n")
    process = host.processes["node"]
    process.tell(
        LD_PRELOAD=str(library),
        FAKETIME_TIMESTAMP_FILE=str(file),
        FAKETIME_NO_CACHE="1",
        FAKETIME_DISABLE_SHM="1",
        FAKETIME_DONT_FAKE_MONOTONIC="1",
    )
    target.undone.add(lambda: asyncio.to_thread(process.tell))
    url = target.lab.plan.url(host.place, "node")
    await asyncio.to_thread(process.kill)
    at_s, seen = target.clock.monotonic(), []
    for step in steps:
        file.write_text(f"{step}\n")
        seen.append(f"{await _shift_s(target, url, step):+.0f} s")
    return Injected(at_s, f"{host.name}'s clock is off by {', '.join(seen)}")


async def _shift_s(target: ClusterTarget, url: str, step: str) -> float:
    """How wrong the node's clock is, by its answers, once it is about as wrong as `step` says."""
    wanted_s = float(step.rstrip("s"))
    end_s = target.clock.monotonic() + _CONFIRM_S
    while target.clock.monotonic() < end_s:
        off_s = await _date_s(target, url) - target.clock.now_us() / 1e6
        if abs(off_s - wanted_s) < _DATE_S:
            return off_s
        await target.clock.sleep(_POLL_S * 10)
    raise NotConfirmed(f"the node's clock does not go to {step}")


async def _date_s(target: ClusterTarget, url: str) -> float:
    """The date of a node's answer, seconds since 1970; 0 without an answer."""
    with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError, KeyError):
        async with target.http.get(f"{url}/health/live") as answer:
            return parsedate_to_datetime(answer.headers["Date"]).timestamp()
    return 0.0


FAULTS: Mapping[str, Does] = {
    "process_kill": process_kill,
    "process_freeze": process_freeze,
    "graceful_stop": graceful_stop,
    "misbehave": misbehave,
    "postmaster_kill": postmaster_kill,
    "disk_full": disk_full,
    "archiving_broken": archiving_broken,
    "connections_taken": connections_taken,
    "switchover": switchover,
    "spool_damage": spool_damage,
    "clock_wrong": clock_wrong,
}

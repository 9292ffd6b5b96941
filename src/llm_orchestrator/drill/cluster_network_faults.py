"""The faults of hosts and of the network between them: what each does, and how it is confirmed.

As in cluster_faults.py; the lab's `calm` takes them away.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llm_orchestrator.drill.cluster_faults import Does, hosts_of, one_of
from llm_orchestrator.drill.lab import network
from llm_orchestrator.drill.lab.host import Host, processes_of
from llm_orchestrator.drill.lab_process import state
from llm_orchestrator.drill.scenario import Fault
from llm_orchestrator.drill.target import Injected, NotConfirmed

if TYPE_CHECKING:
    from llm_orchestrator.drill.cluster import ClusterTarget

_CONFIRM_S = 30.0
_HTTP_S = 30.0
_HIDDEN_S = 1.0
_DATABASE = "postgres"


def _names(hosts: Sequence[Host]) -> str:
    return ", ".join(host.name for host in hosts)


async def host_lost(target: ClusterTarget, fault: Fault) -> Injected:
    """Black holes, then everything on the hosts killed. Confirmed: no datagram, no process.

    `cut_s`: how long they live on behind the black hole.
    """
    hosts = await hosts_of(target, fault.on)
    await asyncio.gather(*(host.cut() for host in hosts))
    at_s = target.clock.monotonic()
    await _confirm_cut(target, hosts)
    await target.clock.sleep(float(fault.options.get("cut_s", 0.0)))
    await asyncio.gather(*(host.kill_all() for host in hosts))
    if any(processes_of(host.folder) for host in hosts):
        raise NotConfirmed("something lives on")
    return Injected(at_s, f"{_names(hosts)}: no datagram arrives, all processes killed")


async def _confirm_cut(target: ClusterTarget, hosts: Sequence[Host]) -> None:
    for host in hosts:
        heard = await asyncio.to_thread(host.network.heard, "client", host.name)
        if heard:
            raise NotConfirmed(f"{host.name} is still heard")


async def host_freeze(target: ClusterTarget, fault: Fault) -> Injected:
    """SIGSTOP to everything on the hosts. Confirmed: each is in state T."""
    hosts = await hosts_of(target, fault.on)
    await asyncio.gather(*(host.freeze() for host in hosts))
    pids = [pid for host in hosts for pid in processes_of(host.folder)]
    if not pids or any(state(pid) not in "TXZ" for pid in pids):
        raise NotConfirmed("something is not frozen")
    return Injected(target.clock.monotonic(), f"{_names(hosts)}: {len(pids)} processes in state T")


async def cut_from_database(target: ClusterTarget, fault: Fault) -> Injected:
    """Nodes and databases hear each other no more. `way`: both, out (nodes are mute), in (deaf).

    Confirmed: no datagram arrives where none should.
    """
    nodes = await hosts_of(target, fault.on)
    databases, way = await hosts_of(target, "patroni"), str(fault.options.get("way", "both"))
    for node in nodes:
        for database in databases:
            one, other = (database, node) if way == "in" else (node, database)
            await one.cut_from(other.name, both_ways=way == "both")
    at_s = target.clock.monotonic()
    for node in nodes:
        one, other = (databases[0], node) if way == "in" else (node, databases[0])
        if await asyncio.to_thread(node.network.heard, one.name, other.name):
            raise NotConfirmed(f"{other.name} still hears {one.name}")
    return Injected(at_s, f"{_names(nodes)} from {_names(databases)}, {way}")


async def packet_loss(target: ClusterTarget, fault: Fault) -> Injected:
    """`percent` of what the hosts say and hear is lost. Confirmed: datagrams are missing."""
    hosts, percent = await hosts_of(target, fault.on), int(fault.options["percent"])
    for host in hosts:
        await host.lose(percent)
    at_s, count = target.clock.monotonic(), 200
    heard = await asyncio.to_thread(_hear, hosts[0], count)
    if heard == count:
        raise NotConfirmed("nothing is lost")
    return Injected(at_s, f"{_names(hosts)}: {heard} of {count} datagrams arrive")


def _hear(host: Host, count: int) -> int:
    return host.network.heard("client", host.name, count=count)


async def ports_refused(target: ClusterTarget, fault: Fault) -> Injected:
    """The databases answer with resets; after `for_s` (0: until healed) they listen again.

    Confirmed: who tries to connect is refused.
    """
    hosts = await hosts_of(target, fault.on)
    port, for_s = target.lab.plan.ports[_DATABASE], float(fault.options.get("for_s", 0.0))
    await asyncio.gather(*(host.refuse(port) for host in hosts))
    at_s = target.clock.monotonic()
    namespace = target.lab.hosts["client"].place.namespace
    for host in hosts:
        met = await asyncio.to_thread(_knock, namespace, (host.address, port), _CONFIRM_S)
        if met is not ConnectionRefusedError:
            raise NotConfirmed(f"{host.name} still takes connections")
    if for_s:
        await target.clock.sleep(for_s)
        await asyncio.gather(*(host.heal() for host in hosts))
    return Injected(at_s, f"{_names(hosts)}: port {port} answers with a reset")


async def split(target: ClusterTarget, fault: Fault) -> Injected:
    """The primary and one node on one side, everybody else on the other; both sides live.

    Confirmed: the sides do not hear each other, the primary and its node do.
    """
    inner = [await one_of(target, "primary"), await one_of(target, fault.on)]
    names = {host.name for host in inner}
    for host in inner:
        for other in target.lab.hosts.values():
            if other.name not in names:
                await host.cut_from(other.name)
    at_s = target.clock.monotonic()
    await _confirm_cut(target, inner)
    one, other_one = inner
    if not await asyncio.to_thread(one.network.heard, one.name, other_one.name):
        raise NotConfirmed(f"{one.name} and {other_one.name} do not hear each other")
    return Injected(at_s, f"{_names(inner)} from all others, not from each other")


async def client_cut(target: ClusterTarget, fault: Fault) -> Injected:
    """Clients and hosts hear each other no more; all others do. Confirmed: no datagram arrives."""
    hosts = await hosts_of(target, fault.on)
    for host in hosts:
        await target.lab.hosts["client"].cut_from(host.name)
    at_s = target.clock.monotonic()
    await _confirm_cut(target, hosts)
    return Injected(at_s, f"clients from {_names(hosts)}")


async def name_stale(target: ClusterTarget, fault: Fault) -> Injected:
    """To clients a node's address is a black hole, and `name` names it on for `stale_s`, then `to`.

    `from_change`: t0 is the moment at which the name changes, else that of the black hole.
    Confirmed: nobody answers there, and a client that looks is told so, before and after.
    """
    host, options = await one_of(target, fault.on), fault.options
    name, to = str(options["name"]), target.lab.hosts[str(options["to"])]
    client, port = target.lab.hosts["client"], target.lab.plan.ports["node"]
    await asyncio.to_thread(client.network.hide, client.name, host.name, port)
    at_s = target.clock.monotonic()
    place = client.place.namespace
    met = await asyncio.to_thread(_knock, place, (host.address, port), _HIDDEN_S)
    if met is not TimeoutError:
        raise NotConfirmed(f"{host.name} still answers")
    await _confirm_name(target, name, host.address)
    await target.clock.sleep(float(options["stale_s"]))
    await _confirm_name(target, name, host.address)
    target.names.put(name, to.address)
    changed_s = target.clock.monotonic()
    await _confirm_name(target, name, to.address)
    said = f"{name} named {host.name}, a black hole to clients, for {changed_s - at_s:.1f} s"
    at_s = changed_s if options.get("from_change") else at_s
    return Injected(at_s, f"{said}, then {to.name}")


def _knock(namespace: str, address: tuple[str, int], limit_s: float) -> type[OSError] | None:
    """What a client there meets: nothing in its way, TimeoutError, ConnectionRefusedError."""
    with network.inside(namespace):
        each = socket.socket()
    with each:
        each.settimeout(limit_s)
        try:
            each.connect(address)
        except (TimeoutError, ConnectionRefusedError) as error:
            return type(error)
    return None


async def _confirm_name(target: ClusterTarget, name: str, address: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *target.command("getent", "hosts", name), stdout=asyncio.subprocess.PIPE
    )
    said, _ = await asyncio.wait_for(process.communicate(), _HTTP_S)
    if said.split()[:1] != [address.encode()]:
        raise NotConfirmed(f"{name} is {said.decode().strip() or 'unknown'}, not {address}")


NETWORK_FAULTS: Mapping[str, Does] = {
    "host_lost": host_lost,
    "host_freeze": host_freeze,
    "cut_from_database": cut_from_database,
    "packet_loss": packet_loss,
    "ports_refused": ports_refused,
    "split": split,
    "client_cut": client_cut,
    "name_stale": name_stale,
}

"""The faults of a database's disk, made by the lab's shim (lab/io_shim.py): errors and slowness.

As in cluster_faults.py, each says how it is confirmed; the lab's `calm` takes the rules away.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import TYPE_CHECKING

from llm_orchestrator.drill.cluster_faults import Does, hosts_of
from llm_orchestrator.drill.lab import io_shim
from llm_orchestrator.drill.lab.host import Host
from llm_orchestrator.drill.scenario import Fault
from llm_orchestrator.drill.target import Injected, NotConfirmed, NotPossible

if TYPE_CHECKING:
    from llm_orchestrator.drill.cluster import ClusterTarget

_LOG = "pg_wal"
_CONFIRM_S = 30.0
_POLL_S = 0.05


async def disk_errors(target: ClusterTarget, fault: Fault) -> Injected:
    """Every write and every fsync of the write-ahead log fails with EIO, until it is undone.

    Confirmed: the shim has failed a call, and the server's log has a PANIC of this disk.
    """
    (host,) = await hosts_of(target, fault.on)
    rules = (io_shim.Rule(each, _LOG, errno.EIO) for each in ("write", "fsync"))
    log = host.processes["patroni"].log
    before = log.stat().st_size
    at_s, call = await _rule(target, host, *rules)
    end_s = target.clock.monotonic() + _CONFIRM_S
    while "PANIC" not in (said := log.read_bytes()[before:].decode(errors="replace")):
        if target.clock.monotonic() > end_s:
            raise NotConfirmed(f"{host.name}: calls fail, and the server does not panic")
        await target.clock.sleep(_POLL_S)
    panic = next(line for line in said.splitlines() if "PANIC" in line)
    return Injected(
        at_s, f"{host.name}: failed `{call}`; {panic.partition('PANIC')[2].strip(': ')}"
    )


async def disk_slow(target: ClusterTarget, fault: Fault) -> Injected:
    """Every fsync of the write-ahead log takes `delay_ms` longer, until it is undone.

    Confirmed: the shim has delayed a call.
    """
    (host,) = await hosts_of(target, fault.on)
    delay_ms = int(fault.options["delay_ms"])
    at_s, call = await _rule(target, host, io_shim.Rule("fsync", _LOG, delay_ms=delay_ms))
    return Injected(at_s, f"{host.name}: delayed `{call}`")


async def _rule(target: ClusterTarget, host: Host, *rules: io_shim.Rule) -> tuple[float, str]:
    """Let the rules hold; when the first call met one (the steady clock, seconds), and which."""
    if not target.lab.plan.spec.has_shim:
        raise NotPossible("the lab's databases were started without the shim: `shim: true`")
    before = len(io_shim.done(host.folder))
    io_shim.rule(host.folder, *rules)
    end_s = target.clock.monotonic() + _CONFIRM_S
    while len(met := io_shim.done(host.folder)) == before:
        if target.clock.monotonic() > end_s:
            raise NotConfirmed(f"{host.name}: no call has met the rules")
        await target.clock.sleep(_POLL_S)
    return target.clock.monotonic(), met[before]


DISK_FAULTS: Mapping[str, Does] = {"disk_errors": disk_errors, "disk_slow": disk_slow}

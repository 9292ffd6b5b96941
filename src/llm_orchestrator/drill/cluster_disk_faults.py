"""The faults of a database's disk: errors, slowness (lab/io_shim.py), and flipped bytes.

As in cluster_faults.py, each says how it is confirmed; the lab's `calm` takes the rules away.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llm_orchestrator.clock import Clock
from llm_orchestrator.drill.cluster_faults import Does, hosts_of, psql
from llm_orchestrator.drill.lab import io_shim
from llm_orchestrator.drill.lab.host import DATA, Host
from llm_orchestrator.drill.lab.spec import DATABASE
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


async def pages_flipped(target: ClusterTarget, fault: Fault) -> Injected:
    """A byte is flipped in `pages` pages of each of our busiest tables and of their indexes.

    Pages that are in memory would be written over theirs on the disk, so the lab keeps few
    (`system.buffers_mb`), and more are flipped until the server meets one. t0 is the first flip.
    Confirmed: the server has counted a page whose checksum does not fit.
    """
    (host,) = await hosts_of(target, fault.on)
    await psql(target, host, "CHECKPOINT")
    files = await psql(target, host, _FILES, database=DATABASE)
    paths = [host.folder / DATA / each for each in files.split()]
    at_s, flipped = target.clock.monotonic(), 0
    end_s = at_s + _CONFIRM_S
    while (met := int(await psql(target, host, _MET))) == 0:
        if target.clock.monotonic() > end_s:
            raise NotConfirmed(f"{host.name}: {flipped} pages are flipped, and none was read")
        for path in paths:
            flipped += await asyncio.to_thread(
                _flip, path, int(fault.options.get("pages", 4)), target.clock
            )
        await target.clock.sleep(_POLL_S)
    return Injected(at_s, f"{host.name}: {flipped} pages flipped, {met} met by the server")


_FILES = """SELECT pg_relation_filepath(c.oid) FROM pg_class AS c
    WHERE c.oid = ANY (ARRAY['runs', 'journal']::regclass[])
       OR c.oid IN (SELECT indexrelid FROM pg_index
                    WHERE indrelid = ANY (ARRAY['runs', 'journal']::regclass[]))"""
_MET = "SELECT COALESCE(sum(checksum_failures), 0) FROM pg_stat_database"
_PAGE = 8_192


def _flip(path: Path, pages: int, clock: Clock) -> int:
    """Flip a byte in up to so many pages of a file; how many."""
    size = path.stat().st_size // _PAGE
    chosen = {int.from_bytes(clock.random_bytes(4)) % size for _ in range(min(pages, size))}
    with path.open("r+b") as file:
        for page in chosen:
            at = page * _PAGE + 64 + int.from_bytes(clock.random_bytes(2)) % (_PAGE - 64)
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 0x40]))
    return len(chosen)


SHIM_FAULTS: Mapping[str, Does] = {"disk_errors": disk_errors, "disk_slow": disk_slow}
DISK_FAULTS = {**SHIM_FAULTS, "pages_flipped": pages_flipped}

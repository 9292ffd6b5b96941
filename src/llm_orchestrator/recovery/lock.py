"""One backup at a time per store: a record with a lease, found stale after its holder died.

The lease stands in the store, so it holds between machines; its end is on the store's clock. The
holder renews it while it works. Two things make a lease stale: its end has passed, or it was made
on this machine by a process that is gone (so that the next call after a crash need not wait).

Losing it (the store was away for longer than the lease) does no harm that is not seen: whoever
holds it next makes a file of another name.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import StoreError, StoreLocked
from llm_orchestrator.model import MICROSECONDS, Json
from llm_orchestrator.store.base import Batch, Database, PutRecord

KIND = "lease"
KEY = "backup"
LEASE_S = 60.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def _born(pid: int) -> str:
    """When a process began, in ticks since the boot; "" when there is none such, or nobody says."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[19]


def _boot() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _is_gone(lease: dict[str, Json]) -> bool:
    """True when the holder was a process of this very machine, and is no more."""
    boot, pid = _boot(), lease.get("pid")
    if not boot or lease.get("boot") != boot or not isinstance(pid, int):
        return False
    namespace = _namespace()
    return bool(namespace) and lease.get("pids") == namespace and _born(pid) != lease.get("born")


def _namespace() -> str:
    """Process ids mean something in one namespace only."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _holder(token: str, ends_at: int) -> dict[str, Json]:
    pid = os.getpid()
    return {
        "token": token,
        "host": socket.gethostname(),
        "pid": pid,
        "born": _born(pid),
        "boot": _boot(),
        "pids": _namespace(),
        "ends_at": ends_at,
    }


@contextlib.asynccontextmanager
async def locked(store: Database, clock: Clock, *, lease_s: float = LEASE_S) -> AsyncIterator[None]:
    """Hold the store's backup lock. Raises StoreLocked, naming the holder; StoreError."""
    token = clock.random_bytes(8).hex()
    await _take(store, token, lease_s)
    renewing = asyncio.create_task(_renew(store, clock, token, lease_s=lease_s))
    try:
        yield
    finally:
        renewing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await renewing
        with contextlib.suppress(StoreError):  # it ends by itself
            await _give_back(store, token)


async def _take(store: Database, token: str, lease_s: float) -> None:
    lease, version = await store.shelf.record(KIND, KEY)
    if isinstance(lease, dict) and not _is_gone(lease):
        ends_at = lease.get("ends_at")
        if isinstance(ends_at, int) and ends_at > store.clock.now_us():
            raise _busy(lease)
    if not await _put(store, _holder(token, _end(store, lease_s)), version):
        raise _busy((await store.shelf.record(KIND, KEY))[0])


def _busy(lease: Json) -> StoreLocked:
    who = lease if isinstance(lease, dict) else {}
    return StoreLocked(
        f"a backup of this store is being made already,"
        f" by process {who.get('pid', '?')} on {who.get('host', '?')}",
        hint="wait for it; the lock of a maker that died ends by itself within a minute",
    )


def _end(store: Database, lease_s: float) -> int:
    return store.clock.now_us() + int(lease_s * MICROSECONDS)


async def _put(store: Database, value: Json, version: int) -> bool:
    receipt = await store.commit(Batch(changes=(PutRecord(KIND, KEY, value, version),)))
    return not receipt.is_refused


async def _mine(store: Database, token: str) -> int:
    """The lease's version; 0 when it is not ours any more."""
    lease, version = await store.shelf.record(KIND, KEY)
    return version if isinstance(lease, dict) and lease.get("token") == token else 0


async def _renew(store: Database, clock: Clock, token: str, *, lease_s: float) -> None:
    while True:
        await clock.sleep(lease_s / 4)
        with contextlib.suppress(StoreError):  # the next time, maybe; the lease lasts for three
            version = await _mine(store, token)
            if not version:
                return
            await _put(store, _holder(token, _end(store, lease_s)), version)


async def _give_back(store: Database, token: str) -> None:
    version = await _mine(store, token)
    if version:
        await _put(store, None, version)

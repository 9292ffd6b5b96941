"""`llmo doctor --production`: look at everything that docs/production_readiness.md lists.

This module looks, production_items.py judges. It changes nothing but for one file in the data
folder, which it writes, syncs and removes again. What cannot be seen from here is said to be not
checked.
"""

from __future__ import annotations

import json
import os
import resource
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_orchestrator.cli.backup_given import backups_of
from llm_orchestrator.cli.doctor_postgres import Finding
from llm_orchestrator.cli.production_items import Facts, Folder, Stored, judge
from llm_orchestrator.errors import OrchestratorError, StoreError
from llm_orchestrator.model import MICROSECONDS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from llm_orchestrator.cli.session import Session
    from llm_orchestrator.recovery.patroni import Cluster
    from llm_orchestrator.store.base import Database
    from llm_orchestrator.wire.backups import Backups

    Integrity = Callable[[Database], Awaitable[Finding]]
_PROBE = ".llmo-doctor"
_PATIENCE_S = 10.0


async def findings(
    session: Session,
    *,
    prometheus: str = "",
    objectives: Path | None = None,
    kind_of: Callable[[Path], str],
    integrity: Integrity,
) -> list[Finding]:
    """Look and judge. `kind_of`: a folder's file system. Raises ConfigError."""
    return judge(
        await look(
            session,
            prometheus=prometheus,
            objectives=objectives,
            kind_of=kind_of,
            integrity=integrity,
        )
    )


async def look(
    session: Session,
    *,
    prometheus: str,
    objectives: Path | None,
    kind_of: Callable[[Path], str],
    integrity: Integrity,
) -> Facts:
    """Everything that is judged. Raises ConfigError."""
    from llm_orchestrator.drill.report import read
    from llm_orchestrator.engine.memory import Memory
    from llm_orchestrator.recovery.readiness import read_objectives
    from llm_orchestrator.store.sqlite_file import library_version
    from llm_orchestrator.wire import is_postgres
    from llm_orchestrator.wire.serving import is_loopback

    config = session.config
    goals = read_objectives(objectives)
    backups = backups_of(session, {})
    keys, keys_flaw = _keys(backups)
    stored, store_flaw = await _stored(session, integrity)
    alerts, alerts_flaw = await _alerts(prometheus) if prometheus else (None, "")
    memory = Memory(config.memory_limit_mb << 20).read()
    return Facts(
        config=config,
        is_server=is_postgres(config.store_url),
        is_loopback=is_loopback(config.host),
        sqlite=library_version(),
        folder=_folder(config.data_dir, config.archive_place, kind_of),
        files_max=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        memory=(memory.limit, memory.source),
        goal=goals["backup_restore"],
        keys=keys,
        keys_flaw=keys_flaw,
        place_flaw=await _place(session, config.backup_place, is_exclusive=False),
        archive_flaw=await _place(session, config.archive_place, is_exclusive=True),
        alerts=alerts,
        alerts_flaw=alerts_flaw,
        stored=stored,
        store_flaw=store_flaw,
        cluster=await _cluster(session),
        drills=read(config.data_dir / "drills" / "results", "").results,
        now=datetime.fromtimestamp(session.clock.now_us() / MICROSECONDS, UTC),
    )


async def _cluster(session: Session) -> Cluster | None:
    from llm_orchestrator.recovery.patroni import Patroni

    if not session.config.patroni_urls:
        return None
    async with Patroni(session.config.patroni_urls, session.clock) as patroni:
        return await patroni.look()


def _keys(backups: Backups) -> tuple[int, str]:
    try:
        return len(backups.keys), ""
    except OrchestratorError as error:
        return 0, error.message


async def _place(session: Session, spec: str, *, is_exclusive: bool) -> str | None:
    """What is wrong with a place; None where none is set."""
    from llm_orchestrator.wire.backups import make_place

    if not spec:
        return None
    try:
        place = make_place(spec, session.config, session.clock)
        return await place.check(is_exclusive=is_exclusive)
    except OrchestratorError as error:
        return error.message


def _folder(path: Path, archive: str, kind_of: Callable[[Path], str]) -> Folder:
    """The data folder, or the nearest one above it where there is none yet."""
    while not path.is_dir() and path != path.parent:
        path = path.absolute().parent
    flaw = _write(path / f"{_PROBE}-{os.getpid()}")
    state = os.statvfs(path)
    other = Path(archive) if archive and "://" not in archive else None
    is_here = other is not None and other.exists() and other.stat().st_dev == path.stat().st_dev
    return Folder(str(path), flaw, state.f_bavail * state.f_frsize, kind_of(path), is_here)


def _write(file: Path) -> str:
    """Why a file cannot be made durable here, or nothing."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(descriptor, b"probe\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
            file.unlink()
    except OSError as error:
        return f"cannot be written and synced: {error.strerror or error}"
    return ""


async def _alerts(url: str) -> tuple[frozenset[str] | None, str]:
    """The names of all alerting rules that a Prometheus has loaded, or why they are not known."""
    import aiohttp

    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_PATIENCE_S)) as http,
            http.get(f"{url.rstrip('/')}/api/v1/rules?type=alert") as answer,
        ):
            groups = (await answer.json())["data"]["groups"]
        return frozenset(str(rule["name"]) for group in groups for rule in group["rules"]), ""
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError) as error:
        return None, f"{url} does not tell its rules: {type(error).__name__} {error}".strip()


async def _stored(session: Session, integrity: Integrity) -> tuple[Stored | None, str]:
    """What the store tells, or why it does not. A store that is not there is not made."""
    try:
        async with session.client() as store:
            return await _tell(session, store, integrity), ""
    except StoreError as error:
        return None, error.message


async def _tell(session: Session, store: Database, integrity: Integrity) -> Stored:
    from llm_orchestrator.recovery.readiness import archive_exposure, read_backups
    from llm_orchestrator.security.audit_check import check_audit
    from llm_orchestrator.wire import is_postgres

    config, now_us = session.config, store.clock.now_us()
    server = way = None
    if is_postgres(config.store_url):
        from llm_orchestrator.store import postgres_report

        server = await postgres_report.report(
            config.store_url, direct_url=config.direct_url, clock=session.clock
        )
        way = await postgres_report.way(config.direct_url or config.store_url)
    return Stored(
        now_us=now_us,
        nodes=await store.shelf.nodes(),
        backups=await read_backups(store),
        archive=await archive_exposure(store, now_us),
        definitions=await _definitions(store),
        audit=await check_audit(store),
        integrity=await integrity(store),
        server=server,
        way=way,
    )


async def _definitions(store: Database) -> dict[str, Any]:
    """The newest of each name. A Python workflow's says nothing of what it calls."""
    newest = sorted(await store.shelf.workflows(), key=lambda one: one.created_at)
    return {one.name: json.loads(one.definition) for one in newest}

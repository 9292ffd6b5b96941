"""What a node does now and then for the layers above the engine, as the configuration says."""

from __future__ import annotations

from functools import partial

from llm_orchestrator.config import Config
from llm_orchestrator.engine.chores import Chore
from llm_orchestrator.errors import ConfigError
from llm_orchestrator.store.base import Database
from llm_orchestrator.telemetry.metrics import Metrics


def chores(config: Config, store: Database, *, metrics: Metrics) -> list[Chore]:
    """What to do, and how often. Raises ConfigError."""
    found = []
    if config.backup_schedule or config.archive_place:
        from llm_orchestrator.wire.backup_keeper import PERIOD_S, BackupKeeper  # noqa: PLC0415
        from llm_orchestrator.wire.backups import Backups  # noqa: PLC0415 (rarely needed)

        keeper = BackupKeeper(Backups(config, store.clock), store, config.backup_schedule)
        if config.archive_place:
            found.append(_archive_chore(config, store))
        found.append(Chore("scheduled backups", PERIOD_S, keeper.do))
    if config.patroni_urls and config.damaged_primary == "leave":
        found += _leaving(config, store, metrics=metrics)
    days = config.audit_retention_days
    if days < 0:
        raise ConfigError(f"audit_retention_days is {days:g}; it takes days, 0 for ever")
    if not days:
        return found
    from llm_orchestrator.security import audit_retention  # noqa: PLC0415 (rarely needed)

    work = partial(audit_retention.forget_older, store, store.clock, days=days, metrics=metrics)
    return [*found, Chore("audit retention", audit_retention.PERIOD_S, work)]


def _leaving(config: Config, store: Database, *, metrics: Metrics) -> list[Chore]:
    """Leaving a primary that has damaged pages, where there are servers to go to."""
    from llm_orchestrator.store.postgres import PostgresStore  # noqa: PLC0415 (not on a file)

    if not isinstance(store, PostgresStore):
        return []
    from llm_orchestrator.recovery.damaged_primary import PERIOD_S, PageGuard  # noqa: PLC0415
    from llm_orchestrator.wire.region import patroni_of  # noqa: PLC0415

    patroni = partial(patroni_of, config, store.clock)
    guard = PageGuard(store, store.counts, pages=store.pages, patroni=patroni, metrics=metrics)
    return [Chore("damaged pages", PERIOD_S, guard.do)]


def _archive_chore(config: Config, store: Database) -> Chore:
    from llm_orchestrator.recovery.stream_heal import PERIOD_S, heal  # noqa: PLC0415
    from llm_orchestrator.wire.archive import archive_place  # noqa: PLC0415
    from llm_orchestrator.wire.orchestrator import is_postgres  # noqa: PLC0415

    place = archive_place(config, store.clock)
    work = partial(heal, place, store, is_shared=is_postgres(store.shown))
    return Chore("streams that broke off", PERIOD_S, work)

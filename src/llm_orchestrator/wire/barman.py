"""Barman for a configured store: its server, and a base for a restore to a point in time."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from llm_orchestrator import __version__
from llm_orchestrator.clock import Clock
from llm_orchestrator.config import Config
from llm_orchestrator.errors import ConfigError
from llm_orchestrator.recovery.barman import Barman, Target
from llm_orchestrator.recovery.manifest import Manifest
from llm_orchestrator.recovery.pack import explained
from llm_orchestrator.recovery.restore import Base
from llm_orchestrator.store.postgres_copy import PostgresCopier
from llm_orchestrator.wire.orchestrator import is_postgres


def make_barman(config: Config, clock: Clock) -> Barman:
    """Raises ConfigError when none is configured, or the store is no PostgreSQL."""
    if not config.barman_server:
        raise ConfigError(
            "there is no Barman: barman_server is not set",
            hint='barman_server = "its name in Barman\'s configuration"',
        )
    if not is_postgres(config.store_url):
        raise ConfigError("Barman keeps PostgreSQL, and this store is none")
    return Barman(config.barman_server, config.barman_config, clock)


@asynccontextmanager
async def base_at(config: Config, clock: Clock, target: Target) -> AsyncIterator[tuple[Base, bool]]:
    """What the store was at `target`; False when the log ends before it. Raises StoreError."""
    parts = urlsplit(config.direct_url or config.store_url)
    user, name = unquote(parts.username or "postgres"), unquote(parts.path.lstrip("/"))
    folder = config.backup_folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explained(error, folder) from error
    barman = make_barman(config, clock)
    with tempfile.TemporaryDirectory(prefix=".llmo-", dir=folder) as scratch:
        async with barman.at(target, user=user) as (server, is_reached):
            begun = clock.monotonic()
            copier = PostgresCopier(server.url(user, name), clock)
            dump, cut = await copier.dump(Path(scratch))
        manifest = Manifest.of(
            cut,
            backup_id=f"barman {target.shown}",
            program=__version__,
            created_at=target.shown,
            host="",
            duration_s=clock.monotonic() - begun,
            store=barman.shown,
            dump=dump.name,
            dump_bytes=dump.stat().st_size,
            heads=list(cut.heads),
        )
        yield (
            Base(manifest, dump, PostgresCopier(config.direct_url or config.store_url, clock)),
            is_reached,
        )

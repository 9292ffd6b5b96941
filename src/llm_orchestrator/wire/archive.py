"""The stream archive of a configured store, attached where the store is made."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from llm_orchestrator.clock import Clock
from llm_orchestrator.config import Config
from llm_orchestrator.errors import ConfigError
from llm_orchestrator.recovery.unarchived import Unarchived
from llm_orchestrator.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from llm_orchestrator.recovery.archive_read import ArchiveCopy
    from llm_orchestrator.recovery.places import Place
    from llm_orchestrator.recovery.stream import StreamArchive, StreamOptions
    from llm_orchestrator.recovery.stream_life import StoreArchive
    from llm_orchestrator.store.base import Database


def make_archive(
    config: Config, store: Database, *, kind: str, metrics: Metrics | None
) -> StoreArchive | Unarchived:
    """What a store that is not open yet gets for its hook. Raises ConfigError."""
    if not config.archive_place:
        return Unarchived(store)
    from llm_orchestrator.recovery.stream import Mode, OnFailure, StreamOptions  # noqa: PLC0415
    from llm_orchestrator.recovery.stream_life import StoreArchive  # noqa: PLC0415

    options = StreamOptions(
        Mode(config.archive_mode), OnFailure(config.archive_on_failure), config.archive_lag_s
    )
    place = archive_place(config, store.clock)
    make = partial(_make, config, store, place=place, kind=kind, options=options, metrics=metrics)
    return StoreArchive(store, place, make, on_failure=options.on_failure)


async def start_archive(store: Database) -> None:
    """Before an engine serves. Raises ConfigError, StoreError.

    Stores that a test or a proof has made by itself have no hook.
    """
    archive = getattr(store, "archive", None)
    if archive is not None and hasattr(archive, "start"):
        await archive.start()


def archive_place(config: Config, clock: Clock) -> Place:
    """Where it is. Raises ConfigError when none is set."""
    from llm_orchestrator.wire.backups import make_place  # noqa: PLC0415 (rarely needed)

    if not config.archive_place:
        raise ConfigError(
            "there is no stream archive: archive_place is not set",
            hint='archive_place = "/another/disk" or "s3://BUCKET/PREFIX"',
        )
    return make_place(config.archive_place, config, clock)


def archive_copy(config: Config, store: Database) -> ArchiveCopy:
    """The archive as a second copy of journals. Raises ConfigError."""
    from llm_orchestrator.recovery.archive_read import ArchiveCopy  # noqa: PLC0415 (rarely needed)
    from llm_orchestrator.wire.backups import Backups  # noqa: PLC0415

    backups = Backups(config, store.clock)
    return ArchiveCopy(archive_place(config, store.clock), lambda: backups.keys)


def _make(
    config: Config,
    store: Database,
    stream: str,
    *,
    place: Place,
    kind: str,
    options: StreamOptions,
    metrics: Metrics | None,
) -> StreamArchive:
    from llm_orchestrator.recovery.frames import read_recipients  # noqa: PLC0415 (rarely needed)
    from llm_orchestrator.recovery.stream import StreamArchive  # noqa: PLC0415
    from llm_orchestrator.recovery.stream_store import StoreStream  # noqa: PLC0415
    from llm_orchestrator.wire.backups import recipients  # noqa: PLC0415

    keys = read_recipients(recipients(config.archive_recipients))
    opener = StoreStream(place, store, store.clock, kind=kind, stream=stream, recipients=keys)
    return StreamArchive(opener, store.clock, options, metrics=metrics)

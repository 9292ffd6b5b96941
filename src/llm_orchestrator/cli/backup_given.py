"""What verbs about backups are given: options that several have, and sizes for people."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llm_orchestrator.cli.session import Session
    from llm_orchestrator.wire.backups import Backups

AtFolder = Annotated[
    Path | None, typer.Option("--dir", metavar="DIR", help="Where backup files are (backup_dir).")
]
AtPlace = Annotated[
    str | None,
    typer.Option(
        "--place", metavar="PLACE", help="The second place: s3://BUCKET/PREFIX or a folder."
    ),
]
KeepDays = Annotated[
    int | None,
    typer.Option("--keep-days", min=0, help="Keep those younger than N days (backup_keep_days)."),
]
_UNITS = ("kB", "MB", "GB", "TB")


def keep_days_of(days: int | None) -> dict[str, object]:
    """The setting that the option stands for."""
    return {"backup_keep_days": days}


def backups_of(session: Session, flags: Mapping[str, object]) -> Backups:
    """The backups of the configured store; flags count more than settings. Raises ConfigError."""
    from llm_orchestrator.wire.backups import Backups

    return Backups(session.config_with(flags), session.clock)


def size(number: float) -> str:
    """Bytes for people."""
    if number < 1_000:
        return f"{number:.0f} B"
    power = min(len(_UNITS), int(math.log(number, 1_000)))
    return f"{number / 1_000**power:.1f} {_UNITS[power - 1]}"

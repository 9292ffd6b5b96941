"""How far a long piece of work is: a bar on a terminal, else nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from llm_orchestrator.cli.session import Session
    from llm_orchestrator.store.copying import Advance


class Bar:
    """Shows stages as they begin. May be told from any thread."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def watch(self, stage: str, done: int, total: int) -> None:
        """So many bytes of a stage are done; of how many, 0 when nobody knows."""
        if self._progress is None:
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total or None)
        self._progress.update(self._tasks[stage], completed=done, total=total or None)

    def of(self, stage: str) -> Advance:
        """The same for one stage."""
        return lambda done, total: self.watch(stage, done, total)


@contextmanager
def bar(session: Session) -> Iterator[Bar]:
    """A bar on stderr, if somebody looks at it."""
    if session.flags.is_quiet or not sys.stderr.isatty():
        yield Bar(None)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description:<8}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True, highlight=False)
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bar(progress)

"""A folder for what is half-made, beside where it will be: it goes with its maker.

Whoever makes one holds a lock on it (flock) that ends with the process, so the next one knows what
a crash left, and removes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

from llm_orchestrator.errors import OperatorError
from llm_orchestrator.recovery import pack

PREFIX = ".making-"
P = ParamSpec("P")
T = TypeVar("T")


@contextlib.asynccontextmanager
async def scratch(folder: Path) -> AsyncIterator[Path]:
    """A new folder in `folder`, which is made if need be. Raises StoreError."""
    try:
        held = await asyncio.to_thread(_make, folder)
    except OSError as error:
        raise pack.explained(error, folder / "a backup") from error
    try:
        yield held.path
    finally:
        await asyncio.to_thread(held.remove)


class _Held(NamedTuple):
    path: Path
    handle: int

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.handle)


def _make(folder: Path) -> _Held:
    folder.mkdir(parents=True, exist_ok=True)
    turn = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(turn, fcntl.LOCK_EX)  # nobody takes a new one, not locked yet, for a leftover
        for old in _leftovers(folder):
            shutil.rmtree(old, ignore_errors=True)
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(turn)
    return _Held(path, handle)


def _leftovers(folder: Path) -> Iterator[Path]:
    """Folders that nobody holds."""
    for path in folder.glob(f"{PREFIX}*"):
        try:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield path
        except BlockingIOError:
            continue
        finally:
            os.close(handle)


async def in_thread(work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """In a thread that is told to `stop`, and waited for, when the caller is cancelled."""
    stop = pack.Stop()
    options["stop"] = stop
    running = asyncio.create_task(asyncio.to_thread(work, *args, **options))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        stop.is_set = True
        with contextlib.suppress(InterruptedError, OperatorError):
            await running
        raise

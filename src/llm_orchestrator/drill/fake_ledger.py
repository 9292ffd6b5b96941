"""The fake server's memory on disk: one JSON line per event, fsynced, never rewritten.

It is the witness of a crash test, so a line that `append` has acknowledged survives kill -9 of the
server and of the machine. Lines that wait while one fsync runs share the next one (group commit).
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any


class Ledger:
    """An append-only file. `append` returns when the line is on disk."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._waiting: list[tuple[bytes, asyncio.Future[None]]] = []
        self._work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def put(self, line: dict[str, Any]) -> asyncio.Future[None]:
        """Queue a line. The future ends when it is on disk; nobody has to wait for it."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((json.dumps(line, separators=(",", ":")).encode() + b"\n", done))
        self._work.set()
        if self._task is None:
            self._task = asyncio.create_task(self._write())
        return done

    async def append(self, line: dict[str, Any]) -> None:
        """Write a line and wait until it is on disk."""
        await asyncio.shield(self.put(line))

    async def lines(self) -> list[dict[str, Any]]:
        """Everything written so far, in order."""
        while self._waiting:
            await asyncio.shield(self._waiting[-1][1])
        text = await asyncio.to_thread(self._path.read_text)
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    async def close(self) -> None:
        """Write what is queued, then close the file."""
        while self._waiting:
            await asyncio.shield(self._waiting[-1][1])
        if self._task is not None:
            self._task.cancel()
        os.close(self._file)

    async def _write(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            batch = self._waiting[:]
            await asyncio.to_thread(self._sync, b"".join(data for data, _ in batch))
            del self._waiting[: len(batch)]
            for _, done in batch:
                if not done.done():
                    done.set_result(None)

    def _sync(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]
        os.fsync(self._file)

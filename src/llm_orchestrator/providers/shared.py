"""Small values that every node sees, behind base.SharedState; breakers and limits live here.

A `Cell` is a courtesy, never a lock: when the store cannot be reached the node goes on with what it
knows. A write that was overtaken is computed again on the newer value.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TypeVar

from llm_orchestrator.errors import StoreError
from llm_orchestrator.model import Json
from llm_orchestrator.providers.base import SharedState

_TRIES = 8
T = TypeVar("T")


class MemoryState:
    """Shared state for one process: for tests, and where there is no store."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, str], tuple[Json, int]] = {}

    async def get(self, kind: str, key: str) -> tuple[Json, int]:
        """Value and version; (None, 0) when there is none."""
        return self._values.get((kind, key), (None, 0))

    async def put(self, kind: str, key: str, value: Json, *, version: int) -> bool:
        """Write if the version is still `version`."""
        if self._values.get((kind, key), (None, 0))[1] != version:
            return False
        self._values[kind, key] = (value, version + 1)
        return True


class Cell:
    """One shared value with its version, as this node last saw it."""

    def __init__(self, shared: SharedState, kind: str, key: str) -> None:
        self._shared = shared
        self._kind = kind
        self._key = key
        self._version = 0
        self._lock = asyncio.Lock()
        self.value: Json = None

    async def read(self) -> None:
        """Look the value up; an unreachable store changes nothing."""
        with contextlib.suppress(StoreError):
            self.value, self._version = await self._shared.get(self._kind, self._key)

    async def change(self, change: Callable[[Json], tuple[Json, T]]) -> T:
        """Apply a pure change. One that returns the value as it was costs no write."""
        async with self._lock:
            for _ in range(_TRIES):
                before = self.value
                value, result = change(before)
                if value is before or await self._write(value):
                    return result
                await self.read()
            self.value, result = change(self.value)
            return result

    async def _write(self, value: Json) -> bool:
        try:
            version = self._version
            if not await self._shared.put(self._kind, self._key, value, version=version):
                return False
            self._version += 1
        except StoreError:
            pass
        self.value = value
        return True

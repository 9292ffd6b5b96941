"""A copied store as a proof's engine sees it: nothing of the original moves.

The engine may open it, accept a run of its own and drive it to its end. It is offered nobody
else's run, hears of no schedule and of no order, and mends nothing: what happens in a copy must not
be heard outside of it (law 10).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from llm_orchestrator.engine.maintenance import KIND as MAINTENANCE
from llm_orchestrator.engine.schedule import KIND as SCHEDULE
from llm_orchestrator.model import Json, Run
from llm_orchestrator.store.base import Database, Look, Shelf, Wanted

_UNHEARD = (MAINTENANCE, SCHEDULE)


class _QuietLook:
    def __init__(self, look: Look) -> None:
        self._look = look

    def __getattr__(self, name: str) -> Any:
        return getattr(self._look, name)

    async def unfinished(self) -> list[str]:
        return []

    async def next_wake(self) -> int | None:
        return None


class _QuietShelf:
    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shelf, name)

    async def record(self, kind: str, key: str) -> tuple[Json, int]:
        return (None, 0) if kind in _UNHEARD else await self._shelf.record(kind, key)

    async def records(self, kind: str) -> dict[str, Json]:
        return {} if kind in _UNHEARD else await self._shelf.records(kind)


class _QuietStore:
    def __init__(self, store: Database) -> None:
        self._store = store
        self.look = cast(Look, _QuietLook(store.look))
        self.shelf = cast(Shelf, _QuietShelf(store.shelf))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def pick(self, node_id: str, wanted: Wanted) -> list[Run]:
        return []

    async def adopt(
        self,
        node_id: str,
        limit: int,
        except_runs: Sequence[str] = (),
        *,
        strange: Sequence[str] = (),
    ) -> list[str]:
        return []


def quiet(store: Database) -> Database:
    """See the module's docstring."""
    return cast(Database, _QuietStore(store))

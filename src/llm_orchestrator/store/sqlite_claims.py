"""Which runs are to be claimed, on SQLite: one engine, so nobody else picks.

When pages of `runs` are damaged, its rows are read one by one and chosen here.
"""

from __future__ import annotations

from collections.abc import Sequence

from llm_orchestrator.model import Run, RunState
from llm_orchestrator.store.base import Shelf, Wanted, lives
from llm_orchestrator.store.rows import listed
from llm_orchestrator.store.sqlite_look import SQLiteLook
from llm_orchestrator.store.sqlite_salvage import is_text

_NODES_MAX = 1_000


class SQLiteClaims:
    """`pick` and `adopt` of store.base.Store."""

    def __init__(self, look: SQLiteLook, shelf: Shelf) -> None:
        self._look = look
        self._shelf = shelf

    async def pick(self, wanted: Wanted) -> list[Run]:
        """Runs that are due."""
        limit = wanted.limit
        if wanted.queue is not None and wanted.concurrency:
            limit = min(limit, max(0, wanted.concurrency - await self._busy(wanted.queue)))

        def due(runs: list[Run]) -> list[Run]:
            ready = [run for run in runs if _is_due(run, wanted)]
            return sorted(ready, key=lambda run: (-run.priority, run.wake_at, run.run_id))

        rows = await self._look.rows(
            "claimable",
            due,
            now=wanted.now_us,
            limit=limit + len(wanted.except_runs),
            full_queues=listed(wanted.full_queues),
            strange=listed(wanted.strange),
            queue=wanted.queue,
        )
        found = self._look.readable(rows)
        return [run for run in found if run.run_id not in wanted.except_runs][:limit]

    async def adopt(
        self, limit: int, except_runs: Sequence[str], strange: Sequence[str]
    ) -> list[str]:
        """Runs of past lives."""
        nodes = await self._shelf.nodes(_NODES_MAX)
        alive = [node.node_id for node in nodes if lives(node)]

        def foreign(runs: list[Run]) -> list[Run]:
            owned = [run for run in runs if run.owner not in (None, *alive)]
            return [run for run in owned if run.digest not in strange]

        rows = await self._look.rows("owned", foreign, alive=listed(alive), strange=listed(strange))
        found = [row.run_id if isinstance(row, Run) else str(row[0]) for row in rows]
        readable = [run_id for run_id in found if is_text(run_id)]
        return [run_id for run_id in readable if run_id not in except_runs][:limit]

    async def _busy(self, queue: str) -> int:
        def driven(runs: list[Run]) -> list[Run]:
            return [run for run in runs if run.owner is not None and run.queue == queue]

        rows = await self._look.rows("driven", driven, queue=queue)
        first = rows[0] if len(rows) == 1 else None
        return len(rows) if first is None or isinstance(first, Run) else int(first[0])


def _is_due(run: Run, wanted: Wanted) -> bool:
    return (
        run.state in (RunState.PENDING, RunState.WAITING)
        and run.owner is None
        and run.wake_at <= wanted.now_us
        and run.queue not in wanted.full_queues
        and run.digest not in wanted.strange
        and wanted.queue in (None, run.queue)
    )

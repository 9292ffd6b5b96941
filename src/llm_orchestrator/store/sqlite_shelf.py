"""Reading definitions, records and vectors from SQLite: see store.base.Shelf."""

from __future__ import annotations

from llm_orchestrator.errors import StoreDamaged
from llm_orchestrator.model import Json, Workflow
from llm_orchestrator.store.check import definition_digest
from llm_orchestrator.store.sqlite_reader import SQLiteReader, parse


class SQLiteShelf:
    """See store.base.Shelf for every method's contract."""

    def __init__(self, reader: SQLiteReader) -> None:
        self._reader = reader

    async def workflow(
        self, name: str, version: str | None = None, digest: str | None = None
    ) -> Workflow | None:
        rows = await self._reader.rows("workflow", name=name, version=version, digest=digest)
        if not rows:
            return None
        found = Workflow(*rows[0])
        if definition_digest(found.definition) != found.digest:
            raise StoreDamaged(
                f"the stored definition of workflow {name} {found.version} does not fit its digest",
                hint="llmo workflows register FILE",
            )
        return found

    async def workflows(self) -> list[Workflow]:
        return [Workflow(*row) for row in await self._reader.rows("workflows")]

    async def record(self, kind: str, key: str) -> tuple[Json, int]:
        rows = await self._reader.rows("record", kind=kind, key=key)
        return (parse(rows[0][0]), int(str(rows[0][1]))) if rows else (None, 0)

    async def records(self, kind: str) -> dict[str, Json]:
        return {
            str(key): parse(value) for key, value in await self._reader.rows("records", kind=kind)
        }

    async def vectors(self, index: str, namespace: str) -> list[tuple[str, bytes, bytes]]:
        return await self._reader.rows("vectors", index_name=index, namespace=namespace)

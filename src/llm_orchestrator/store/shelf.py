"""Reading definitions, records, vectors and nodes from tables: see store.base.Shelf."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

from llm_orchestrator.errors import StoreDamaged
from llm_orchestrator.model import Json, Workflow
from llm_orchestrator.store.audit import AuditEntry, AuditFilter
from llm_orchestrator.store.base import Member
from llm_orchestrator.store.check import definition_digest
from llm_orchestrator.store.rows import member_of, parse, row_digest

logger = logging.getLogger(__name__)


class Reader(Protocol):
    """What runs a named statement (store/queries.sql)."""

    async def rows(self, name: str, /, **values: object) -> list[Any]: ...


class TableShelf:
    """See store.base.Shelf for every method's contract."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.has_nearest = False
        """True when the database itself finds the nearest vectors (pgvector)."""

    async def workflow(
        self, name: str, version: str | None = None, digest: str | None = None
    ) -> Workflow | None:
        rows = await self._reader.rows("workflow", name=name, version=version, digest=digest)
        if not rows:
            return None
        found = Workflow(*rows[0])
        definition: object = found.definition
        if not isinstance(definition, bytes) or definition_digest(definition) != found.digest:
            raise StoreDamaged(
                f"the stored definition of workflow {name} {found.version} does not fit its digest",
                hint="llmo workflows register FILE",
            )
        return found

    async def workflows(self) -> list[Workflow]:
        rows = await self._reader.rows("workflows")
        return [Workflow(*row) for row in rows if isinstance(row[3], bytes)]

    async def record(self, kind: str, key: str) -> tuple[Json, int]:
        rows = await self._reader.rows("record", kind=kind, key=key)
        if not rows:
            return None, 0
        value, version, digest = rows[0]
        return _checked(kind, key, value, version=version, digest=digest), version

    async def records(self, kind: str) -> dict[str, Json]:
        found = {}
        for key, value, version, digest in await self._reader.rows("records", kind=kind):
            try:
                found[key] = _checked(kind, key, value, version=version, digest=digest)
            except StoreDamaged as error:
                logger.error("%s", error.message)
        return found

    async def vectors(
        self, index: str, namespace: str, *, near: Sequence[float] = (), limit: int = 0
    ) -> list[tuple[str, bytes, bytes]]:
        where = {"index_name": index, "namespace": namespace}
        if self.has_nearest and limit and near:
            rows = await self._reader.rows(
                "nearest", **where, near=as_text(near), dimensions=len(near), limit=limit
            )
        else:
            rows = await self._reader.rows("vectors", **where)
        return [tuple(row) for row in rows]

    async def nodes(self, limit: int = 100) -> list[Member]:
        return [member_of(row) for row in await self._reader.rows("nodes", limit=limit)]

    async def audit(self, wanted: AuditFilter) -> list[AuditEntry]:
        at, chain_id, number = wanted.before or (None, None, None)
        rows = await self._reader.rows(
            "audit",
            actor=wanted.actor,
            action=wanted.action,
            target=wanted.target,
            since=wanted.since,
            until=wanted.until,
            at=at,
            chain_id=chain_id,
            number=number,
            limit=wanted.limit,
        )
        return [AuditEntry(*row) for row in rows]

    async def audit_chains(self, after: tuple[str, int], limit: int) -> list[AuditEntry]:
        chain_id, number = after
        rows = await self._reader.rows(
            "audit_chains", chain_id=chain_id, number=number, limit=limit
        )
        return [AuditEntry(*row) for row in rows]


def as_text(vector: Sequence[float]) -> str:
    """A vector as pgvector reads it."""
    return f"[{','.join(map(repr, vector))}]"


def _checked(kind: str, key: str, value: object, *, version: object, digest: object) -> Json:
    if not isinstance(value, bytes) or digest != row_digest(kind, key, version, value):
        raise StoreDamaged(f"record {kind}/{key} does not fit its digest", hint="llmo doctor")
    return parse(value)

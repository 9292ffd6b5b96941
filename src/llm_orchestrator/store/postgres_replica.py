"""A standby as a second copy of journals: a damaged page of the primary is whole on its replica.

Replication sends what was written, not the pages, so what rots on one disk does not rot on the
other. Reads only; it may be a moment behind.
"""

from __future__ import annotations

from collections.abc import Sequence

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import StoreUnavailable
from llm_orchestrator.model import Entry
from llm_orchestrator.store.check import whole
from llm_orchestrator.store.postgres_address import Address, parse_address
from llm_orchestrator.store.postgres_connect import Connection, connect_standby
from llm_orchestrator.store.postgres_look import PostgresLook
from llm_orchestrator.store.postgres_read import Pool


class _StandbyPool(Pool):
    """One connection, to a server that takes no writes."""

    def __init__(self, address: Address, clock: Clock) -> None:
        super().__init__(address, clock, size=1, is_pooled=False)
        self._standbys = address

    async def _take(self) -> Connection:
        connection = await connect_standby(self._standbys)
        if connection is None:
            raise StoreUnavailable(f"no host of {self._standbys.shown} is a standby")
        return connection

    def _give(self, connection: Connection) -> None:
        connection.terminate()  # asked for once in a blue moon


class Replica:
    """See engine.second_copy.SecondCopy."""

    name = "a replica"

    def __init__(self, url: str, clock: Clock) -> None:
        self._look = PostgresLook(_StandbyPool(parse_address(url), clock))

    async def entries(self, run_id: str) -> Sequence[Entry]:
        journal = (await self._look.load([run_id])).get(run_id)
        return () if journal is None else whole(journal)

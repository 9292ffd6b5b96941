"""Counting what is in a store: for metrics and for people. Reads only, and never on a hot path.

`census` reads every row of `runs`, so whoever asks paces himself by how long it took; `statistics`
reads what is due or driven, through the indexes that claims use. Both are of the store as a whole:
every process of a cluster sees the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol


class RunCount(NamedTuple):
    """So many runs of a workflow are in a state."""

    state: str
    workflow: str
    number: int


class Queue(NamedTuple):
    """Runs of a queue that are due and that nobody drives."""

    name: str
    depth: int
    since: int
    """When the oldest of them became due, microseconds on the store's clock."""


class Standby(NamedTuple):
    """A server that follows the store's. What the server does not tell of it is 0."""

    name: str
    is_sync: bool
    """Commits wait for it."""
    lag_s: float
    """Behind in what it has replayed."""
    lag_bytes: int
    exposed_s: float
    """Behind in what it has on its disk: what its server alone could lose."""


class DamagedPages(NamedTuple):
    """What the server that is written to has met on its own disk."""

    number: int
    """Since its counters were reset, or it was made anew."""
    age_s: float | None
    """Since the last one was met; None: none was."""


class Statistics(NamedTuple):
    """The store at one moment."""

    queues: Sequence[Queue] = ()
    stalled: int = 0
    """Runs that somebody drives and that have no new entry."""
    standbys: Sequence[Standby] | None = None
    """None where there can be none, or where we may not see them."""
    damaged_pages: DamagedPages | None = None
    """None where no page has a checksum."""

    @property
    def waiting(self) -> int:
        """Runs that are due and that nobody drives."""
        return sum(queue.depth for queue in self.queues)


class Counts(Protocol):
    """See the module's docstring. All may raise StoreError."""

    async def census(self) -> list[RunCount]:
        """All runs, by state and workflow; the most frequent first."""
        ...

    async def statistics(self, now_us: int, *, stalled_before: int) -> Statistics:
        """What is due at `now_us`; stalled is what has no entry since `stalled_before`."""
        ...


class Reader(Protocol):
    """What runs a named statement (store/queries.sql)."""

    async def rows(self, name: str, /, **values: object) -> list[Any]: ...


class TableCounts:
    """Counts from tables. `has_standbys`: it is a server that others may follow."""

    def __init__(self, reader: Reader, *, has_standbys: bool = False) -> None:
        self._reader = reader
        self._has_standbys = has_standbys

    async def census(self) -> list[RunCount]:
        return [RunCount(str(row[0]), str(row[1]), row[2]) for row in await self._rows("census")]

    async def statistics(self, now_us: int, *, stalled_before: int) -> Statistics:
        queues = [
            Queue(str(name), depth, since if isinstance(since, int) else now_us)
            for name, depth, since in await self._rows("queues_due", now=now_us)
        ]
        ((stalled,),) = await self._rows("stalled", before=stalled_before)
        if not self._has_standbys:
            return Statistics(queues, stalled)
        return Statistics(queues, stalled, await self._standbys(), await self.damaged_pages())

    async def damaged_pages(self) -> DamagedPages | None:
        """What a server says of its pages; None where they have no checksums."""
        ((number, age_s),) = await self._rows("damaged_pages")
        return DamagedPages(number, age_s) if number is not None else None

    async def _standbys(self) -> list[Standby] | None:
        if not (await self._rows("may_see_standbys"))[0][0]:
            return None
        return [
            Standby(name, is_sync, float(lag_s), int(lag), float(exposed_s))
            for name, is_sync, lag_s, lag, exposed_s in await self._rows("standbys")
        ]

    async def _rows(self, name: str, /, **values: object) -> list[Any]:
        return await self._reader.rows(name, **values)

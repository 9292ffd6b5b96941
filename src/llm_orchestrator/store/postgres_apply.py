"""A batch on its way: one statement when all goes well, and what to do when it does not.

Law 2: a run whose entries did not go in is looked up: our digest at its place means that it had
landed before, another one that it has another owner, none that its head is not what it was. Law 9:
what fails for its data is halved until the guilty run stands alone, the others commit. Law 3: an
unknown outcome is settled by the lane's barrier; what did not land is sent again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import StoreError, StoreReplaced, StoreUnavailable
from llm_orchestrator.store.base import (
    Append,
    Batch,
    Change,
    Outcome,
    Post,
    Receipt,
    TrimCommits,
    count_posts,
)
from llm_orchestrator.store.postgres_connect import (
    Connection,
    is_data_trouble,
    is_passing,
    is_taken,
    translate,
)
from llm_orchestrator.store.postgres_lane import Lane, Unsure, Work
from llm_orchestrator.store.postgres_turn import Refusal, Turn
from llm_orchestrator.store.postgres_write import Statement, group, is_common, is_plain, state
from llm_orchestrator.store.queries import load_queries

logger = logging.getLogger(__name__)
PATIENCE_S = 10.0
"""How long a commit whose store does not answer is tried before its caller is told."""
_PAUSE_S = 0.1
TURN_S = 300.0
"""A transaction of many statements may take longer than one (retention, new indexes)."""


def _is_short(changes: Sequence[Change]) -> bool:
    """True for a probe of health: it must notice soon that its server is frozen.

    Everything else of this lane waits behind it.
    """
    return all(isinstance(each, TrimCommits) and each.limit <= 1 for each in changes)


class Posted:
    """Which numbers the messages of one batch got, as far as the server's answers were heard."""

    def __init__(self, at: int) -> None:
        self.at = at
        self._heard: dict[int, list[int]] = {}
        self._missed: set[int] = set()

    def hear(self, found: Iterable[tuple[Post, int]]) -> None:
        """These were put."""
        for post, number in found:
            self._heard.setdefault(id(post), []).append(number)

    def miss(self, changes: Sequence[Change]) -> None:
        """These landed, and nobody heard how."""
        self._missed |= {id(change) for change in changes}

    def numbers(self, batch: Batch) -> tuple[int, ...]:
        """As in Receipt. What was refused, and what put nothing, has no number."""
        if not self._heard and not self._missed and not any(each.changes for each in batch.appends):
            return (0,) * count_posts(batch.changes)
        found = []
        for change in batch.every_change():
            if isinstance(change, Post):
                heard = self._heard.get(id(change))
                found.append(heard.pop(0) if heard else -int(id(change) in self._missed))
        return tuple(found)


class Applier:
    """Applies batches on one lane."""

    def __init__(
        self, lane: Lane, *, incarnation: str, clock: Clock, has_nearest: bool = False
    ) -> None:
        self._lane = lane
        self._incarnation = incarnation
        self._clock = clock
        self._has_nearest = has_nearest

    async def apply(self, batch: Batch) -> Receipt:
        """Commit it. Raises StoreError with nothing written, or with an outcome not known yet.

        Runs and the batch's own changes are a statement each at least: they do not depend on each
        other, and what was refused is named either way.
        """
        refused: dict[str, Outcome] = {}
        posted = Posted(batch.at)
        for appends in group(batch.appends):
            refused.update(await self._land(appends, posted))
        is_refused = bool(batch.changes) and not await self._change(batch.changes, posted)
        return Receipt(refused, is_refused=is_refused, posted=posted.numbers(batch))

    async def _land(self, appends: Sequence[Append], posted: Posted) -> dict[str, Outcome]:
        """Send appends that one statement can say; who was refused, and why."""
        if len(appends) == 1 and not is_plain(appends[0]):
            return await self._in_turn(appends[0], posted)
        try:
            landed = await self._send(lambda now: state(appends, (), now), posted)
        except Exception as error:
            if not is_data_trouble(error):
                raise self._told(error) from error
            if len(appends) == 1:
                return await self._in_turn(appends[0], posted)
            half = len(appends) // 2
            first = await self._land(appends[:half], posted)
            return {**first, **await self._land(appends[half:], posted)}
        if landed is not None and len(landed) == len(appends):
            return {}
        there = {str(run_id) for run_id in landed or ()}
        missing = [append for append in appends if append.run_id not in there]
        refused = await self._judge(missing, Outcome.DAMAGED, is_done=landed is None)
        for append in missing:
            if append.run_id not in refused:
                posted.miss(append.changes)
        return refused

    async def _change(self, changes: Sequence[Change], posted: Posted) -> bool:
        """Changes that stand alone: all of them, or none (False)."""
        if is_common(changes):
            try:
                if await self._send(lambda now: state((), changes, now), posted) is None:
                    posted.miss(changes)
            except Exception as error:
                if not is_data_trouble(error):
                    raise self._told(error) from error
            else:
                return True
        try:
            await self._turn(None, changes, posted)
        except Exception as error:
            if not isinstance(error, Refusal) and not is_data_trouble(error):
                raise self._told(error) from error
            return False
        return True

    async def _in_turn(self, append: Append, posted: Posted) -> dict[str, Outcome]:
        """One run by itself, its changes one after another: says exactly what is wrong."""
        try:
            landed = await self._turn(append, append.changes, posted)
        except Exception as error:
            if not isinstance(error, Refusal) and not is_data_trouble(error):
                raise self._told(error) from error
            refused = await self._judge([append], _blame(error))
            if not refused:
                posted.miss(append.changes)
            return refused
        return {} if landed else await self._judge([append], Outcome.DAMAGED, is_done=True)

    async def _turn(self, append: Append | None, changes: Sequence[Change], posted: Posted) -> bool:
        """One transaction of several statements. False: it landed, ask what became of the run."""

        async def work(connection: Connection, number: int) -> list[tuple[Post, int]]:
            async with connection.transaction():
                own = load_queries("postgres")["incarnation"]
                self._check_store(await connection.fetchval(own.sql))
                now = posted.at or self._clock.now_us()
                bare = [append._replace(changes=())] if append is not None else []
                statement = state(bare, (), now)
                values = statement.bind(self._lane.name, number, self._incarnation)
                row = await connection.fetchrow(statement.query.sql, *values)
                if len(row[0]) != len(bare):
                    raise Refusal(Outcome.DAMAGED)
                turn = Turn(connection, now, has_nearest=self._has_nearest)
                await turn.apply(changes)
            return turn.posted

        late_s = None if append is None and _is_short(changes) else TURN_S
        found = await self._try(work, late_s=late_s)
        if found is None:
            posted.miss(changes)
            return False
        posted.hear(found)
        return True

    async def _send(self, make: Callable[[int], Statement], posted: Posted) -> list[Any] | None:
        """The runs whose entries went in; None when it landed, and nobody heard which ones."""

        async def work(connection: Connection, number: int) -> tuple[Any, Statement]:
            statement = make(posted.at or self._clock.now_us())
            values = statement.bind(self._lane.name, number, self._incarnation)
            return await connection.fetchrow(statement.query.sql, *values), statement

        found: tuple[Any, Statement] | None = await self._try(work)
        if found is None:
            return None
        row, statement = found
        if statement.posts:
            posted.hear((statement.posts[place], number) for place, number in row[2])
        landed: list[Any] = row[0]
        return landed

    async def _try(self, work: Work, *, is_commit: bool = True, late_s: float | None = None) -> Any:
        """What `work` gives; None when only the lane's barrier knows that it landed."""
        deadline = self._clock.monotonic() + PATIENCE_S
        was_taken = False
        unsure: Unsure | None = None
        while True:
            try:
                if unsure is not None:
                    if await self._lane.settle(unsure):
                        return None
                    unsure = None
                return await self._lane.run(work, is_commit=is_commit, late_s=late_s)
            except Unsure as met:
                unsure, trouble = met if is_commit else None, met.cause
            except StoreError as error:
                if not error.retryable:
                    raise
                trouble = error
            except Exception as error:
                if is_taken(error) and not was_taken:
                    was_taken = True
                    continue
                if not is_passing(error):
                    raise
                trouble = translate(error, self._lane.shown)
            if self._clock.monotonic() >= deadline:
                raise trouble if unsure is None else _unknown(trouble)
            await self._clock.sleep(_PAUSE_S)

    async def _judge(
        self, appends: Sequence[Append], blame: Outcome, *, is_done: bool = False
    ) -> dict[str, Outcome]:
        """Law 2. What is there already is made durable before it is acknowledged.

        `is_done`: the statement was carried out, and nobody heard for which of these runs.
        """
        wanted = [(append.run_id, append.prev_seq + 1) for append in appends]
        ends = {append.run_id: _end(append) for append in appends}
        wanted += [(run_id, seq) for run_id, (seq, _) in ends.items()]
        query, own = load_queries("postgres")["found"], load_queries("postgres")["incarnation"]

        async def look(connection: Connection, _: int) -> tuple[list[Any], str | None]:
            runs, seqs = zip(*wanted, strict=True)
            rows = await connection.fetch(query.sql, *query.bind(run_id=runs, seq=seqs))
            return rows, await connection.fetchval(own.sql)

        try:
            rows, incarnation = await self._try(look, is_commit=False)
        except Exception as error:
            if blame is Outcome.UNFIT and is_data_trouble(error):
                return {append.run_id: blame for append in appends}
            raise self._told(error) from error
        self._check_store(incarnation)
        places = {(str(row[0]), row[1]): row[2] for row in rows}
        refused: dict[str, Outcome] = {}
        for append in appends:
            seq, digest = ends[append.run_id]
            is_taken = (append.run_id, append.prev_seq + 1) in places
            is_there = not seq or places.get((append.run_id, seq)) == digest
            if is_there and (append.entries or (is_done and not is_taken)):
                continue
            if blame is Outcome.UNFIT:
                refused[append.run_id] = blame
            elif is_taken:
                is_new = append.accept is not None
                refused[append.run_id] = Outcome.CONFLICT if is_new else Outcome.FENCED
            else:
                refused[append.run_id] = blame
        if len(refused) < len(appends):
            await self._try(self._lane.barrier)
        return refused

    def _check_store(self, incarnation: str | None) -> None:
        if incarnation != self._incarnation:
            raise StoreReplaced(
                "the store was replaced or restored under this process", hint="llmo serve"
            )

    def _told(self, error: Exception) -> Exception:
        """A driver's error in our words."""
        return translate(error, self._lane.shown)


def _end(append: Append) -> tuple[int, bytes]:
    """The head as it is once the append has landed: one without entries leaves it as it was."""
    if append.entries:
        return append.entries[-1].seq, append.entries[-1].digest
    return append.prev_seq, append.prev_digest


def _unknown(trouble: StoreError) -> StoreError:
    return StoreUnavailable(
        f"{trouble.message}; whether the last commit landed is not known",
        hint="llmo doctor, then look before you send it again",
    )


def _blame(error: Exception) -> Outcome:
    """What an error says of the one run that it met."""
    if isinstance(error, Refusal):
        return error.outcome
    code = getattr(error, "sqlstate", None) or ""
    if code.startswith("23"):
        return Outcome.CONFLICT
    if code.startswith("XX") or code == "22012":  # the check at the end of the statement
        return Outcome.DAMAGED
    return Outcome.UNFIT

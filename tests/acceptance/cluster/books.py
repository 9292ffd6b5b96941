"""What the database, the fake's ledger and the journals say, and whether they agree.

The ledger is the witness of what was really asked: a line is on the disk before the first byte of
an answer leaves. A call is known by its idempotency key, which is `RUN/STEP`.
"""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from llm_orchestrator.cli import target as targets
from llm_orchestrator.clock import RealClock, new_run_id
from llm_orchestrator.config import Config
from llm_orchestrator.drill.postgres_lab import PostgresServer
from llm_orchestrator.engine.audit import verify_store
from llm_orchestrator.engine.replay import Fold, fold
from llm_orchestrator.model import Entry, Kind, RunState
from llm_orchestrator.store.journal import decode
from llm_orchestrator.store.postgres import PostgresStore
from tests.acceptance.cluster.nodes import until
from tests.acceptance.fake_server import FakeServer

T = TypeVar("T")


@dataclass(frozen=True)
class Story:
    """One run, by its checked journal."""

    entries: Sequence[Entry]
    fold: Fold

    @property
    def claims(self) -> list[dict[str, Any]]:
        """What each claim says: node, deaths."""
        return [decode(each.payload) for each in self.entries if each.kind == Kind.CLAIMED]

    @property
    def takeovers(self) -> int:
        """Claims of a run that somebody drove already."""
        count, is_driven = 0, False
        for entry in self.entries:
            if entry.kind == Kind.CLAIMED:
                count += is_driven
                is_driven = True
            elif entry.kind == Kind.STATE:
                is_driven = False
        return count

    @property
    def finished(self) -> list[str]:
        """The steps that finished, as often as the journal says so."""
        return [each.step for each in self.entries if each.kind == Kind.STEP_FINISHED]


@dataclass(frozen=True)
class Moment:
    """How far everything was at a fault: calls by key."""

    called: frozenset[str]
    finished: frozenset[str]

    @property
    def in_flight(self) -> frozenset[str]:
        """Asked of the server, and not recorded as finished."""
        return self.called - self.finished


@dataclass
class Account:
    """What came of everything."""

    stories: dict[str, Story]
    calls: Counter[str]
    repeated: list[str] = field(default_factory=list)
    takeovers: int = 0


class Books:
    """One database, and the ledger from here on."""

    def __init__(self, server: PostgresServer, url: str, fake: FakeServer) -> None:
        self.server = server
        self.url = url
        self.clock = RealClock()
        self._fake = fake
        self._seen = fake.ledger.stat().st_size if fake.ledger.exists() else 0
        self._database = url.rpartition("/")[2].partition("?")[0]

    def psql(self, statement: str) -> str:
        """Ask the database directly."""
        return self.server.psql(statement, database=self._database)

    def count(self, where: str) -> int:
        """How many runs."""
        return int(self.psql(f"SELECT count(*) FROM runs WHERE {where}"))

    def ask(self, work: Callable[[PostgresStore], Awaitable[T]]) -> T:
        """Do something as a client of the store."""

        async def main() -> T:
            store = PostgresStore(self.url, node_id="books", clock=self.clock)
            await store.open_as_client(may_create=True)
            try:
                return await work(store)
            finally:
                await store.close()

        return asyncio.run(main())

    def submit(self, file: Path, inputs: Iterable[Mapping[str, Any]], **options: Any) -> list[str]:
        """Accept one run for each of `inputs`, driven by nobody yet; their ids."""
        target = targets.of_file(str(file), Config())

        async def work(store: PostgresStore) -> list[str]:
            news = [
                target.new_run(new_run_id(store.clock), target.check(values), **options)
                for values in inputs
            ]
            first = await target.accept(store, store.clock, news[0])
            definition = target.definition
            assert definition is not None
            known = targets.of_definition(definition, is_registered=True)
            rest = await asyncio.gather(
                *(known.accept(store, store.clock, new) for new in news[1:])
            )
            return [first, *rest]

        return self.ask(work)

    # -- the ledger ----------------------------------------------------------------------------

    def lines(self) -> list[dict[str, Any]]:
        """Both events of each call, after every request that was sent has been read."""
        urllib.request.urlopen(f"{self._fake.url}/health", timeout=30).close()
        with self._fake.ledger.open("rb") as file:
            file.seek(self._seen)
            return [json.loads(line) for line in file.read().splitlines() if line.endswith(b"}")]

    def arrived(self) -> list[dict[str, Any]]:
        """Calls, in the order in which they came."""
        return [line for line in self.lines() if line["event"] == "arrived"]

    def at_once(self) -> int:
        """The most calls that were under way at a time."""
        lines = self.lines()
        most = now = 0
        for line in sorted(lines, key=lambda line: (line["at"], line["event"] == "arrived")):
            now += 1 if line["event"] == "arrived" else -1
            most = max(most, now)
        return most

    # -- judging -------------------------------------------------------------------------------

    def moment(self) -> Moment:
        """What is in flight now. At a fault: after a node's, before the database's own."""
        rows = self.psql(f"SELECT run_id || '/' || step FROM journal WHERE kind = '{_FINISHED}'")
        called = frozenset(line["idempotency_key"] for line in self.arrived())
        return Moment(called, frozenset(rows.splitlines()))

    def wait_ended(self, count: int) -> None:
        """Until so many runs have come to rest, whoever drives them."""
        until(lambda: self.count(_RESTS) >= count, f"{count} runs that end")

    def stories(self) -> dict[str, Story]:
        """Every run. Fails for a journal that is not whole, and for a gap in `commits`."""

        async def work(store: PostgresStore) -> dict[str, Story]:
            assert await verify_store(store) == []
            journals = await store.look.load(await store.look.run_ids())
            return {
                run_id: Story(journal.entries, fold(run_id, journal.entries))
                for run_id, journal in journals.items()
            }

        return self.ask(work)

    def settle(
        self, run_ids: Sequence[str], *moments: Moment, steps: int = 2, is_seen: bool = True
    ) -> Account:
        """The account of runs that have all ended: each completed, each of `steps` done once.

        `is_seen` False: nobody looked at the moments of the faults; a call that was repeated still
        has a takeover that explains it.
        """
        stories = self.stories()
        mine = {run_id: stories[run_id] for run_id in run_ids}
        calls = Counter(
            line["idempotency_key"]
            for line in self.arrived()
            if line["idempotency_key"].partition("/")[0] in mine
        )
        states = Counter(story.fold.state for story in mine.values())
        assert states == {RunState.COMPLETED: len(run_ids)}
        for run_id, story in mine.items():
            self._check(run_id, story, calls, steps=steps)
        repeated = [key for key, count in calls.items() for _ in range(count - 1)]
        if is_seen:
            in_flight = [key for moment in moments for key in moment.in_flight]
            assert set(repeated) <= set(in_flight)
            assert len(repeated) <= len(in_flight)
        assert all(calls[key] == 1 for each in moments for key in each.finished if key in calls)
        takeovers = sum(story.takeovers for story in mine.values())
        return Account(mine, calls, repeated, takeovers)

    def _check(self, run_id: str, story: Story, calls: Counter[str], *, steps: int) -> None:
        epochs = [entry.epoch for entry in story.entries]
        assert epochs == sorted(epochs), f"{run_id}: an entry of an older epoch landed"
        assert [entry.seq for entry in story.entries] == list(range(1, len(epochs) + 1))
        assert len(story.finished) == len(set(story.finished)) == steps
        keys = {f"{run_id}/{step}" for step in story.finished}
        assert {key for key in calls if key.startswith(run_id)} == keys
        again = sum(calls[key] - 1 for key in keys)
        assert again <= story.fold.repeats, f"{run_id}: a call was repeated and not counted"
        assert not again or story.takeovers, f"{run_id}: a call was repeated without a takeover"


_FINISHED = Kind.STEP_FINISHED.value
_RESTS = "state IN ('completed', 'failed', 'cancelled', 'paused')"

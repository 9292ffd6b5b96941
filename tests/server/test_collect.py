"""Scraping must not hurt: what is asked of the store, how often, and what is said without it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

from llm_orchestrator.errors import StoreError, StoreUnavailable
from llm_orchestrator.model import MICROSECONDS
from llm_orchestrator.server.collect import NODES_MAX, PATIENCE_S, SHARE, Collector, Paced
from llm_orchestrator.server.probe import Finding
from llm_orchestrator.store.base import Member
from llm_orchestrator.store.statistics import Queue, RunCount, Standby, Statistics
from llm_orchestrator.telemetry.metrics import OTHER, WORKFLOWS_MAX, Metrics
from tests.unit.engine.support import VirtualClock, virtually

Values = dict[tuple[str, tuple[str, ...]], float]


async def _nothing() -> None:
    """An answer at once."""


class Desk:
    """A store whose answers are the test's, and the ledger of what was asked."""

    generation = 7

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.asked: Counter[str] = Counter()
        self.before: Callable[[], Awaitable[None]] = _nothing
        """What happens before an answer comes."""
        self.trouble: StoreError | None = None
        """What the statistics find."""
        self.found = Finding(2.0, 3.0)
        self.runs: list[RunCount] = []
        self.figures = Statistics()
        self.members: list[Member] = []
        self.records: dict[str, Any] = {}
        self.backups: dict[str, Any] = {}
        self.metrics = Metrics()
        self.counts = SimpleNamespace(census=self._census, statistics=self._statistics)
        self.shelf = SimpleNamespace(nodes=self._nodes, records=self._records)
        store: Any = self
        probe: Any = SimpleNamespace(ask=self._ask)
        self.collector = Collector(
            store, self.clock, metrics=self.metrics, probe=probe, is_stopping=bool
        )

    async def _answer(self, name: str, answer: Any) -> Any:
        self.asked[name] += 1
        await self.before()
        return answer

    async def _ask(self) -> Finding:
        found: Finding = await self._answer("probe", self.found)
        return found

    async def _census(self) -> Any:
        return await self._answer("census", self.runs)

    async def _statistics(self, now_us: int, *, stalled_before: int) -> Any:
        assert now_us - stalled_before == 300 * MICROSECONDS
        if self.trouble is not None:
            raise self.trouble
        return await self._answer("statistics", self.figures)

    async def _nodes(self, limit: int) -> Any:
        return await self._answer("nodes", self.members[:limit])

    async def _records(self, kind: str) -> Any:
        known = {"breaker": self.records, "backup": self.backups}
        return await self._answer(f"records {kind}", known.get(kind, {}))

    async def values(self) -> Values:
        """Every sample. One that is there twice fails the test."""
        samples = await self.collector.samples()
        found = {(sample.word, sample.labels): sample.value for sample in samples}
        assert len(found) == len(samples)
        return found


def gauge(values: Values, word: str) -> dict[tuple[str, ...], float]:
    return {labels: value for (name, labels), value in values.items() if name == word}


# -- how often -------------------------------------------------------------------------------------


def test_a_hundred_scrapes_at_once_ask_the_store_once() -> None:
    async def main() -> Counter[str]:
        desk = Desk()
        await asyncio.gather(*(desk.values() for _ in range(100)))
        return desk.asked

    asked = virtually(main())
    assert {name: count for name, count in asked.items() if name != "probe"} == {
        "statistics": 1,
        "census": 1,
        "nodes": 1,
        "records maintenance": 1,
        "records breaker": 1,
        "records backup": 1,
    }


def test_answers_are_good_for_a_second() -> None:
    async def main() -> list[int]:
        desk = Desk()
        counts = []
        for _ in range(5):
            await desk.values()
            counts.append(desk.asked["statistics"])
            await desk.clock.sleep(0.5)
        return counts

    assert virtually(main()) == [1, 1, 2, 2, 3]


def test_a_question_that_took_long_is_put_seldom() -> None:
    async def main() -> tuple[int, int]:
        clock, asked = VirtualClock(), 0

        async def ask() -> int:
            nonlocal asked
            asked += 1
            await clock.sleep(1.5)
            return asked

        paced = Paced(ask, clock, limit_s=PATIENCE_S, share=SHARE)
        while clock.monotonic() < 1.5 * SHARE + 1:
            await paced.get(PATIENCE_S)
            await clock.sleep(0.1)
        early = asked
        while clock.monotonic() < 3 * SHARE + 2:
            await paced.get(PATIENCE_S)
            await clock.sleep(0.1)
        return early, asked

    assert virtually(main()) == (1, 2)


def test_a_census_that_takes_long_keeps_no_scrape_waiting_but_the_first() -> None:
    async def main() -> tuple[list[float], Values]:
        desk = Desk()
        desk.runs = [RunCount("pending", "a", 3)]

        async def count() -> list[RunCount]:
            desk.asked["census"] += 1
            await desk.clock.sleep(10.0)
            return desk.runs

        desk.collector._census._ask = count
        took = []
        for _ in range(3):
            began = desk.clock.monotonic()
            values = await desk.values()
            took.append(desk.clock.monotonic() - began)
            await desk.clock.sleep(600.0)  # long enough for the next one to be due
        return took, values

    took, values = virtually(main())
    assert took == [PATIENCE_S, 0.0, 0.0]
    assert gauge(values, "runs") == {("pending", "a"): 3}


# -- without a store -------------------------------------------------------------------------------


def test_a_store_that_hangs_is_told_within_the_patience_and_without_its_gauges() -> None:
    async def main() -> tuple[float, Values]:
        desk = Desk()
        desk.runs = [RunCount("pending", "a", 3)]
        await desk.values()

        async def hang() -> None:
            await asyncio.get_running_loop().create_future()

        desk.before = hang
        began = desk.clock.monotonic()
        values = await desk.values()
        return desk.clock.monotonic() - began, values

    took_s, values = virtually(main())
    assert took_s == PATIENCE_S
    assert values["store_reachable", ()] == 0
    assert values["store_writable", ()] == 0
    assert values["epoch", ()] == 7
    for word in ("runs", "queue_depth", "nodes", "maintenance", "store_latency_seconds"):
        assert gauge(values, word) == {}
    assert values["build_info", ("",)] == 1


def test_a_store_that_only_reads_is_reachable_and_not_writable() -> None:
    async def main() -> Values:
        desk = Desk()
        desk.found = Finding(2.0, None, "the disk is full")
        return await desk.values()

    values = virtually(main())
    assert (values["store_reachable", ()], values["store_writable", ()]) == (1, 0)
    assert values["store_latency_seconds", ()] == 0.002
    assert values["queue_depth", ("default",)] == 0


def test_gauges_that_cannot_be_read_are_left_out_and_come_back() -> None:
    async def main() -> list[tuple[float, bool]]:
        desk = Desk()
        found = []
        for trouble in (None, StoreUnavailable("away"), StoreError("damaged"), None):
            desk.trouble = trouble
            values = await desk.values()
            found.append((values["store_reachable", ()], ("maintenance", ()) in values))
            await desk.clock.sleep(2)
        return found

    assert virtually(main()) == [(1, True), (1, False), (1, False), (1, True)]


# -- what is said ----------------------------------------------------------------------------------


def test_queues_are_counted_and_an_empty_one_stays_at_zero() -> None:
    async def main() -> list[Values]:
        desk = Desk()
        now = desk.clock.now_us()
        queues = [Queue("a", 5, now - 90 * MICROSECONDS), Queue("b", 1, now - MICROSECONDS)]
        desk.figures = Statistics(queues, stalled=2)
        found = [await desk.values()]
        await desk.clock.sleep(2)
        desk.figures = Statistics()
        return [*found, await desk.values()]

    full, empty = virtually(main())
    assert gauge(full, "queue_depth") == {("default",): 0, ("a",): 5, ("b",): 1}
    assert full["queue_oldest_age_seconds", ("a",)] == 90
    assert full["runs_accepted_minus_advanced", ()] == 8
    assert gauge(empty, "queue_depth") == {("default",): 0, ("a",): 0, ("b",): 0}
    assert empty["queue_oldest_age_seconds", ("a",)] == 0


def test_workflows_beyond_the_bound_are_summed() -> None:
    async def main() -> Values:
        desk = Desk()
        desk.runs = [RunCount("completed", f"flow-{n}", 10) for n in range(WORKFLOWS_MAX + 50)]
        return await desk.values()

    runs = gauge(virtually(main()), "runs")
    assert len(runs) == WORKFLOWS_MAX + 1
    assert runs["completed", OTHER] == 500


def test_living_nodes_have_names_and_ages_and_the_dead_are_only_counted() -> None:
    async def main() -> Values:
        desk = Desk()
        now = desk.clock.now_us()
        sign = now - 3 * MICROSECONDS
        beats = Member("one", "west", "alive", 4, True, 0, sign, {"version": "1.2"})
        silent = Member("file", "west", "alive", 0, True, 0, sign, None)
        dead = [beats._replace(node_id=f"dead-{n}", state="dead") for n in range(3)]
        many = [silent._replace(node_id=f"n-{n}") for n in range(NODES_MAX)]
        desk.members = [beats, silent, *dead, *many]
        return await desk.values()

    values = virtually(main())
    assert gauge(values, "nodes") == {
        ("alive",): NODES_MAX + 2,
        ("leaving",): 0,
        ("left",): 0,
        ("dead",): 3,
    }
    assert gauge(values, "node_lease_age_seconds") == {("one",): 3}
    assert values["node_info", ("one", "1.2", "west")] == 1
    assert len(gauge(values, "node_info")) == NODES_MAX


def test_a_breaker_is_told_by_provider_and_its_worst_model() -> None:
    async def main() -> Values:
        desk = Desk()
        desk.records = {
            "openai/a": {"state": "closed"},
            "openai/b": {"state": "half_open"},
            "house/c": {"state": "open", "until": 1e12},
        }
        return await desk.values()

    assert gauge(virtually(main()), "breaker_state") == {("openai",): 1, ("house",): 2}


def test_backups_are_told_from_the_stores_records() -> None:
    async def main() -> list[Values]:
        desk = Desk()
        found = [await desk.values()]
        now = desk.clock.now_us()
        desk.backups = {
            "last": {"taken_at": now, "size_bytes": 7_000, "took_s": 1.5, "at": now + 9},
            "proved": {"at": now - MICROSECONDS},
            "disproved": {"at": now},
            "tally": {"ok": 3, "partial": 1, "failed": 2, "failed_at": now - 2 * MICROSECONDS},
        }
        await desk.clock.sleep(60)
        return [*found, await desk.values()]

    none, some = virtually(main())
    for word in ("success", "proved", "failure"):
        assert gauge(none, f"backup_last_{word}_timestamp_seconds") == {(): 0}
    assert set(gauge(none, "backup_runs_total").values()) == {0}
    assert gauge(none, "recovery_point_exposure_seconds") == {}
    assert gauge(none, "backup_proof_failed") == {(): 0}
    assert gauge(some, "recovery_point_exposure_seconds") == {("backup",): 60}
    assert gauge(some, "backup_proof_failed") == {(): 1}
    assert gauge(some, "backup_runs_total") == {("ok",): 3, ("partial",): 1, ("failed",): 2}
    assert (gauge(some, "backup_size_bytes"), gauge(some, "backup_duration_seconds")) == (
        {(): 7_000},
        {(): 1.5},
    )
    made, proved, failed = (
        gauge(some, f"backup_last_{word}_timestamp_seconds")[()]
        for word in ("success", "proved", "failure")
    )
    assert (made - proved, made - failed) == (1, 2)


def test_what_would_be_lost_is_what_the_best_copy_lacks() -> None:
    async def main() -> list[Values]:
        desk = Desk()
        found = []
        near = Standby("near", False, lag_s=2.0, lag_bytes=20, exposed_s=1.0)
        far = Standby("far", False, lag_s=60.0, lag_bytes=600, exposed_s=50.0)
        for standbys in ([], [near, far], [near, far._replace(is_sync=True)], None):
            desk.figures = Statistics(standbys=standbys)
            found.append(await desk.values())
            await desk.clock.sleep(2)
        return found

    none, plain, waited_for, unseen = virtually(main())
    exposed = "recovery_point_exposure_seconds"
    assert gauge(none, exposed) == {}
    assert gauge(none, "replication_standbys") == {("true",): 0, ("false",): 0}
    assert gauge(plain, exposed) == {("replica",): 1.0}
    assert gauge(plain, "replication_lag_seconds") == {("near",): 2, ("far",): 60}
    assert gauge(plain, "replication_lag_bytes") == {("near",): 20, ("far",): 600}
    assert gauge(waited_for, exposed) == {("replica",): 0}
    assert gauge(waited_for, "replication_standbys") == {("true",): 1, ("false",): 1}
    assert gauge(unseen, "replication_standbys") == {}

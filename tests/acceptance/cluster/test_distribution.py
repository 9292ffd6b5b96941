"""Who gets what: fair share, queues that hold over all nodes, delays, schedules. Real nodes."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from llm_orchestrator.cli import target as targets
from llm_orchestrator.config import Config
from llm_orchestrator.engine.control import Operator
from llm_orchestrator.engine.schedule import KIND, times_after
from llm_orchestrator.model import MICROSECONDS, Kind
from llm_orchestrator.store.base import Batch, PutRecord
from llm_orchestrator.store.postgres import PostgresStore
from tests.acceptance.cluster.books import Books, Story
from tests.acceptance.cluster.flows import write_call
from tests.acceptance.cluster.nodes import Cluster, until

pytestmark = [pytest.mark.serial, pytest.mark.timeout(300)]
NARROW, RATE, PERIOD_S, TOKENS = 3, 5, 2.5, 50
CLOCKS_S = 0.5
"""Nodes learn the store's clock when they open; so much they may be off on a busy machine."""
QUEUES = f"""\
[queues]
narrow = {NARROW}
[queues.slow]
rate = {RATE}
period_s = {PERIOD_S}
[queues.costly]
concurrency = 1
tokens_per_minute = {TOKENS}
"""


def drivers(stories: dict[str, Story]) -> Counter[str]:
    """How many runs each node claimed first."""
    return Counter(str(story.claims[0]["node"]) for story in stories.values())


def test_runs_that_a_client_accepts_are_spread_over_idle_nodes(
    cluster: Cluster, books: Books
) -> None:
    nodes = cluster.ready("a", "b", "c")
    file = write_call(cluster.folder)
    run_ids = books.submit(file, [{"number": n, "delay": 500} for n in range(300)])
    books.wait_ended(300)
    account = books.settle(run_ids, steps=1)
    shares = drivers(account.stories)
    print(f"300 runs over 3 nodes: {sorted(shares.values())}")
    # How evenly is also up to whom the machine lets run; that each takes part is up to us.
    assert all(shares[node.node_id] >= 6 for node in nodes), shares
    assert account.repeated == []


def test_a_queues_concurrency_holds_over_all_nodes(cluster: Cluster, books: Books) -> None:
    cluster.configure(QUEUES)
    cluster.ready("a", "b", "c", words=("--max-runs", str(NARROW - 1)))
    file = write_call(cluster.folder, "narrow", "narrow")
    run_ids = books.submit(file, [{"number": n, "delay": 200} for n in range(24)])
    books.wait_ended(24)
    account = books.settle(run_ids, steps=1)
    at_once = books.at_once()
    print(f"at most {at_once} at once, by {len(drivers(account.stories))} nodes")
    assert at_once == NARROW
    assert len(drivers(account.stories)) > 1


def test_a_queues_rate_holds_over_all_nodes(cluster: Cluster, books: Books) -> None:
    cluster.configure(QUEUES)
    cluster.ready("a", "b")
    file = write_call(cluster.folder, "slow", "slow")
    begun_s = books.clock.now_us() / MICROSECONDS
    run_ids = books.submit(file, [{"number": n, "delay": 10} for n in range(15)])
    books.wait_ended(15)
    account = books.settle(run_ids, steps=1)
    claims = sorted(
        entry.recorded_at / MICROSECONDS
        for story in account.stories.values()
        for entry in story.entries
        if entry.kind == Kind.CLAIMED
    )
    late_s = [moment - begun_s for moment in claims]  # the first start may be late itself
    print(f"15 starts, {RATE} each {PERIOD_S:g} s: after {', '.join(f'{s:.1f}' for s in late_s)} s")
    for number, after_s in enumerate(late_s[RATE:], 1):  # the bucket was full
        assert after_s > (number / RATE) * PERIOD_S - CLOCKS_S


def test_a_queues_tokens_hold_over_all_nodes(cluster: Cluster, books: Books) -> None:
    cluster.configure(QUEUES)
    cluster.ready("a", "b")
    file = write_call(cluster.folder, "costly", "costly")
    begun = books.clock.now_us()
    run_ids = books.submit(file, [{"number": n, "delay": 10} for n in range(20)])
    until(lambda: tokens_left(books, "costly") <= 0, "a queue whose tokens are spent")
    stories = {run_id: story.fold for run_id, story in books.stories().items()}
    usage = [fold.usage.input_tokens + fold.usage.output_tokens for fold in stories.values()]
    each, passed_s = max(usage), (books.clock.now_us() - begun) / MICROSECONDS
    print(f"{sum(usage)} tokens of {TOKENS} a minute after {passed_s:.1f} s, {each} a run")
    unknown = 2 * each  # what each node has used and not told yet
    assert TOKENS <= sum(usage) <= TOKENS * (1 + passed_s / 60) + unknown
    ids = cluster.ok("runs", "list", "--state", "pending", "-o", "ids")
    assert len(ids.split()) > 5
    cancelled = cluster.ok("runs", "cancel", "-", "-o", "ids", stdin=ids)
    assert set(cancelled.split()) == set(ids.split()) < set(run_ids)


def tokens_left(books: Books, queue: str) -> float:
    """What the nodes have agreed on; a queue that was never used has all of them."""

    async def work(store: PostgresStore) -> float:
        value, _ = await store.shelf.record("queue", queue)
        return float(value[1]) if value else 1.0

    return books.ask(work)


def test_a_run_that_was_delayed_starts_once_and_not_early(cluster: Cluster, books: Books) -> None:
    cluster.ready("a", "b", "c")
    file = write_call(cluster.folder)
    wake_at = books.clock.now_us() + 2 * MICROSECONDS
    run_ids = books.submit(file, [{"number": n} for n in range(30)], wake_at=wake_at)
    books.wait_ended(30)
    account = books.settle(run_ids, steps=1)
    early = min(line["at"] for line in books.arrived())
    print(f"30 delayed runs began {(early - wake_at) / 1000:.0f} ms after their time")
    assert early > wake_at - CLOCKS_S * MICROSECONDS
    assert [len(story.claims) for story in account.stories.values()] == [1] * 30


def test_each_planned_time_has_one_run_with_three_nodes(cluster: Cluster, books: Books) -> None:
    """Six schedules, each with twenty missed times: three nodes fire them in competition."""
    cluster.ready("a", "b", "c")
    names = [f"cron{number}" for number in range(6)]
    planned = books.ask(lambda store: miss_twenty(store, cluster.folder, names))
    books.wait_ended(sum(planned.values()))
    stories = books.stories()
    origins = Counter(
        (story.fold.accepted["origin"]["schedule"], story.fold.accepted["origin"]["planned_at"])
        for story in stories.values()
    )
    print(f"{len(origins)} planned times, by {len(drivers(stories))} nodes")
    assert set(origins.values()) == {1}
    by_name = Counter(name for name, _ in origins)
    assert all(planned[name] <= by_name[name] <= planned[name] + 1 for name in names)
    moments = sorted(moment for name, moment in origins if name == names[0])
    assert {late - early for early, late in pairwise(moments)} == {60 * MICROSECONDS}
    books.settle(list(stories), steps=1)


async def miss_twenty(store: PostgresStore, folder: Path, names: list[str]) -> dict[str, int]:
    """Register schedules whose next time was twenty minutes ago; how many each has missed."""
    now = store.clock.now_us()
    first = next(times_after("* * * * *", "UTC", now - 20 * 60 * MICROSECONDS))
    missed = 1 + (now - first) // (60 * MICROSECONDS)
    for name in names:
        more = 'schedule: {cron: "* * * * *", backfill: all}\n'
        target = targets.of_file(str(write_call(folder, name, more=more)), Config())
        await Operator(store, store.clock).register(target.workflow)
        value, version = await store.shelf.record(KIND, name)
        changed = PutRecord(KIND, name, {**value, "next_at": first}, version)
        await store.commit(Batch(changes=(changed,)))
    return dict.fromkeys(names, missed)

"""Nodes and the database die under load; every accepted run completes, hardly a call is repeated.

Each test prints what it saw; the times are for people, nothing is judged by them.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.acceptance.cluster.books import Account, Books, Moment
from tests.acceptance.cluster.flows import write_talk
from tests.acceptance.cluster.nodes import Cluster, NodeProcess, until

pytestmark = [pytest.mark.serial, pytest.mark.timeout(300)]


def owned(books: Books, name: str, count: int) -> None:
    """Wait until a node drives so many runs and has asked for each."""
    until(lambda: books.count(f"owner LIKE '{name}-%'") >= count, f"{count} runs on {name}")
    until(lambda: len(books.arrived()) >= count, f"{count} calls")


def tell(what: str, begun: float, account: Account, *moments: Moment) -> None:
    in_flight = sum(len(moment.in_flight) for moment in moments)
    print(
        f"{what}: {len(account.stories)} runs, {in_flight} calls in flight, "
        f"{account.takeovers} takeovers, {len(account.repeated)} calls issued twice, "
        f"all complete {time.monotonic() - begun:.1f} s after it"
    )


def loaded(cluster: Cluster, books: Books, *, first: int, rest: int, delay: int) -> list[str]:
    """Node a drives `first` runs and is full; b and c drive the `rest`."""
    file = write_talk(cluster.folder)
    cluster.node("a", "--max-runs", str(first))
    run_ids = books.submit(file, [{"number": n, "delay": delay} for n in range(first)])
    owned(books, "a", first)
    cluster.ready("b", "c")
    more = [{"number": n, "delay": delay} for n in range(first, first + rest)]
    run_ids += books.submit(file, more)
    until(lambda: books.count("state = 'pending'") == 0, "runs that are claimed")
    return run_ids


def test_kill_9_of_a_node_with_500_runs_in_flight(cluster: Cluster, books: Books) -> None:
    run_ids = loaded(cluster, books, first=500, rest=100, delay=4_000)
    node = cluster.nodes[0]
    name = node.node_id
    node.kill()
    begun = time.monotonic()
    moment = books.moment()
    until(lambda: books.count(f"owner = '{name}'") == 0, "runs that are taken over")
    advanced_s = time.monotonic() - begun
    books.wait_ended(600)
    account = books.settle(run_ids, moment)
    tell(f"kill -9 of a node, all taken over within {advanced_s:.2f} s", begun, account, moment)
    assert account.takeovers >= 500
    assert all(len(story.claims) <= 2 for story in account.stories.values())

"""Nodes and the database die under load; every accepted run completes, hardly a call is repeated.

Each test prints what it saw; the times are for people, nothing is judged by them.
"""

from __future__ import annotations

import time

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
    run_ids = loaded(cluster, books, first=500, rest=100, delay=9_000)
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


def test_a_node_frozen_for_longer_than_its_lease_comes_back_as_another(
    cluster: Cluster, books: Books
) -> None:
    file = write_talk(cluster.folder)
    frozen = cluster.node("a", "--max-runs", "60")
    run_ids = books.submit(file, [{"number": n, "delay": 2_500} for n in range(60)])
    owned(books, "a", 60)
    other = cluster.node("b", "--max-runs", "60")
    was, other_id = frozen.node_id, other.node_id
    frozen.freeze()
    begun = time.monotonic()
    moment = books.moment()
    until(lambda: books.count(f"owner = '{other_id}'") == 60, "runs that are taken over")
    frozen.thaw()  # the answers that it was waiting for lie in its sockets
    again = f"{was}.2"
    is_back = f"SELECT count(*) FROM nodes WHERE node_id = '{again}' AND state = 'alive'"
    until(lambda: books.psql(is_back) == "1", "a node that comes back as another")
    fresh = books.submit(file, [{"number": n, "delay": 100} for n in range(60, 100)])
    books.wait_ended(100)
    account = books.settle(run_ids + fresh, moment)
    tell("SIGSTOP of a node beyond its lease", begun, account, moment)
    assert "was taken for dead" in frozen.said
    drivers = {run_id: story.claims[-1]["node"] for run_id, story in account.stories.items()}
    assert {drivers[run_id] for run_id in run_ids} == {other_id}
    assert again in {drivers[run_id] for run_id in fresh}
    assert was not in {drivers[run_id] for run_id in fresh}
    assert account.repeated
    last = {line["idempotency_key"]: line["id"] for line in books.arrived()}
    for key in account.repeated:
        run_id, _, step = key.partition("/")
        result = account.stories[run_id].fold.finished[step].result
        answer = result["metadata"]["response_id"]
        assert answer == f"chatcmpl-{last[key]}", "a late result of the frozen node landed"


def test_kill_9_of_the_database_under_load(cluster: Cluster, books: Books) -> None:
    file = write_talk(cluster.folder)
    nodes = cluster.ready("a", "b")
    run_ids = books.submit(file, [{"number": n, "delay": 2_000} for n in range(120)])
    until(lambda: len(books.arrived()) >= 100, "calls")
    moment = books.moment()
    books.server.kill()
    until(lambda: answered(books) >= 100, "answers that no database takes")
    begun = time.monotonic()
    books.server.start()
    books.wait_ended(120)
    account = books.settle(run_ids, moment)
    tell("kill -9 of the database", begun, account, moment)
    assert not any(node.is_dead for node in nodes)


def test_kill_9_of_the_database_and_of_a_node_at_once(cluster: Cluster, books: Books) -> None:
    file = write_talk(cluster.folder)
    nodes = cluster.ready("a", "b")
    run_ids = books.submit(file, [{"number": n, "delay": 2_000} for n in range(120)])
    until(lambda: len(books.arrived()) >= 100, "calls")
    node = busiest(books, nodes)
    moment = books.moment()
    books.server.kill()
    node.kill()
    books.server.start()
    node.start()  # in the same folder: what its spool holds may be offered
    begun = time.monotonic()
    books.wait_ended(120)
    account = books.settle(run_ids, moment)
    tell("kill -9 of the database and of a node", begun, account, moment)
    assert account.takeovers


def test_sigterm_of_a_node_under_load_hands_its_runs_over(cluster: Cluster, books: Books) -> None:
    file = write_talk(cluster.folder)
    nodes = cluster.ready("a", "b")
    run_ids = books.submit(file, [{"number": n, "delay": 1_500} for n in range(120)])
    until(lambda: len(books.arrived()) >= 100, "calls")
    leaving = busiest(books, nodes)
    name = leaving.node_id
    mine = books.count(f"owner = '{name}'")
    begun = time.monotonic()
    moment = books.moment()
    assert leaving.terminate() == 0
    state = f"SELECT state FROM nodes WHERE node_id = '{name}'"
    assert (books.psql(state), books.count(f"owner = '{name}'")) == ("left", 0)
    left_s = time.monotonic() - begun
    books.wait_ended(120)
    account = books.settle(run_ids, moment)
    tell(f"SIGTERM of a node with {mine} runs, gone after {left_s:.1f} s", begun, account, moment)
    assert mine >= 60
    assert (account.takeovers, account.repeated) == (0, [])
    assert all("deaths" not in c for s in account.stories.values() for c in s.claims)


def busiest(books: Books, nodes: list[NodeProcess]) -> NodeProcess:
    """The node that drives the most runs."""
    return max(nodes, key=lambda node: books.count(f"owner = '{node.node_id}'"))


def answered(books: Books) -> int:
    return sum(line["event"] == "ended" for line in books.lines())

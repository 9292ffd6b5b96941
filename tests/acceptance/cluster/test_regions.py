"""Regions a and b on one database: who works, who takes over, and that nothing is lost by it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.acceptance.cluster.books import Books
from tests.acceptance.cluster.flows import write_talk
from tests.acceptance.cluster.nodes import Cluster, NodeProcess, until

pytestmark = [pytest.mark.serial, pytest.mark.timeout(300)]


def site(cluster: Cluster, *names: str) -> list[NodeProcess]:
    """Nodes whose region is the first letter of their name, at home in a, all ready."""
    nodes = [cluster.node(name, "--region", name[0]) for name in names]
    for node in nodes:
        assert node.node_id
    cluster.ok("region", "policy", "active-passive", "--home", "a")
    others = [node for node in nodes if node.node_id[0] != "a"]
    until(lambda: all("is standby" in node.said for node in others), "nodes that stand by")
    return nodes


def work(cluster: Cluster, books: Books, count: int, *, delay: int) -> list[str]:
    """So many runs that nobody drives yet."""
    return books.submit(
        write_talk(cluster.folder), [{"number": number, "delay": delay} for number in range(count)]
    )


def driven(books: Books, region: str) -> int:
    """How many runs its nodes drive."""
    return books.count(f"owner LIKE '{region}%' AND state = 'running'")


def drivers(books: Books, run_ids: list[str]) -> set[str]:
    """The regions of every node that ever claimed one of these runs."""
    stories = books.stories()
    return {claim["node"][0] for run_id in run_ids for claim in stories[run_id].claims}


def status(cluster: Cluster) -> dict[str, Any]:
    """What `llmo region status` says, its regions by name."""
    told: dict[str, Any] = json.loads(cluster.ok("region", "status", "-o", "json"))
    return {**told, "regions": {each["region"]: each for each in told["regions"]}}


def test_a_standby_region_claims_nothing_while_the_active_one_lives(
    cluster: Cluster, books: Books
) -> None:
    nodes = site(cluster, "a1", "b1")
    run_ids = work(cluster, books, 40, delay=300)
    books.wait_ended(40)
    books.settle(run_ids)
    assert drivers(books, run_ids) == {"a"}
    assert "region b is standby" in nodes[1].said
    told = status(cluster)["regions"]
    assert (told["a"]["role"], told["a"]["nodes"]) == ("active", 1)
    assert (told["b"]["role"], told["b"]["nodes"]) == ("standby", 1)


def test_kill_9_of_a_whole_region_is_answered_without_a_human(
    cluster: Cluster, books: Books
) -> None:
    nodes = site(cluster, "a1", "a2", "b1", "b2")
    run_ids = work(cluster, books, 40, delay=4_000)
    until(lambda: driven(books, "a") == 40, "runs in region a")
    until(lambda: len(books.arrived()) == 40, "calls")
    for node in nodes[:2]:
        node.kill()
    moment = books.moment()
    books.wait_ended(40)
    account = books.settle(run_ids, moment)
    assert account.takeovers == 40
    told = status(cluster)
    assert told["regions"]["a"]["role"] == "standby"
    assert told["regions"]["b"]["role"] == "active"
    assert told["counter"] == 2, "two nodes of region b raced, and one of them won"
    assert "no node lives in a" in told["why"]
    said = [line for line in cluster.ok("audit", "list", "-o", "jsonl").splitlines() if line]
    takeovers = [each for each in map(json.loads, said) if each["action"] == "region.takeover"]
    assert [each["target"] for each in takeovers] == ["b"]
    nodes[0].start()  # who comes back stands by
    assert nodes[0].node_id
    more = work(cluster, books, 10, delay=100)
    books.wait_ended(50)
    assert drivers(books, more) == {"b"}


def test_failover_and_failback_under_load_lose_and_repeat_nothing(
    cluster: Cluster, books: Books
) -> None:
    site(cluster, "a1", "b1")
    run_ids = work(cluster, books, 40, delay=6_000)
    until(lambda: len(books.arrived()) >= 40, "calls in region a")
    plan = json.loads(cluster.ok("region", "plan", "--to", "b", "-o", "json"))
    assert plan["is_ok"]
    assert status(cluster)["counter"] == 1, "a plan changes nothing"
    there = json.loads(cluster.ok("region", "failover", "--to", "b", "--yes"))
    assert there["roles"] == {"a": "standby", "b": "active"}
    assert (there["runs_left"], there["nodes_that_have_not_heard"]) == (0, [])
    assert there["write_gap_s"] > 0
    assert driven(books, "a") == 0
    more = work(cluster, books, 40, delay=1_500)
    until(lambda: driven(books, "b") >= 20, "runs in region b")
    back = json.loads(cluster.ok("region", "failback", "--yes"))
    assert back["roles"] == {"a": "active", "b": "standby"}
    assert (back["runs_left"], back["nodes_that_have_not_heard"]) == (0, [])
    books.wait_ended(80)
    account = books.settle([*run_ids, *more])
    assert not account.repeated, "an orderly move repeats no call"
    assert drivers(books, run_ids) == {"a", "b"}


def test_a_fenced_region_neither_works_nor_takes_over(cluster: Cluster, books: Books) -> None:
    nodes = site(cluster, "a1", "b1", "c1")
    cluster.ok("region", "fence", "b", "--reason", "its network is not sound")
    run_ids = work(cluster, books, 20, delay=4_000)
    until(lambda: driven(books, "a") == 20, "runs in region a")
    nodes[0].kill()
    moment = books.moment()
    books.wait_ended(20)
    books.settle(run_ids, moment)
    assert drivers(books, run_ids) == {"a", "c"}
    assert status(cluster)["regions"]["b"]["role"] == "fenced"
    refused = cluster.llmo("region", "unfence", "c")
    assert refused.code == 1
    assert "not fenced" in refused.err


def test_a_region_that_was_frozen_commits_nothing_when_it_wakes(
    cluster: Cluster, books: Books
) -> None:
    frozen, other = site(cluster, "a1", "b1")
    run_ids = work(cluster, books, 20, delay=2_000)
    until(lambda: driven(books, "a") == 20, "runs in region a")
    until(lambda: len(books.arrived()) == 20, "calls")
    was = frozen.node_id
    frozen.freeze()
    moment = books.moment()
    until(lambda: driven(books, "b") == 20, "runs that region b took over")
    frozen.thaw()  # the answers that it was waiting for lie in its sockets
    back = f"SELECT count(*) FROM nodes WHERE node_id = '{was}.2' AND state = 'alive'"
    until(lambda: books.psql(back) == "1", "a node that comes back as another")
    books.wait_ended(20)
    account = books.settle(run_ids, moment)
    assert "was taken for dead" in frozen.said
    last = {line["idempotency_key"]: line["id"] for line in books.arrived()}
    for key in account.repeated:
        run_id, _, step = key.partition("/")
        result = account.stories[run_id].fold.finished[step].result
        answer = result["metadata"]["response_id"]
        assert answer == f"chatcmpl-{last[key]}", "a late result of the frozen node landed"
    assert account.repeated
    more = work(cluster, books, 10, delay=100)
    books.wait_ended(30)
    assert drivers(books, more) == {"b"}
    assert not other.is_dead


def test_without_an_arbiter_a_silent_region_needs_a_persons_word(
    cluster: Cluster, books: Books
) -> None:
    frozen, other = site(cluster, "a1", "b1")
    cluster.ok("region", "fence", "b")  # so that it does not take over by itself
    other.freeze()  # nor declares anybody dead
    frozen.freeze()
    plan = ["region", "plan", "--to", "b", "-o", "json"]

    def is_refused() -> bool:
        told = json.loads(cluster.llmo(*plan).out)
        return any("--old-region-is-off" in check["detail"] for check in told["checks"])

    until(is_refused, "a plan that asks for a person's word")
    done = cluster.llmo("region", "failover", "--to", "b", "--yes")
    assert done.code == 1
    assert "--old-region-is-off" in done.err
    words = ["region", "failover", "--to", "b", "--yes", "--wait", "0", "--old-region-is-off"]
    told = json.loads(cluster.ok(*words))
    assert told["roles"] == {"a": "standby", "b": "active"}
    frozen.kill()
    other.thaw()
    run_ids = work(cluster, books, 5, delay=100)
    books.wait_ended(5)
    assert drivers(books, run_ids) == {"b"}

"""A run that kills whoever drives it is set aside after three deaths; the others complete."""

from __future__ import annotations

import pytest

from llm_orchestrator.model import RunState
from tests.acceptance.cluster.books import Books
from tests.acceptance.cluster.flows import write_poison, write_talk
from tests.acceptance.cluster.nodes import Cluster, NodeProcess, until

pytestmark = [pytest.mark.serial, pytest.mark.timeout(300)]
INNOCENT = 12


def tended(nodes: list[NodeProcess]) -> bool:
    """Start again whoever has died, as a supervisor would. Always true."""
    for node in nodes:
        if node.is_dead:
            node.start()
    return True


def test_a_poison_run_is_quarantined_and_the_innocent_complete(
    cluster: Cluster, books: Books
) -> None:
    code, file = write_poison(cluster.folder), write_talk(cluster.folder)
    nodes = cluster.ready("a", "b", "c", words=("--import", str(code)))
    run_ids = books.submit(file, [{"number": n, "delay": 400} for n in range(INNOCENT)])
    poison = cluster.ok("run", str(code), "--detach")
    at_rest = f"run_id = '{poison}' AND state = 'paused'"
    until(lambda: tended(nodes) and books.count(at_rest), "a poison run that is set aside")
    until(
        lambda: tended(nodes) and books.count("state = 'completed'") == INNOCENT,
        "innocent runs that complete",
    )
    deaths = sum(node.life - 1 for node in nodes)
    account = books.settle(run_ids, is_seen=False)
    story = books.stories()[poison]
    print(
        f"{deaths} node deaths; of {INNOCENT} innocent runs {account.takeovers} were taken over, "
        f"{len(account.repeated)} calls were issued twice"
    )
    assert deaths == 3
    assert (story.fold.state, story.fold.reason) == (RunState.PAUSED, "quarantine")
    drivers = [claim["node"] for claim in story.claims]
    assert len(set(drivers)) == 3
    told = cluster.ok("runs", "explain", poison)
    assert "3 nodes died" in told
    assert drivers[-1] in told
    assert f"llmo runs resume {poison}" in told

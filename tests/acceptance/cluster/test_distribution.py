"""Who gets what: fair share, queues that hold over all nodes, delays, schedules. Real nodes."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from llm_orchestrator.cli import target as targets
from llm_orchestrator.config import Config
from llm_orchestrator.engine.control import Operator
from llm_orchestrator.engine.schedule import KIND, times_after
from llm_orchestrator.model import MICROSECONDS
from llm_orchestrator.store.base import Batch, PutRecord
from llm_orchestrator.store.postgres import PostgresStore
from tests.acceptance.cluster.books import Books, Story
from tests.acceptance.cluster.flows import write_call
from tests.acceptance.cluster.nodes import Cluster, until

pytestmark = [pytest.mark.serial, pytest.mark.timeout(300)]
NARROW, RATE, PERIOD_S = 3, 5, 1.0
QUEUES = f"""\
[queues]
narrow = {NARROW}
[queues.slow]
rate = {RATE}
period_s = {PERIOD_S}
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
    assert all(shares[node.node_id] >= 30 for node in nodes), shares
    assert account.repeated == []

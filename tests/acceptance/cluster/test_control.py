"""People intervene from the command line while nodes, other processes, drive the runs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llm_orchestrator.errors import Refused
from llm_orchestrator.model import RunState
from tests.acceptance.cluster.books import Books
from tests.acceptance.cluster.flows import write_control, write_talk
from tests.acceptance.cluster.nodes import Cluster, until

pytestmark = [pytest.mark.serial, pytest.mark.timeout(300)]


def called(books: Books, run_id: str, step: str) -> int:
    """How often a step's call has come. After a rewind its key has a new ending, `@SEQ`."""
    keys = [str(line["idempotency_key"]).partition("@")[0] for line in books.arrived()]
    return keys.count(f"{run_id}/{step}")


def wait_state(books: Books, run_id: str, state: str) -> None:
    until(lambda: books.count(f"run_id = '{run_id}' AND state = '{state}'"), f"a {state} run")


def shown(cluster: Cluster, run_id: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(cluster.ok("runs", "show", run_id, "-o", "json"))
    return found


def test_signal_approval_pause_and_resume_reach_a_run_on_another_node(
    cluster: Cluster, books: Books
) -> None:
    write_control(cluster.folder)
    cluster.ready("a", "b")
    run_id = cluster.ok("run", "desk.yaml", "--detach", "--input", "delay=2500")
    until(lambda: called(books, run_id, "slow"), "a call")
    cluster.ok("runs", "signal", run_id, "go", '{"word": "amber"}', "--key", "k")
    cluster.ok("runs", "signal", run_id, "go", '{"word": "twice"}', "--key", "k")
    told = json.loads(cluster.ok("runs", "pause", "-", "-o", "json", stdin=run_id))
    assert [row["run_id"] for row in told] == [run_id]
    wait_state(books, run_id, "paused")
    story = books.stories()[run_id]
    assert "slow" in story.finished, "a pause lets the step in flight end"
    cluster.ok("runs", "approve", run_id, "review", "--by", "somebody")
    assert called(books, run_id, "last") == 0
    cluster.ok("runs", "resume", run_id)
    wait_state(books, run_id, "completed")
    story = books.stories()[run_id]
    assert story.fold.output["approved"] is True
    assert story.fold.signals["review"]["payload"]["by"] == "somebody"
    prompts = [line["prompt"] for line in books.arrived()]
    assert prompts[-1] == "Last amber"
    books.settle([run_id])


def test_a_cancel_reaches_the_children(cluster: Cluster, books: Books) -> None:
    write_control(cluster.folder)
    cluster.ready("a", "b")
    parent = cluster.ok("run", "parent.yaml", "--detach")
    until(books.arrived, "the child's call")
    child = cluster.ok("runs", "list", "--parent", parent, "-o", "ids")
    begun = cluster.ok("runs", "cancel", parent, "-o", "jsonl")
    assert json.loads(begun)["run_id"] == parent
    for run_id in (parent, child):
        wait_state(books, run_id, "cancelled")
    until(lambda: any(line["event"] == "ended" for line in books.lines()), "a call that ends")
    assert {line["outcome"] for line in books.lines() if line["event"] == "ended"} == {"aborted"}
    stories = books.stories()
    assert {stories[run_id].fold.state for run_id in (parent, child)} == {RunState.CANCELLED}
    done = cluster.llmo("runs", "resume", child)
    assert done.code == Refused.exit_code
    assert f"run {child} is cancelled" in done.err


def test_retry_fork_and_rewind_of_runs_that_other_nodes_drive(
    cluster: Cluster, books: Books
) -> None:
    write_control(cluster.folder)
    cluster.ready("a", "b")
    run_id = cluster.ok("run", "fragile.yaml", "--detach")
    wait_state(books, run_id, "failed")
    cluster.ok("runs", "retry", run_id)
    wait_state(books, run_id, "completed")
    assert (called(books, run_id, "sound"), called(books, run_id, "frail")) == (1, 2)

    words = ("--step", "frail", "--input", "word=other")
    forked = cluster.ok("runs", "fork", run_id, *words)
    wait_state(books, forked, "failed")  # its prompt is new to the fake, which refuses it once
    cluster.ok("runs", "retry", "-", stdin=forked)
    wait_state(books, forked, "completed")
    assert (called(books, forked, "sound"), called(books, forked, "frail")) == (0, 2)

    steps = shown(cluster, run_id)["steps"]
    sound = next(step["seq"] for step in steps if step["step"] == "sound")
    cluster.ok("runs", "rewind", f"{run_id}:{sound}")
    until(lambda: called(books, run_id, "frail") == 3, "a step that is done again")
    wait_state(books, run_id, "completed")
    assert called(books, run_id, "sound") == 1
    assert shown(cluster, run_id)["rewinds"] == 1


def test_an_idempotency_key_survives_the_node_that_drives_its_run(
    cluster: Cluster, books: Books
) -> None:
    file = str(write_talk(cluster.folder))
    nodes = cluster.ready("a", "b")
    words = ("run", file, "--detach", "--idempotency-key", "order-1", "--input", "delay=1500")
    run_id = cluster.ok(*words, "--input", "number=1")
    until(lambda: called(books, run_id, "first"), "a call")
    owner = books.psql(f"SELECT owner FROM runs WHERE run_id = '{run_id}'")
    next(node for node in nodes if node.node_id == owner).kill()
    moment = books.moment()
    assert cluster.ok(*words, "--input", "number=1") == run_id
    other = cluster.llmo(*words, "--input", "number=2")
    assert other.code != 0
    assert "was used with another input" in other.err
    wait_state(books, run_id, "completed")
    assert cluster.ok(*words, "--input", "number=1") == run_id
    assert books.count("true") == 1
    books.settle([run_id], moment)

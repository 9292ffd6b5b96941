"""The verbs of `runs`, `nodes` and `doctor` on a PostgreSQL URL: formats, stdin, exit codes."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from llm_orchestrator.cli.main import main
from tests.acceptance.cli_support import Done
from tests.acceptance.cluster.books import Books
from tests.acceptance.cluster.flows import write_call, write_control
from tests.acceptance.cluster.nodes import Cluster, until

pytestmark = [pytest.mark.serial, pytest.mark.timeout(300)]
FORMATS = ("table", "json", "jsonl", "ids")
ABSENT = "01920000-0000-7000-8000-000000000009"


def ids_in(text: str, kind: str) -> list[str]:
    """The ids that a command has printed, whatever the format."""
    rows: list[Any]
    if kind == "json":
        rows = json.loads(text)
    elif kind == "jsonl":
        rows = [json.loads(line) for line in text.splitlines()]
    elif kind == "ids":
        return text.split()
    else:
        head, *lines = text.splitlines()
        assert head.startswith("RUN")
        return [line.split()[0] for line in lines]
    return [row["run_id"] for row in rows]


class Inside:
    """The command line in this process: many commands, quickly."""

    def __init__(self, url: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self._flags = ("--store", url)
        self._capsys = capsys
        self._patch = monkeypatch

    def __call__(self, *words: str, stdin: str = "") -> Done:
        self._patch.setattr("sys.stdin", StringIO(stdin))
        code = main([*words, *self._flags])
        return Done(code, *self._capsys.readouterr())

    def ok(self, *words: str, stdin: str = "") -> str:
        done = self(*words, stdin=stdin)
        assert done.code == 0, done
        return done.out


@pytest.fixture
def inside(
    books: Books, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Inside:
    return Inside(books.url, capsys, monkeypatch)


def test_verbs_take_ids_on_stdin_and_print_every_format(
    inside: Inside, books: Books, tmp_path: Path
) -> None:
    file = write_call(tmp_path)
    given = books.submit(file, [{"number": n} for n in range(2)])  # nobody serves: they wait
    ids = "\n".join(given)
    verbs = [("pause",), ("resume",), ("pause",), ("resume",)]
    for (verb,), kind in zip(verbs, FORMATS, strict=True):
        said = inside.ok("runs", verb, "-", "-o", kind, stdin=ids)
        assert ids_in(said, kind) == given
    for kind in FORMATS:
        assert set(ids_in(inside.ok("runs", "list", "-o", kind), kind)) == set(given)
    for verb in ("show", "explain"):
        for kind in ("json", "jsonl", "ids"):
            said = inside.ok("runs", verb, "-", "-o", kind, stdin=ids)
            assert ids_in(said, kind) == given
        one = json.loads(inside.ok("runs", verb, given[0], "-o", "json"))
        assert (one["run_id"], one["state"]) == (given[0], "pending")
    assert "none serves the store" in inside.ok("runs", "explain", *given)
    checkpoints = "\n".join(f"{run_id}:1" for run_id in given)
    rewound = inside.ok("runs", "rewind", "-", "-o", "ids", stdin=checkpoints)
    assert rewound.split() == given
    forks = json.loads(inside.ok("runs", "fork", "-", "-o", "json", stdin=ids))
    assert [row["fork_of"] for row in forks] == given
    assert inside.ok("runs", "signal", "-", "go", "-o", "ids", stdin=ids).split() == given
    partly = inside("runs", "cancel", "-", "-o", "jsonl", stdin=f"{ids}\n{ABSENT}")
    assert partly.code == 3
    assert ids_in(partly.out, "jsonl") == given
    assert ABSENT in partly.err
    assert inside("runs", "show", ABSENT, "-o", "json").code == 4
    some = inside("runs", "show", ABSENT, given[0], "-o", "ids")
    assert (some.code, some.out.split()) == (3, given[:1])


def test_approvals_of_several_runs_come_from_stdin(cluster: Cluster, books: Books) -> None:
    write_control(cluster.folder)
    cluster.ready("a")
    given = books.submit(cluster.folder / "desk.yaml", [{"delay": 10}, {"delay": 10}])
    ids = "\n".join(given)
    parked = f"state = 'waiting' AND run_id IN ('{given[0]}', '{given[1]}')"
    until(lambda: books.count(parked) == 2, "runs that wait for somebody")
    approved = cluster.ok("runs", "approve", "-", "review", "-o", "ids", stdin=ids)
    assert approved.split() == given
    cluster.ok("runs", "signal", "-", "go", '{"word": "amber"}', stdin=ids)
    books.wait_ended(2)
    books.settle(given)


def test_the_nodes_and_the_server_are_shown(cluster: Cluster, books: Books) -> None:
    first, second = cluster.ready("a", "b")
    names = {first.node_id, second.node_id}
    rows = json.loads(cluster.ok("nodes", "list", "-o", "json"))
    assert {row["node_id"] for row in rows} == names
    assert {row["pid"] for row in rows} == {first.process.pid, second.process.pid}
    assert all(row["is_connected"] and row["state"] == "alive" for row in rows)
    assert all(0 <= row["beat_age_ms"] < 60_000 for row in rows)
    assert set(cluster.ok("nodes", "-o", "ids").split()) == names
    findings = {row["check"]: row for row in json.loads(cluster.ok("doctor", "-o", "json"))}
    assert findings["nodes"]["finding"] == "2 nodes alive and connected"
    assert "takes writes" in findings["postgresql"]["finding"]
    assert findings["sessions"]["state"] == "ok"
    assert all(name in findings["store"]["finding"] for name in names)
    first.kill()
    until(lambda: len(cluster.ok("nodes", "-o", "ids").split()) == 1, "a node that is buried")
    gone = json.loads(cluster.ok("nodes", "list", "--all", "-o", "json"))
    assert {row["node_id"]: row["state"] for row in gone} == {
        first.node_id: "dead",
        second.node_id: "alive",
    }


def test_a_server_that_does_not_answer_is_one_finding(cluster: Cluster, books: Books) -> None:
    books.server.kill()
    try:
        done = cluster.llmo("doctor", "-o", "json")
        listed = cluster.llmo("nodes")
    finally:
        books.server.start()
    findings = {row["check"]: row for row in json.loads(done.out)}
    assert (done.code, findings["store"]["state"]) == (1, "error")
    assert (listed.code, listed.err.count("error: ")) == (1, 1)

"""`llmo audit`: every verb that changes something leaves its entry; a changed log is found."""

from __future__ import annotations

import getpass
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.cli_support import Shell


@pytest.fixture
def llmo(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def entries(llmo: Shell, *words: str) -> list[dict[str, Any]]:
    done = llmo("audit", "list", "-o", "jsonl", *words)
    assert done.code == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


def told(llmo: Shell, *words: str) -> list[tuple[str, str, str]]:
    """(action, target, result), oldest first, without the chains' beginnings."""
    rows = [row for row in entries(llmo, *words) if row["action"] != "audit.begin"]
    return [(row["action"], row["target"], row["result"]) for row in reversed(rows)]


def started(llmo: Shell) -> str:
    """A run that waits for an approval."""
    done = llmo("run", "gate.yaml", "--detach")
    assert done.code == 0, done.err
    return done.out.strip()


@pytest.fixture
def database(llmo: Shell) -> Iterator[sqlite3.Connection]:
    started(llmo)
    assert llmo("audit", "verify").code == 0
    with closing(sqlite3.connect(llmo.store, isolation_level=None)) as connection:
        yield connection


def test_every_verb_that_changes_something_leaves_who_what_and_the_result(llmo: Shell) -> None:
    run_id = started(llmo)
    for words in (
        ["runs", "pause", run_id, "--by", "ann"],
        ["runs", "resume", run_id],
        ["runs", "signal", run_id, "hurry"],
        ["runs", "fork", run_id],
        ["runs", "cancel", run_id],
        ["workflows", "register", "hello.yaml"],
        ["maintenance", "enable", "--reason", "move"],
        ["maintenance", "disable"],
    ):
        done = llmo(*words)
        assert done.code == 0, done.err
    assert told(llmo) == [
        ("runs.start", run_id, "success"),
        ("runs.pause", run_id, "success"),
        ("runs.resume", run_id, "success"),
        ("runs.signal", run_id, "success"),
        ("runs.fork", run_id, "success"),
        ("runs.cancel", run_id, "success"),
        ("workflows.register", "hello@1.0", "success"),
        ("maintenance.enable", "", "success"),
        ("maintenance.disable", "", "success"),
    ]
    rows = entries(llmo, "--target", run_id, "--action", "runs.pause", "--since", "1h", "--all")
    assert [row["result"] for row in rows] == ["success", "intended"]
    assert {row["actor"] for row in rows} == {getpass.getuser()}
    assert rows[1]["detail"] == {"by": "ann"}
    assert rows[0]["detail"]["intent"] == [*rows[1]["id"].rpartition("/")[:1], 2]
    assert entries(llmo, "--actor", "nobody") == []
    assert entries(llmo, "--since", "2999-01-01") == []


def test_what_was_refused_is_told_too_and_a_dry_run_is_not(llmo: Shell) -> None:
    run_id = started(llmo)
    assert llmo("runs", "cancel", run_id, "--dry-run").code == 0
    assert llmo("runs", "retry", run_id).code != 0
    assert llmo("runs", "approve", run_id, "nothing").code == 4
    assert llmo("breakers", "reset", "none/none").code == 4
    assert told(llmo)[1:] == [
        ("runs.retry", run_id, "refused"),
        ("runs.approve", run_id, "refused"),
        ("breakers.reset", "none/none", "refused"),
    ]


def test_pages_follow_each_other(llmo: Shell) -> None:
    for _ in range(3):
        started(llmo)
    whole = [row["id"] for row in entries(llmo)]
    first = llmo("audit", "list", "--limit", "4", "-o", "ids")
    assert first.out.split() == whole[:4]
    assert f"--before {whole[3]}" in first.err
    assert [row["id"] for row in entries(llmo, "--before", whole[3])] == whole[4:]
    assert llmo("audit", "list", "--before", "no/1").code == 4
    assert llmo("audit", "list", "--since", "yesterday").code == 2


def test_a_whole_log_is_verified_with_its_heads(llmo: Shell) -> None:
    run_id = started(llmo)
    llmo("runs", "cancel", run_id)
    done = llmo("audit", "verify", "-o", "json")
    assert done.code == 0, done.err
    found = done.json
    assert (found["chains"], found["entries"], found["flaws"]) == (2, 5, [])
    assert sorted(head["number"] for head in found["heads"]) == [2, 3]
    assert "checked 2 chains, 5 entries: nothing wrong" in done.err


def test_old_chains_can_go_and_verify_knows(llmo: Shell) -> None:
    started(llmo)
    started(llmo)
    would = llmo("audit", "forget", "--before", "2999-01-01", "--dry-run")
    assert "2 chains would be removed" in would.err
    assert len(entries(llmo)) == 4
    done = llmo("audit", "forget", "--before", "0s")
    assert "2 chains removed" in done.err
    assert [row["action"] for row in entries(llmo)] == ["audit.forget", "audit.begin"]
    assert llmo("audit", "verify").code == 0


@pytest.mark.parametrize(
    ("statement", "place"),
    [
        ("UPDATE audit SET actor = 'eve' WHERE number = 2", "2"),
        ("UPDATE audit SET recorded_at = recorded_at - 1 WHERE number = 1", "1"),
        ("DELETE FROM audit WHERE number = 2", "2"),
        ("DELETE FROM audit WHERE number = 1", "1"),
        ("DELETE FROM audit", "-"),
        ("DELETE FROM records WHERE kind = 'audit'", "-"),
    ],
)
def test_what_somebody_changed_in_the_file_is_named_with_exit_code_8(
    llmo: Shell, database: sqlite3.Connection, statement: str, place: str
) -> None:
    [chain] = database.execute("SELECT DISTINCT chain_id FROM audit").fetchone()
    assert database.execute(statement).rowcount > 0
    done = llmo("audit", "verify")
    assert done.code == 8
    assert done.out.splitlines()[1].split()[:2] == [chain, place]


def test_heads_kept_apart_show_a_log_that_was_emptied_whole(
    llmo: Shell, database: sqlite3.Connection
) -> None:
    kept = llmo("audit", "verify", "-o", "json")
    (llmo.folder / "heads.json").write_text(kept.out)
    database.executescript("DELETE FROM audit; DELETE FROM records WHERE kind = 'audit'")
    assert llmo("audit", "verify").code == 0
    done = llmo("audit", "verify", "--against", "@heads.json")
    assert done.code == 8
    assert "the whole chain is missing" in done.out


def test_a_damaged_log_stops_nobody_from_mending_and_says_so(
    llmo: Shell, database: sqlite3.Connection
) -> None:
    run_id = database.execute("SELECT run_id FROM runs").fetchone()[0]
    database.execute("PRAGMA writable_schema=ON")
    database.execute(
        "UPDATE sqlite_schema SET rootpage = (SELECT rootpage FROM sqlite_schema "
        "WHERE name = 'runs_finished') WHERE name = 'audit'"
    )
    done = llmo("runs", "cancel", run_id)
    assert done.code == 0, done.err
    assert "does not get into the audit log" in done.err


def test_a_file_of_an_older_version_is_brought_up_to_date_by_a_command_that_only_looks(
    llmo: Shell, database: sqlite3.Connection
) -> None:
    database.executescript("DROP TABLE audit; PRAGMA user_version = 2")
    assert entries(llmo) == []
    assert database.execute("PRAGMA user_version").fetchone() == (3,)

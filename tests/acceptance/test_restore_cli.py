"""`llmo restore`, `llmo recovery` and `llmo dr` as operators meet them, on both databases."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_orchestrator.drill.postgres_lab import PostgresServer
from tests.acceptance.test_backup_cli import Yard


@pytest.fixture(params=["sqlite", "postgresql"])
def yard(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Yard]:
    if request.param == "sqlite":
        yield Yard(tmp_path, "")
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    url: str = request.getfixturevalue("postgres_url")
    yield Yard(tmp_path, url)
    for name in server.psql("SELECT datname FROM pg_database").splitlines():
        if name.startswith(f"{url.rpartition('/')[2]}_"):
            server.psql(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
def lone(tmp_path: Path) -> Yard:
    return Yard(tmp_path, "")


def test_what_came_after_the_backup_is_held_and_decided(yard: Yard) -> None:
    yard.make("--prove")
    late = [
        yard("run", "hello.yaml", "--input", f"who={name}", "--detach").out.strip()
        for name in ("three", "four")
    ]
    assert yard("run", "hello.yaml", "--input", "who=five").code == 0  # and drives the others
    plan = yard("restore", "--dry-run", "--json").json
    assert (plan["runs"], plan["lost"]["runs"]) == (2, 3)
    assert len(yard("runs", "list", "-o", "ids").out.split()) == 5
    refused = yard("restore")
    assert refused.code != 0
    assert "--yes" in refused.err
    done = yard("restore", "--yes", "--json")
    assert done.code == 0, done.err
    rows = yard("recovery", "reconcile", "list", "-o", "json").json
    [backup] = yard("backup", "list", "--json").json
    assert backup["is_proved"]  # what is known of backups does not go back
    held = {row["run_id"] for row in rows}
    assert set(late) <= held
    assert {row["effects"] for row in rows} == {"greet"}
    first, *others = sorted(held)
    assert "as done" in yard("recovery", "reconcile", "accept", first).out
    assert (
        "would do greet again" in yard("recovery", "reconcile", "rerun", "--all", "--dry-run").out
    )
    assert yard("recovery", "reconcile", "rerun", *others).code == 0
    assert yard("recovery", "reconcile", "list").out.strip() in ("", "RUN ID")
    assert yard("recovery", "reconcile", "accept", first).code == 4
    assert yard("run", "hello.yaml", "--input", "who=six").code == 0
    states = yard("runs", "list", "-o", "json").json
    assert {row["state"] for row in states} == {"completed"}
    assert len(states) == 6
    actions = [row["action"] for row in yard("audit", "list", "-o", "json").json]
    assert {"store.restore", "recovery.accept", "recovery.rerun"} <= set(actions)
    assert yard("audit", "verify").code == 0
    assert yard("journal", "verify", "--all").code == 0
    assert yard("restore", "--discard-old", "--yes").code == 0
    assert yard("restore", "--discard-old", "--yes").code == 4


def test_the_state_of_things_says_what_would_be_lost(yard: Yard) -> None:
    before = yard("dr", "status")
    assert before.code == 6
    assert "llmo backup create" in before.out
    yard.make("--prove")
    after = yard("dr", "status", "--json").json
    [backup] = [row for row in after["exposure"] if row["mechanism"] == "backup"]
    assert backup["runs"] == 0
    assert {row["rule"]: row["met"] for row in after["scorecard"]}["0 errors"]


def test_objectives_of_a_file_count_and_a_wrong_one_is_named(lone: Yard) -> None:
    file = lone.folder / "dr-objectives.yaml"
    file.write_text("application_crash: {rto_s: 3, rpo_s: 0}\n")
    found = lone("dr", "status", "--objectives", str(file), "--json").json
    goals = {row["class"]: row["rto_s"] for row in found["objectives"]}
    assert goals["application_crash"] == 3
    assert goals["backup_restore"] == 600
    file.write_text("flood: {rto_s: 3, rpo_s: 0}\n")
    wrong = lone("dr", "status", "--objectives", str(file))
    assert wrong.code == 2
    assert "flood" in wrong.err


def test_one_run_that_is_damaged_or_gone_comes_back(lone: Yard) -> None:
    lone.make()
    [run_id, *_] = lone("runs", "list", "-o", "ids").out.split()
    [file] = (lone.folder / "data").glob("*.db")
    with sqlite3.connect(file) as database:
        database.execute("DELETE FROM journal WHERE run_id = ? AND seq > 1", (run_id,))
    assert lone("journal", "verify", run_id).code == 8
    done = lone("restore", "--run", run_id, "--yes")
    assert done.code == 0, done.err
    assert "mended" in done.out
    assert lone("runs", "result", run_id).code == 0
    assert lone("restore", "--run", "00000000-0000-7000-8000-000000000000", "--yes").code == 4


def test_a_damaged_backup_changes_nothing(lone: Yard) -> None:
    file = lone.make()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    before = lone("runs", "list", "-o", "ids").out
    assert lone("restore", "--yes").code == 8
    assert lone("runs", "list", "-o", "ids").out == before


def test_an_engine_that_serves_steps_aside_and_goes_on(lone: Yard) -> None:
    lone.make()
    kept = lone("runs", "list", "-o", "ids").out.split()
    assert lone("run", "hello.yaml", "--input", "who=late").code == 0
    with lone.serving() as engine:
        done = lone("restore", "--yes", "--json")
        assert done.code == 0, done.err
        assert lone("run", "hello.yaml", "--input", "who=new").code == 0  # it drives it
        assert engine.poll() is None
        assert set(kept) < set(lone("runs", "list", "-o", "ids").out.split())
        assert lone("journal", "verify", "--all").code == 0


def test_a_damaged_entry_is_mended_from_a_backup(
    yard: Yard, request: pytest.FixtureRequest
) -> None:
    """No standby, no archive: the backup has what stood there."""
    [run_id, *_] = yard("runs", "list", "-o", "ids").out.split()
    before = yard("runs", "show", run_id, "-o", "json").json
    yard.make()
    where = f"run_id = '{run_id}' AND kind = 'step_finished'"
    if url := yard.environment.get("LLM_ORCHESTRATOR_URL", ""):
        server: PostgresServer = request.getfixturevalue("postgres_server")
        statement = f"UPDATE journal SET payload = '{{\"result\": 1}}'::bytea WHERE {where}"
        server.psql(statement, database=url.rpartition("/")[2])
    else:
        statement = f"UPDATE journal SET payload = CAST('{{\"result\": 1}}' AS BLOB) WHERE {where}"
        with sqlite3.connect(yard.store) as database:
            database.execute(statement)
        database.close()
    assert yard("journal", "verify", run_id).code == 8
    plan = yard("journal", "repair", run_id, "--dry-run")
    assert "a backup" in plan.out
    assert yard("journal", "verify", run_id).code == 8
    done = yard("journal", "repair", run_id)
    assert done.code == 0, done.err
    assert yard("journal", "verify", run_id).code == 0
    assert yard("runs", "show", run_id, "-o", "json").json == before

"""What the witness sees in a store that others use as well: runs from a given id on."""

from __future__ import annotations

import os
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_orchestrator.drill.lab import tools
from llm_orchestrator.drill.staging import _lowest_id
from llm_orchestrator.drill.witness.eyes import Eyes, PostgresEyes, make_eyes

OLD, FIRST, NEW = (_lowest_id(at_ms) for at_ms in (1_700_000_000_000, 1_800_000_000_000, 2**41))
NEWER = _lowest_id(2**41 + 1)


def table(number_type: str, id_type: str, bytes_type: str) -> str:
    return (
        f"CREATE TABLE journal (run_id {id_type}, seq {number_type}, epoch {number_type},"
        f" kind TEXT, step TEXT, recorded_at {number_type}, digest {bytes_type})"
    )


def row(run: str, digest: str) -> str:
    columns = "run_id, seq, epoch, kind, step, recorded_at, digest"
    values = f"'{run}', 1, 1, 'accepted', '', {10**15}, {digest}"
    return f"INSERT INTO journal ({columns}) VALUES ({values})"


def look(eyes: Eyes, write: Callable[[str], None]) -> None:
    assert [seen.run for seen in eyes.news()] == [NEW]
    assert eyes.news() == []
    write(NEWER)
    assert [seen.run for seen in eyes.news()] == [NEWER]
    assert sorted(seen.run for seen in eyes.all()) == [NEW, NEWER]


def test_others_runs_in_a_sqlite_store_are_not_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"

    def write(run: str) -> None:
        with sqlite3.connect(path) as database:
            database.execute(row(run, "x'00ff'"))
        database.close()

    with sqlite3.connect(path) as database:
        database.execute(table("INTEGER", "TEXT", "BLOB"))
    database.close()
    write(OLD)
    write(NEW)
    look(make_eyes(f"sqlite:///{path}", FIRST), write)
    assert len(make_eyes(f"sqlite:///{path}").all()) == 3


def test_others_runs_in_a_postgresql_store_are_not_looked_at(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    psql = Path(tools.find("psql"))
    for name, value in tools.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{psql.parent}{os.pathsep}{os.defpath}")

    def do(statement: str) -> None:
        words = ["psql", postgres_url, "-XqAt", "--set=ON_ERROR_STOP=1", "-c", statement]
        subprocess.run(words, check=True)

    def write(run: str) -> None:
        do(row(run, r"'\x00ff'"))

    do(table("bigint", "uuid", "bytea"))
    write(OLD)
    write(NEW)
    some, every = PostgresEyes(postgres_url, FIRST), PostgresEyes(postgres_url)
    try:
        look(some, write)
        assert len(every.all()) == 3
    finally:
        some._leave()
        every._leave()


def test_without_a_store_nothing_is_seen() -> None:
    assert make_eyes("").all() == make_eyes("").news() == []

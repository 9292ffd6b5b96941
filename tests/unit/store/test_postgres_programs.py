"""Which of several pg_dump and pg_restore is taken for a server."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_orchestrator.errors import ConfigError
from llm_orchestrator.store import postgres_programs
from llm_orchestrator.store.postgres_programs import find


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, *versions: int) -> None:
    """Programs of these versions, and no others."""
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(postgres_programs, "_PLACES", (f"{folder}/*/bin",))
    for version in versions:
        place = folder / str(version) / "bin"
        place.mkdir(parents=True)
        for name in ("pg_dump", "pg_restore"):
            (place / name).write_text(f"#!/bin/sh\necho '{name} (PostgreSQL) {version}.4'\n")
            (place / name).chmod(0o755)


@pytest.mark.parametrize(
    ("name", "server", "taken"),
    [
        ("pg_dump", 15, 15),
        ("pg_dump", 16, 18),
        ("pg_restore", 15, 15),
        ("pg_restore", 17, 18),
        ("pg_restore", 0, 14),
    ],
)
async def test_the_oldest_that_knows_the_server_is_taken(
    name: str, server: int, taken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, 14, 15, 18)
    assert await find(name, server) == str(tmp_path / str(taken) / "bin" / name)


@pytest.mark.parametrize(
    ("there", "name", "said"),
    [
        ((14,), "pg_dump", "of PostgreSQL 15 or later is needed, there is only 14"),
        ((), "pg_dump", "there is none"),
        ((14, 18), "pg_restore", "15 or later, before 17, is needed, there is only 14, 18"),
    ],
)
async def test_what_a_server_would_refuse_is_not_taken(
    there: tuple[int, ...],
    name: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(tmp_path, monkeypatch, *there)
    with pytest.raises(ConfigError, match="is needed") as caught:
        await find(name, 15)
    assert said in caught.value.message
    assert "postgresql-client-15" in str(caught.value.hint)

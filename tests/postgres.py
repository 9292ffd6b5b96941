"""One PostgreSQL server for each test process, an empty database for each test."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import pytest

from llm_orchestrator.drill.postgres_lab import PostgresServer

_numbers = itertools.count(1)


@contextlib.contextmanager
def fresh_database(server: PostgresServer) -> Iterator[str]:
    """The URL of an empty database, which is dropped afterwards, whoever is still connected."""
    name = f"test_{next(_numbers)}"
    yield server.create_database(name)
    server.psql('DROP DATABASE :"name" WITH (FORCE)', name=name)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """The server that this test process shares: start one of your own to kill or to freeze."""
    with PostgresServer() as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """An empty database of the shared server."""
    with fresh_database(postgres_server) as url:
        yield url

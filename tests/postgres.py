"""One PostgreSQL server per test process, a fresh database per test."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from llm_orchestrator.drill.postgres_lab import PostgresServer

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A server that this test process shares; not one to kill."""
    with PostgresServer() as server:
        yield server


@contextmanager
def database(server: PostgresServer) -> Iterator[str]:
    """The URL of an empty database of its own, dropped afterwards."""
    name = f"test_{next(_numbers)}"
    server.psql(f"CREATE DATABASE {name} TEMPLATE template0")
    yield server.url(name)
    server.psql(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """An empty database of its own."""
    with database(postgres_server) as url:
        yield url

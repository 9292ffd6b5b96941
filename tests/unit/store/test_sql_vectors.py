"""What the built-in vector store keeps of what it is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llm_orchestrator.store.memory import MemoryStore
from llm_orchestrator.store.sql_vectors import SqlVectors
from llm_orchestrator.telemetry import redact
from tests.store.support import HandClock


@dataclass
class Item:
    id: str
    vector: list[float]
    metadata: dict[str, Any] = field(default_factory=dict)


async def test_metadata_is_kept_without_secrets() -> None:
    redact.remember("plant9-in-metadata")
    store = MemoryStore(HandClock())
    vectors = SqlVectors(store)
    await vectors.upsert("books", [Item("a", [1.0], {"text": "is plant9-in-metadata"})])
    [found] = await vectors.search("books", [1.0], top_k=1)
    assert found.metadata == {"text": "is ***"}

"""Qdrant (embedded, real) and Pinecone (our adapter against a wire-level fake): one contract.

What is promised of every vector store is asked of both; what only one has follows.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill.fake_pinecone import FakePinecone
from llm_orchestrator.errors import (
    ConfigError,
    InputError,
    ProviderAuthentication,
    ProviderInvalidRequest,
    ProviderRateLimited,
    ProviderTransient,
)
from llm_orchestrator.providers.base import VectorItem, VectorStore
from llm_orchestrator.providers.http import HttpClient
from llm_orchestrator.providers.vectors_pinecone import PineconeVectors
from llm_orchestrator.providers.vectors_qdrant import HINT, QdrantVectors
from llm_orchestrator.vector_math import matches

pytestmark = pytest.mark.timeout(180)

KEY = "pcsk_a-secret-that-must-not-be-told"
ITEMS = [
    VectorItem("book-1", [1.0, 0.0, 0.0], {"lang": "en", "year": 2001, "tags": ["sea"]}),
    VectorItem("book-2", [0.9, 0.1, 0.0], {"lang": "de", "year": 2010, "is_new": True}),
    VectorItem("book/3 ünï", [0.0, 1.0, 0.0], {"lang": "en", "year": 2020.5, "tags": ["a", "sea"]}),
    VectorItem("4", [0.0, 0.0, 1.0], {}),
]


@pytest.fixture
async def http() -> AsyncIterator[HttpClient]:
    http = HttpClient(clock=RealClock())
    yield http
    await http.close()


@pytest.fixture
async def fake() -> AsyncIterator[FakePinecone]:
    fake = FakePinecone(api_key=KEY, dimension=3, index="books")
    await fake.start()
    yield fake
    await fake.stop()


@pytest.fixture(params=["qdrant", "pinecone"])
async def vectors(
    request: pytest.FixtureRequest, tmp_path: Path, http: HttpClient, fake: FakePinecone
) -> AsyncIterator[VectorStore]:
    store: VectorStore = (
        QdrantVectors(path=tmp_path / "qdrant")
        if request.param == "qdrant"
        else PineconeVectors(http, api_key=KEY, host=fake.host)
    )
    yield store
    await store.close()


async def test_the_nearest_come_first_with_their_own_ids(vectors: VectorStore) -> None:
    assert await vectors.upsert("books", ITEMS) == 4
    found = await vectors.search("books", [1.0, 0.05, 0.0], top_k=3)
    assert [match.id for match in found] == ["book-1", "book-2", "book/3 ünï"]
    assert found[0].score == pytest.approx(0.99875, abs=1e-4)
    assert found[0].metadata == ITEMS[0].metadata
    assert found[0].vector is None


async def test_metadata_and_vectors_come_when_asked_for(vectors: VectorStore) -> None:
    await vectors.upsert("books", ITEMS)
    query: dict[str, Any] = {"top_k": 1, "include_vectors": True, "include_metadata": False}
    (match,) = await vectors.search("books", [0.0, 0.0, 2.0], **query)
    assert match.metadata is None
    assert match.vector == pytest.approx([0.0, 0.0, 1.0])


async def test_an_upsert_may_be_repeated_and_replaces(vectors: VectorStore) -> None:
    await vectors.upsert("books", ITEMS)
    await vectors.upsert("books", ITEMS)
    await vectors.upsert("books", [VectorItem("book-1", [0.0, 1.0, 1.0], {"lang": "fr"})])
    found = await vectors.search("books", [0.0, 1.0, 1.0], top_k=10)
    assert len(found) == 4
    assert (found[0].id, found[0].metadata) == ("book-1", {"lang": "fr"})


async def test_namespaces_do_not_see_each_other(vectors: VectorStore) -> None:
    await vectors.upsert("books", ITEMS[:1], namespace="a")
    await vectors.upsert("books", [VectorItem("book-1", [0.0, 1.0, 0.0])], namespace="b")
    (in_a,) = await vectors.search("books", [1.0, 0.0, 0.0], top_k=9, namespace="a")
    (in_b,) = await vectors.search("books", [1.0, 0.0, 0.0], top_k=9, namespace="b")
    assert (in_a.id, in_b.id) == ("book-1", "book-1")
    assert in_a.score > in_b.score
    assert not await vectors.search("books", [1.0, 0.0, 0.0], top_k=9)


@pytest.mark.parametrize(
    "wanted",
    [
        {"lang": "en"},
        {"lang": "en", "year": 2001},
        {"year": 2001.0},
        {"tags": "sea"},
        {"is_new": True},
        {"lang": {"$ne": "en"}},
        {"lang": {"$in": ["de", "fr"]}},
        {"lang": {"$in": []}},
        {"lang": {"$nin": ["de"]}},
        {"year": {"$gt": 2001, "$lte": 2020.5}},
        {"year": {"$gte": 2001, "$lt": 2020}},
        {"lang": {"$exists": False}},
        {"lang": {"$exists": True}},
        {"$or": [{"lang": "de"}, {"year": {"$gt": 2015}}]},
        {"$and": [{"lang": "en"}, {"$or": [{"year": 2001}, {"tags": "a"}]}]},
        {},
    ],
)
async def test_a_filter_means_the_same_everywhere(
    vectors: VectorStore, wanted: dict[str, Any]
) -> None:
    await vectors.upsert("books", ITEMS)
    found = await vectors.search("books", [1.0, 1.0, 1.0], top_k=10, filter=wanted)
    assert {match.id for match in found} == {
        item.id for item in ITEMS if matches(wanted, item.metadata)
    }


async def test_a_filter_of_the_wrong_shape_is_refused(vectors: VectorStore) -> None:
    with pytest.raises(InputError, match="unknown filter operator"):
        await vectors.search("books", [1.0, 0.0, 0.0], top_k=1, filter={"a": {"$like": "x"}})


async def test_a_vector_of_another_dimension_is_the_authors_mistake(vectors: VectorStore) -> None:
    await vectors.upsert("books", ITEMS)
    with pytest.raises(ProviderInvalidRequest) as caught:
        await vectors.search("books", [1.0, 0.0], top_k=1)
    assert "dimension" in str(caught.value.hint)
    with pytest.raises(ProviderInvalidRequest):
        await vectors.upsert("books", [VectorItem("x", [1.0])])


async def test_many_items_go_in_and_come_back(vectors: VectorStore) -> None:
    items = [VectorItem(f"n{number}", [1.0, number / 300, 0.0]) for number in range(300)]
    assert await vectors.upsert("books", items) == 300
    found = await vectors.search("books", [1.0, 0.0, 0.0], top_k=300)
    assert [match.id for match in found][:2] == ["n0", "n1"]
    assert len(found) == 300
    assert await vectors.upsert("books", []) == 0


# --- Qdrant alone ---


async def test_qdrant_keeps_its_vectors_over_a_restart(tmp_path: Path) -> None:
    first = QdrantVectors(path=tmp_path)
    await first.upsert("books", ITEMS)
    await first.close()
    again = QdrantVectors(path=tmp_path)
    (found,) = await again.search("books", [1.0, 0.0, 0.0], top_k=1)
    await again.close()
    assert found.id == "book-1"


# The client leaves its lock file open when it is refused; that is found out right here.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_qdrant_says_when_another_process_has_the_folder(tmp_path: Path) -> None:
    program = (
        "import sys; from qdrant_client import QdrantClient\n"
        "client = QdrantClient(path=sys.argv[1]); print('open', flush=True); input()"
    )
    other = subprocess.Popen(  # noqa: ASYNC220 - it lives beside the test
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "open\n"
    store = QdrantVectors(path=tmp_path)
    with pytest.raises(ProviderInvalidRequest, match="cannot be opened") as caught:
        await store.upsert("books", ITEMS)
    assert "QDRANT_URL" in str(caught.value.hint)
    del caught
    gc.collect()
    other.communicate("\n")
    assert await store.upsert("books", ITEMS) == 4
    await store.close()


async def test_qdrant_says_when_the_index_is_not_there(tmp_path: Path) -> None:
    store = QdrantVectors(path=tmp_path)
    with pytest.raises(ProviderInvalidRequest, match="nowhere not found"):
        await store.search("nowhere", [1.0], top_k=1)
    await store.close()


async def test_a_qdrant_server_that_does_not_answer_is_transient() -> None:
    store = QdrantVectors(url="http://127.0.0.1:1")
    with pytest.raises(ProviderTransient) as caught:
        await store.upsert("books", ITEMS)
    assert "127.0.0.1:1" in str(caught.value.hint)
    await store.close()


async def test_without_the_extra_qdrant_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "qdrant_client", None)
    store = QdrantVectors(path=tmp_path)
    with pytest.raises(ProviderInvalidRequest) as caught:
        await store.upsert("books", ITEMS)
    assert caught.value.hint == HINT
    await store.close()


def test_qdrant_wants_a_folder_or_an_address_not_both(tmp_path: Path) -> None:
    for wrong in ({}, {"path": tmp_path, "url": "http://127.0.0.1:1"}):
        with pytest.raises(ConfigError):
            QdrantVectors(**cast("dict[str, Any]", wrong))


# --- Pinecone alone ---


async def test_pinecone_finds_an_index_by_name_and_asks_once(
    http: HttpClient, fake: FakePinecone
) -> None:
    store = PineconeVectors(http, api_key=KEY, controller=fake.host)
    await store.upsert("books", ITEMS)
    await store.search("books", [1.0, 0.0, 0.0], top_k=1)
    assert [path for path, _ in fake.requests] == ["/indexes/books", "/vectors/upsert", "/query"]
    with pytest.raises(ProviderInvalidRequest, match="no-such not found") as caught:
        await store.search("no-such", [1.0, 0.0, 0.0], top_k=1)
    assert "no-such" in str(caught.value.hint)


async def test_pinecone_sends_at_most_a_hundred_a_request(
    http: HttpClient, fake: FakePinecone
) -> None:
    store = PineconeVectors(http, api_key=KEY, host=fake.host)
    await store.upsert("books", [VectorItem(str(number), [1.0, 0.0, 0.0]) for number in range(250)])
    assert [len(body["vectors"]) for _, body in fake.requests] == [100, 100, 50]


async def test_pinecones_refusals_are_typed_and_keep_the_key(
    http: HttpClient, fake: FakePinecone
) -> None:
    wrong = PineconeVectors(http, api_key="pcsk_wrong-key", host=fake.host)
    with pytest.raises(ProviderAuthentication) as refused:
        await wrong.search("books", [1.0, 0.0, 0.0], top_k=1)
    assert "PINECONE_API_KEY" in str(refused.value.hint)
    assert "wrong-key" not in str(refused.value)
    store = PineconeVectors(http, api_key=KEY, host=fake.host)
    fake.failures = [(429, {"Retry-After": "7"}), (503, {})]
    with pytest.raises(ProviderRateLimited) as limited:
        await store.search("books", [1.0, 0.0, 0.0], top_k=1)
    assert limited.value.retry_after_s == 7
    with pytest.raises(ProviderTransient):
        await store.search("books", [1.0, 0.0, 0.0], top_k=1)
    await fake.stop()
    with pytest.raises(ProviderTransient):
        await store.search("books", [1.0, 0.0, 0.0], top_k=1)


async def test_pinecone_needs_a_key(http: HttpClient) -> None:
    with pytest.raises(ConfigError) as caught:
        PineconeVectors(http, api_key="")
    assert caught.value.hint == "set PINECONE_API_KEY"


async def test_the_fake_runs_as_a_process_of_its_own(http: HttpClient) -> None:
    command = [sys.executable, "-m", "llm_orchestrator.drill.fake_pinecone", "--dimension", "3"]
    child = subprocess.Popen(  # noqa: ASYNC220 - it lives beside the test
        [*command, "--api-key", KEY], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        port = json.loads(child.stdout.readline())["port"]
        store = PineconeVectors(http, api_key=KEY, host=f"http://127.0.0.1:{port}")
        await store.upsert("test", ITEMS)
        (found,) = await store.search("test", [0.0, 0.0, 1.0], top_k=1)
        assert found.id == "4"
    finally:
        child.terminate()
        child.communicate()

"""The step types embed, vector_search, vector_upsert and python, and the registry of all types."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, ClassVar

import pytest

from llm_orchestrator.errors import AuthorError, OperatorError, ProviderTransient
from llm_orchestrator.language.steps import STEP_TYPES
from llm_orchestrator.model import Effect, Json, Usage
from llm_orchestrator.providers.base import EmbedResponse, Match, VectorItem
from llm_orchestrator.providers.echo import EchoEmbeddings, unit_vector
from llm_orchestrator.steps.base import Names, Outcome, Outputs, Plan, StepContext
from llm_orchestrator.steps.embed import Embed
from llm_orchestrator.steps.python import Python
from llm_orchestrator.steps.registry import BUILT_IN, StepTypes
from llm_orchestrator.steps.vector_search import VectorSearch
from llm_orchestrator.steps.vector_upsert import VectorUpsert
from tests.unit.steps.support import Room, Shelf, config


class Embedder(EchoEmbeddings):
    """The echo embeddings, with a small batch and a memory."""

    batch_size_max = 3

    def __init__(self, short_by: int = 0) -> None:
        self.batches: list[list[str]] = []
        self.short_by = short_by

    async def embed(
        self,
        texts: Sequence[str],
        *,
        model: str,
        dimensions: int | None = None,
        extra: Mapping[str, Json] | None = None,
    ) -> EmbedResponse:
        self.batches.append(list(texts))
        texts = texts[: len(texts) - self.short_by]
        return await super().embed(texts, model=model, dimensions=dimensions, extra=extra)


def embed_with(embedder: Embedder) -> Room:
    return Room(providers=Shelf(embeddings={"echo": embedder}))


def embed(**fields: Json) -> Any:
    return config("embed", **{"provider": "echo", "model": "hash", **fields})


async def test_one_text_gives_one_vector() -> None:
    here = embed_with(Embedder())
    outputs = await Embed().execute(here, embed(input="two words", dimensions=8))
    assert list(outputs) == ["vector", "metadata"]
    assert outputs["vector"] == unit_vector("two words", 8)
    assert outputs["metadata"] == {
        "provider": "echo",
        "model": "hash",
        "dimensions": 8,
        "tokens_used": 2,
        "count": 1,
        "usage": Usage(2).to_json(),
        "is_priced": True,
    }
    assert here.usage == [Usage(2)]


@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(None, [3, 3, 1]), (2, [2, 2, 2, 1]), (9, [3, 3, 1])]
)
async def test_a_list_is_embedded_in_batches_in_order(
    batch_size: int | None, sizes: list[int]
) -> None:
    embedder = Embedder()
    texts = [f"text {place}" for place in range(7)]
    here = embed_with(embedder)
    outputs = await Embed().execute(here, embed(input=texts, batch_size=batch_size))
    assert outputs["vector"] == [unit_vector(text, 64) for text in texts]
    assert [len(batch) for batch in embedder.batches] == sizes
    assert len(here.usage) == len(sizes)


async def test_an_empty_list_asks_nobody() -> None:
    embedder = Embedder()
    outputs = await Embed().execute(embed_with(embedder), embed(input=[]))
    assert outputs["vector"] == []
    assert embedder.batches == []


async def test_a_vector_that_is_missing_is_an_error_and_what_was_used_is_booked() -> None:
    here = embed_with(Embedder(short_by=1))
    with pytest.raises(ProviderTransient, match="gave 1 vectors for 2 texts"):
        await Embed().execute(here, embed(input=["a", "b"]))
    assert len(here.usage) == 1


class Vectors:
    """A vector store that remembers what it was asked."""

    name = "sql"

    def __init__(self) -> None:
        self.kept: dict[str, VectorItem] = {}
        self.asked: dict[str, Json] = {}

    async def upsert(self, index: str, items: Sequence[VectorItem], *, namespace: str = "") -> int:
        self.asked = {"index": index, "namespace": namespace}
        self.kept.update({item.id: item for item in items})
        return len(items)

    async def search(
        self,
        index: str,
        vector: Sequence[float],
        *,
        top_k: int,
        namespace: str = "",
        filter: Mapping[str, Json] | None = None,  # noqa: A002
        include_metadata: bool = True,
        include_vectors: bool = False,
    ) -> Sequence[Match]:
        self.asked = {
            "index": index,
            "vector": vector,
            "top_k": top_k,
            "namespace": namespace,
            "filter": filter,
        }
        return [Match("a", 0.9, {"t": "x"}, [1.0, 0.0])]

    async def close(self) -> None: ...


def search(**fields: Json) -> Any:
    return config(
        "vector_search", **{"database": "sql", "index": "docs", "query": [1, 0], **fields}
    )


def upsert(**fields: Json) -> Any:
    return config("vector_upsert", **{"database": "sql", "index": "docs", **fields})


async def test_search_gives_what_was_asked_for() -> None:
    store = Vectors()
    here = Room(providers=Shelf(stores={"sql": store}))
    outputs = await VectorSearch().execute(
        here, search(filter={"lang": "en"}, namespace="n", top_k=2)
    )
    assert list(outputs) == ["results", "metadata"]
    assert outputs["results"] == [{"id": "a", "score": 0.9, "metadata": {"t": "x"}}]
    assert outputs["metadata"] == {"count": 1, "top_k": 2, "database": "sql", "index": "docs"}
    assert store.asked == {
        "index": "docs",
        "vector": [1.0, 0.0],
        "top_k": 2,
        "namespace": "n",
        "filter": {"lang": "en"},
    }
    step = search(include_metadata=False, include_vectors=True)
    outputs = await VectorSearch().execute(here, step)
    assert outputs["results"] == [{"id": "a", "score": 0.9, "vector": [1.0, 0.0]}]


async def test_an_empty_query_is_the_authors_mistake() -> None:
    here = Room(providers=Shelf(stores={"sql": Vectors()}))
    with pytest.raises(AuthorError, match="the query is"):
        await VectorSearch().execute(here, search(query=[]))


async def test_upsert_takes_items_or_columns() -> None:
    store = Vectors()
    here = Room(providers=Shelf(stores={"sql": store}))
    items = [{"id": "a", "vector": [1, 0], "metadata": {"t": 1}}, {"id": "b", "vector": [0, 1]}]
    outputs = await VectorUpsert().execute(here, upsert(items=items, namespace="n"))
    assert outputs["count"] == 2
    assert list(outputs) == ["count", "metadata"]
    by_items, store.kept = store.kept, {}
    columns = {"ids": ["a", "b"], "vectors": [[1, 0], [0, 1]], "metadatas": [{"t": 1}, {}]}
    await VectorUpsert().execute(here, upsert(**columns))
    assert store.kept == by_items
    assert by_items["a"] == VectorItem("a", [1.0, 0.0], {"t": 1})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ids": ["a", "b"], "vectors": [[1]]}, "2 ids and 1 vectors"),
        ({"ids": ["a"], "vectors": [[1]], "metadatas": []}, "1 ids and 0 metadatas"),
        ({"ids": ["a", "a"], "vectors": [[1], [2]]}, "'a' is given twice"),
        ({"ids": ["a", "b"], "vectors": [[1], [2, 3]]}, "'b' has 2 numbers, that of 'a' has 1"),
        ({"ids": ["a"], "vectors": [[]]}, "the vector of 'a' is"),
    ],
)
async def test_columns_that_do_not_fit_are_named(fields: dict[str, Json], message: str) -> None:
    here = Room(providers=Shelf(stores={"sql": Vectors()}))
    with pytest.raises(AuthorError, match=message):
        await VectorUpsert().execute(here, upsert(**fields))


def plain(a: int, b: int = 1) -> dict[str, Json]:
    return {"sum": (a + b,), "is_main": threading.current_thread() is threading.main_thread()}


async def awaited(context: StepContext, a: int) -> str:
    await asyncio.sleep(0)
    return f"{a} {context.idempotency_key}"


def bad() -> object:
    return {"now": object()}


def nan() -> float:
    return float("nan")


def boom() -> None:
    raise KeyError("mine")


class Box:
    @staticmethod
    def inner() -> str:
        return "in the box"


NOT_A_FUNCTION = 3
HERE = "tests.unit.steps.test_leaves"


async def run(function: str, **args: Json) -> Json:
    step = config("python", function=f"{HERE}:{function}", args=args)
    return (await Python().execute(Room(), step))["result"]


async def test_a_plain_function_runs_in_a_thread() -> None:
    assert await run("plain", a=2) == {"sum": [3], "is_main": False}
    assert await run("Box.inner") == "in the box"


async def test_a_coroutine_is_awaited_and_gets_the_context_it_asks_for() -> None:
    assert await run("awaited", a=2) == "2 key-1"


@pytest.mark.parametrize(
    ("function", "args", "message"),
    [
        ("missing", {}, "has no function 'missing'"),
        ("NOT_A_FUNCTION", {}, "has no function"),
        ("plain", {}, "cannot take these args: missing a required argument: 'a'"),
        ("plain", {"a": 1, "c": 2}, "unexpected keyword argument 'c'"),
        ("bad", {}, "bad returned is no JSON"),
        ("nan", {}, "nan returned is no JSON"),
    ],
)
async def test_what_cannot_be_called_or_kept_is_named(
    function: str, args: dict[str, Json], message: str
) -> None:
    with pytest.raises(AuthorError, match=message):
        await run(function, **args)


async def test_an_unknown_module_is_named() -> None:
    step = config("python", function="no_such.module:f")
    with pytest.raises(AuthorError, match="no module 'no_such'"):
        await Python().execute(Room(), step)


async def test_what_a_function_raises_leaves_as_it_is() -> None:
    with pytest.raises(KeyError, match="mine"):
        await run("boom")


def test_every_type_of_the_language_is_built_in_and_says_the_same_outputs() -> None:
    types = StepTypes()
    assert set(STEP_TYPES) == BUILT_IN
    for name, model in STEP_TYPES.items():
        found = types.control(name) if types.is_control(name) else types.leaf(name)
        assert found.type == name
        assert found.outputs == (model.natural_outputs or ("result",))


def test_effects_by_default() -> None:
    types = StepTypes()
    for name in ("llm", "embed", "vector_search", "vector_upsert", "transform"):
        assert types.leaf(name).effect(None) is Effect.REPEATABLE
    assert types.leaf("python").effect(None) is Effect.ONCE
    assert types.leaf("action").effect(config("action", action="log")) is Effect.REPEATABLE
    assert [types.leaf(n).is_paid for n in ("llm", "embed", "transform")] == [True, True, False]


def test_a_leaf_is_no_control_step_and_unknown_types_are_named() -> None:
    types = StepTypes()
    with pytest.raises(AuthorError, match="executes and does not plan"):
        types.control("llm")
    with pytest.raises(AuthorError, match="plans and does not execute"):
        types.leaf("map")
    with pytest.raises(AuthorError, match="no step type 'mapp'") as caught:
        types.is_control("mapp")
    assert caught.value.hint == "did you mean 'map'?"


class Shout:
    type: ClassVar[str] = "shout"
    outputs: ClassVar[tuple[str, ...]] = ("result",)
    is_paid: ClassVar[bool] = False

    def effect(self, config: Any) -> Effect:
        return Effect.REPEATABLE

    async def execute(self, context: StepContext, config: Any) -> Outputs:
        return {"result": "HEY"}


class Again:
    type: ClassVar[str] = "llm"
    outputs: ClassVar[tuple[str, ...]] = ()

    def plan(
        self,
        config: Any,
        names: Names,
        children: Mapping[str, Outcome],
        *,
        waited: Json | None = None,
    ) -> Plan:
        return Plan()


class Neither:
    pass


async def test_plug_ins_add_types_and_replace_none(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"shout": Shout, "llm": Again, "odd": Neither, "again": Again}
    points = [metadata.EntryPoint(name, f"m:{name}", "g") for name in found]
    monkeypatch.setattr(metadata, "entry_points", lambda group: points)
    monkeypatch.setattr(metadata.EntryPoint, "load", lambda self: found[self.name])
    types = StepTypes()
    assert (await types.leaf("shout").execute(Room(), None))["result"] == "HEY"
    assert not types.is_control("shout")
    assert types.is_control("again")
    assert types.leaf("llm").type == "llm"
    assert "shout" in types.names()
    with pytest.raises(OperatorError, match="neither execute nor plan"):
        types.leaf("odd")
    with pytest.raises(OperatorError, match="built in"):
        StepTypes(extra=(Again(),))
    assert StepTypes(extra=(Shout(),)).leaf("shout").type == "shout"


def test_the_registry_loads_no_type_before_it_is_used() -> None:
    code = (
        "import sys; from llm_orchestrator.steps.registry import StepTypes; StepTypes();"
        "heavy = {'aiohttp', 'jsonschema', 'pydantic', 'minijinja', 'importlib.metadata'};"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()

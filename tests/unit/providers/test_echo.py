from __future__ import annotations

import json
import math

import pytest

from llm_orchestrator import errors
from llm_orchestrator.clock import RealClock
from llm_orchestrator.providers.base import LLMRequest, LLMResponse, Partial, Resume
from llm_orchestrator.providers.echo import Echo, EchoEmbeddings


class Seen:
    def __init__(self) -> None:
        self.chunks: list[str] = []
        self.handles: list[object] = []

    async def chunk(self, text: str) -> None:
        self.chunks.append(text)


async def ask(text: str = "good morning", **more: object) -> tuple[LLMResponse, Seen]:
    seen = Seen()
    request = LLMRequest(
        model="any",
        messages=[{"role": "user", "content": text}],
        **more,  # type: ignore[arg-type]
    )
    answer = await Echo(RealClock()).complete(request, seen.chunk, seen.handles.append)
    return answer, seen


async def test_it_says_what_it_was_told_word_by_word_and_for_free() -> None:
    answer, seen = await ask()
    assert answer.text == "".join(seen.chunks) == "echo: good morning"
    assert len(seen.chunks) == 3
    assert answer.usage.cost_usd == 0
    assert answer.usage.output_tokens == 3


async def test_without_streaming_nothing_is_streamed() -> None:
    answer, seen = await ask(stream=False)
    assert answer.text
    assert not seen.chunks


async def test_a_partial_answer_is_continued_and_only_the_rest_is_used() -> None:
    answer, seen = await ask(partial=Partial("echo: good"))
    assert answer.text == "echo: good morning"
    assert seen.chunks == [" morning"]
    assert seen.handles == [{"kept_chars": 10}]
    assert (answer.resumed, answer.resumed_from_tokens) == (Resume.PREFILL, 2)
    assert answer.usage.output_tokens == 1


async def test_a_partial_of_another_answer_starts_again() -> None:
    answer, seen = await ask(partial=Partial("something else"))
    assert "".join(seen.chunks) == answer.text
    assert seen.handles == [{"kept_chars": 0}]
    assert answer.resumed is Resume.RESTART


async def test_a_schema_is_answered_with_a_value_that_fits() -> None:
    schema = {
        "type": "object",
        "properties": {"mood": {"enum": ["fine", "bad"]}, "n": {"type": "integer"}},
        "required": ["mood", "n"],
    }
    answer, _ = await ask(response_schema=schema)
    assert json.loads(answer.text) == {"mood": "fine", "n": 1}


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("transient", errors.ProviderTransient),
        ("rate_limit", errors.ProviderRateLimited),
        ("timeout", errors.ProviderTimeout),
        ("unavailable", errors.ProviderUnavailable),
        ("authentication", errors.ProviderAuthentication),
        ("invalid_request", errors.ProviderInvalidRequest),
        ("content_filter", errors.ProviderContentFiltered),
        ("unknown_outcome", errors.ProviderUnknownOutcome),
        ("no such kind", errors.ProviderInvalidRequest),
    ],
)
async def test_it_fails_in_every_way_that_a_provider_can(
    kind: str, error: type[errors.ProviderError]
) -> None:
    with pytest.raises(error):
        await ask(extra={"fail": kind, "fail_after": 1})


async def test_embeddings_are_unit_vectors_near_those_that_share_words() -> None:
    answer = await EchoEmbeddings().embed(["a red cat", "the red cat", "tax law", ""], model="x")
    first, near, far, _ = answer.vectors
    assert all(math.isclose(sum(x * x for x in v), 1.0) for v in answer.vectors)
    assert len(first) == 64

    def likeness(other: object) -> float:
        return sum(a * b for a, b in zip(first, other, strict=True))  # type: ignore[call-overload]

    assert likeness(near) > 0.5 > likeness(far)

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator

import pytest

from llm_orchestrator import errors
from llm_orchestrator.providers.anthropic import Anthropic, model_version
from llm_orchestrator.providers.base import Partial, Resume
from llm_orchestrator.providers.http import HttpClient, Target
from llm_orchestrator.providers.prices import PriceBook
from tests.acceptance.fake_server import FakeServer, fake_server
from tests.acceptance.providers_support import Seen, ask, http_client

OLD = "claude-sonnet-4-5"
NEW = "claude-sonnet-4-6"


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    with fake_server(tmp_path_factory.mktemp("fake")) as server:
        yield server


@pytest.fixture
async def claude(fake: FakeServer) -> AsyncIterator[Anthropic]:
    client = http_client()
    yield made(client, fake)
    await client.close()


def made(client: HttpClient, fake: FakeServer, key: str = "sk-ant-good-123456") -> Anthropic:
    target = Target(
        "anthropic",
        (fake.url + "/v1",),
        headers={"x-api-key": key, "anthropic-version": "2023-06-01"},
        key=key,
        variable="ANTHROPIC_API_KEY",
        timeout_s=5,
    )
    return Anthropic(target, client, prices=PriceBook())


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_carries_text_usage_with_cached_tokens_and_price(
    fake: FakeServer, claude: Anthropic, stream: bool
) -> None:
    seen = Seen()
    prompt = f"price {stream} and so on and on [[fake: tokens=9 cached=3]]"
    answer = await claude.complete(
        ask(prompt, model=OLD, stream=stream, system="be brief", idempotency_key="k"),
        seen.chunk,
        seen.handle,
    )
    assert len(answer.text.split()) == answer.usage.output_tokens == 9
    assert answer.usage.cached_tokens == 3
    assert answer.usage.input_tokens > 3
    assert answer.usage.cost_usd > 0
    assert answer.finish_reason == "stop"
    assert seen.text == (answer.text if stream else "")
    (line,) = fake.arrived(f"price {stream}")
    assert line["prompt"].startswith("be brief")
    assert line["idempotency_key"] == "k"


async def test_input_tokens_are_all_of_them_cached_or_not(claude: Anthropic) -> None:
    used = [
        (
            await claude.complete(
                ask(f"one two three four [[fake: cached={cached}]]", model=OLD),
                Seen().chunk,
                Seen().handle,
            )
        ).usage
        for cached in (0, 3)
    ]
    assert used[0].input_tokens == used[1].input_tokens
    assert used[0].cost_usd > used[1].cost_usd


async def test_an_answer_at_its_limit_says_length(claude: Anthropic) -> None:
    answer = await claude.complete(
        ask("long [[fake: tokens=50]]", model=OLD, max_tokens=5), Seen().chunk, Seen().handle
    )
    assert (answer.finish_reason, answer.usage.output_tokens) == ("length", 5)


@pytest.mark.parametrize(
    ("marker", "kind"),
    [
        ("status=429 retry_after_ms=1500", errors.ProviderRateLimited),
        ("status=529", errors.ProviderTransient),
        ("status=500", errors.ProviderTransient),
        ("status=400", errors.ProviderInvalidRequest),
        ("filter", errors.ProviderContentFiltered),
        ("garbage", errors.ProviderTransient),
        ("cut_after=0", errors.ProviderTransient),
        ("cut_after=4", errors.ProviderTransient),
        ("cut_after=4 polite", errors.ProviderTransient),
        ("cut_after=4 error=overloaded_error", errors.ProviderTransient),
    ],
)
async def test_each_failure_is_its_typed_error(
    claude: Anthropic, marker: str, kind: type[errors.ProviderError]
) -> None:
    with pytest.raises(errors.ProviderError) as caught:
        await claude.complete(
            ask(f"fail [[fake: {marker}]]", model=OLD), Seen().chunk, Seen().handle
        )
    assert type(caught.value) is kind
    if "retry_after" in marker:
        assert caught.value.retry_after_s == 1.5


async def test_a_refused_key_is_never_shown(fake: FakeServer) -> None:
    client, key = http_client(), "sk-ant-bad-secret-98765"
    with pytest.raises(errors.ProviderAuthentication) as caught:
        await made(client, fake, key).complete(ask("who"), Seen().chunk, Seen().handle)
    assert key not in str(caught.value)
    assert caught.value.hint == "set ANTHROPIC_API_KEY"
    with pytest.raises(errors.ProviderAuthentication, match="no key"):
        await made(client, fake, "").complete(ask("who"), Seen().chunk, Seen().handle)
    await client.close()


@pytest.mark.parametrize("stream", [True, False])
async def test_tool_calls_come_out_parsed_and_their_results_go_back(
    claude: Anthropic, stream: bool
) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    prompt = 'find it [[fake: tool=look json={"q": "cats"}]]'
    first = await claude.complete(
        ask(prompt, model=OLD, stream=stream, tools=[tool]), Seen().chunk, Seen().handle
    )
    (call,) = first.tool_calls
    assert (call["name"], call["arguments"]) == ("look", {"q": "cats"})
    assert first.finish_reason == "tool_calls"
    messages = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "three cats"},
    ]
    second = await claude.complete(
        ask("", model=OLD, messages=messages, tools=[tool]), Seen().chunk, Seen().handle
    )
    assert second.text
    assert not second.tool_calls


async def test_a_schema_is_answered_with_json(claude: Anthropic) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    answer = await claude.complete(
        ask("shape", model=OLD, response_schema=schema), Seen().chunk, Seen().handle
    )
    assert isinstance(json.loads(answer.text)["n"], int)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("gap", ["", " "])
@pytest.mark.parametrize(("model", "way"), [(OLD, Resume.PREFILL), (NEW, Resume.CONTINUE_TURN)])
async def test_a_half_streamed_answer_goes_on_as_the_model_allows_and_only_the_rest_is_paid(
    fake: FakeServer, claude: Anthropic, *, model: str, way: Resume, stream: bool, gap: str
) -> None:
    prompt = f"resume {model} {stream} {gap!r}"
    full = await claude.complete(
        ask(prompt, model=model, max_tokens=20), Seen().chunk, Seen().handle
    )
    kept = " ".join(full.text.split()[:8]) + gap
    seen = Seen()
    question = ask(
        prompt, model=model, max_tokens=20, stream=stream, partial=Partial(kept, tokens=8)
    )
    answer = await claude.complete(question, seen.chunk, seen.handle)
    assert answer.text == full.text
    assert answer.resumed is way
    assert answer.resumed_from_tokens == 8
    assert answer.usage.output_tokens == 12
    assert seen.handles[0]["kept_chars"] == len(kept)
    if stream:
        assert kept + seen.text == full.text
    assert len(fake.arrived(f"resume {model} {stream} {gap!r}")) == 2


async def test_a_model_that_refuses_prefill_after_all_is_asked_to_continue(
    fake: FakeServer, claude: Anthropic
) -> None:
    prompt = "refuse [[fake: refuse_prefill]]"
    full = await claude.complete(ask(prompt, model=OLD), Seen().chunk, Seen().handle)
    partial = Partial(" ".join(full.text.split()[:3]))
    answer = await claude.complete(
        ask(prompt, model=OLD, partial=partial), Seen().chunk, Seen().handle
    )
    assert answer.resumed is Resume.CONTINUE_TURN
    assert answer.text == full.text


@pytest.mark.parametrize(
    ("model", "version"),
    [
        ("claude-sonnet-4-20250514", (4, 0)),
        ("claude-opus-4-1-20250805", (4, 1)),
        ("claude-sonnet-4-5-20250929", (4, 5)),
        ("claude-3-5-haiku-latest", (3, 5)),
        ("claude-3-opus-20240229", (3, 0)),
        ("claude-opus-4-6", (4, 6)),
        ("claude-opus-5", (5, 0)),
        ("anthropic.claude-sonnet-4-5-v1:0", (4, 5)),
        ("house-model", None),
    ],
)
def test_the_version_in_a_models_name_is_read(model: str, version: tuple[int, int] | None) -> None:
    assert model_version(model) == version

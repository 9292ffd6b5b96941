from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest

from llm_orchestrator import errors
from llm_orchestrator.drill.fake_llm import raise_file_limit
from llm_orchestrator.providers.base import Partial, Resume
from llm_orchestrator.providers.http import HttpClient, _is_unsent
from llm_orchestrator.providers.openai import LLAMA_CPP, OFFICIAL, Dialect, Prefill
from tests.acceptance.fake_server import FakeServer, fake_server
from tests.acceptance.providers_support import (
    Seen,
    ask,
    http_client,
    openai,
    openai_embeddings,
    target,
)

PREFILL = Dialect(resume=(Resume.PREFILL, Resume.RESTART))


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    with fake_server(tmp_path_factory.mktemp("fake")) as server:
        yield server


@pytest.fixture
async def client() -> AsyncIterator[HttpClient]:
    made = http_client()
    yield made
    await made.close()


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_carries_text_usage_price_and_id(
    fake: FakeServer, client: HttpClient, stream: bool
) -> None:
    seen = Seen()
    llm = openai(client, target(fake.url + "/v1"))
    question = ask(
        "price [[fake: tokens=7 cached=1]]", model="gpt-4o-mini", stream=stream, max_tokens=50
    )
    answer = await llm.complete(question, seen.chunk, seen.handle)
    assert len(answer.text.split()) == answer.usage.output_tokens == 7
    assert answer.usage.cached_tokens == 1
    assert answer.usage.cost_usd > 0
    assert answer.is_priced
    assert answer.finish_reason == "stop"
    assert answer.response_id.startswith("chatcmpl-")
    assert seen.text == (answer.text if stream else "")


async def test_streamed_and_whole_answers_are_the_same_text(
    fake: FakeServer, client: HttpClient
) -> None:
    llm = openai(client, target(fake.url + "/v1"))
    texts = {
        (await llm.complete(ask("same", stream=stream), Seen().chunk, Seen().handle)).text
        for stream in (True, False)
    }
    assert len(texts) == 1


async def test_the_idempotency_key_and_the_system_prompt_are_sent(
    fake: FakeServer, client: HttpClient
) -> None:
    llm = openai(client, target(fake.url + "/v1"))
    question = ask(
        "keyed", idempotency_key="run-1/step-2", system="be brief", extra={"store": True}
    )
    await llm.complete(question, Seen().chunk, Seen().handle)
    (line,) = fake.arrived("keyed")
    assert line["idempotency_key"] == "run-1/step-2"
    assert line["metadata"] == {"idempotency_key": "run-1/step-2"}
    assert line["prompt"].startswith("be brief")


@pytest.mark.parametrize(
    ("marker", "kind"),
    [
        ("status=429 retry_after=7", errors.ProviderRateLimited),
        ("status=500", errors.ProviderTransient),
        ("status=503", errors.ProviderTransient),
        ("status=529", errors.ProviderTransient),
        ("status=400", errors.ProviderInvalidRequest),
        ("status=404", errors.ProviderInvalidRequest),
        ("status=403", errors.ProviderAuthentication),
        ("status=400 error=content_filter", errors.ProviderContentFiltered),
        ("filter", errors.ProviderContentFiltered),
        ("garbage", errors.ProviderTransient),
        ("cut_after=0", errors.ProviderTransient),
        ("cut_after=3", errors.ProviderTransient),
        ("cut_after=3 polite", errors.ProviderTransient),
        ("cut_after=3 error=overloaded_error", errors.ProviderTransient),
        ("cut_after=3 error=rate_limit_error", errors.ProviderRateLimited),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_each_failure_is_its_typed_error(
    fake: FakeServer,
    client: HttpClient,
    marker: str,
    kind: type[errors.ProviderError],
    *,
    stream: bool,
) -> None:
    if not stream and "error=" in marker and "cut" in marker:
        return
    llm = openai(client, target(fake.url + "/v1"))
    with pytest.raises(errors.ProviderError) as caught:
        await llm.complete(
            ask(f"fail [[fake: {marker}]]", stream=stream), Seen().chunk, Seen().handle
        )
    assert type(caught.value) is kind
    assert caught.value.provider == "openai"
    if "retry_after" in marker:
        assert caught.value.retry_after_s == 7


async def test_a_silent_server_is_a_timeout_and_the_ledger_saw_the_disconnect(
    fake: FakeServer, client: HttpClient
) -> None:
    llm = openai(client, target(fake.url + "/v1", timeout_s=0.2))
    with pytest.raises(errors.ProviderTimeout):
        await llm.complete(ask("silence [[fake: hang]]"), Seen().chunk, Seen().handle)
    await asyncio.to_thread(fake.wait_idle)
    assert fake.ended("silence")[0]["outcome"] == "aborted"


async def test_nobody_listening_is_transient_and_the_next_address_is_tried(
    fake: FakeServer, client: HttpClient
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        with pytest.raises(errors.ProviderTransient, match="cannot be reached"):
            await openai(client, target(dead)).complete(ask("x"), Seen().chunk, Seen().handle)
        both = target((dead, fake.url + "/v1"))
        answer = await openai(client, both).complete(ask("second"), Seen().chunk, Seen().handle)
        assert answer.text


async def test_a_refused_key_is_never_shown_and_the_hint_names_its_variable(
    fake: FakeServer, client: HttpClient
) -> None:
    key = "sk-bad-secret-0123456789"
    llm = openai(client, target(fake.url + "/v1", key=key))
    with pytest.raises(errors.ProviderAuthentication) as caught:
        await llm.complete(ask("who"), Seen().chunk, Seen().handle)
    assert key not in str(caught.value)
    assert "***" in str(caught.value)
    assert caught.value.hint == "set OPENAI_API_KEY"


async def test_a_missing_key_is_noticed_before_anything_is_sent(
    fake: FakeServer, client: HttpClient
) -> None:
    llm = openai(client, target(fake.url + "/v1", key=""), OFFICIAL)
    with pytest.raises(errors.ProviderAuthentication) as caught:
        await llm.complete(ask("keyless"), Seen().chunk, Seen().handle)
    assert caught.value.hint == "set OPENAI_API_KEY"
    assert not fake.arrived("keyless")


@pytest.mark.parametrize("stream", [True, False])
async def test_tool_calls_come_out_parsed(
    fake: FakeServer, client: HttpClient, stream: bool
) -> None:
    llm = openai(client, target(fake.url + "/v1"))
    tool = {"name": "search", "parameters": {"type": "object"}}
    prompt = 'look [[fake: tool=search json={"q": "cats", "n": [1, 2]}]]'
    answer = await llm.complete(
        ask(prompt, stream=stream, tools=[tool]), Seen().chunk, Seen().handle
    )
    (call,) = answer.tool_calls
    assert (call["name"], call["arguments"]) == ("search", {"q": "cats", "n": [1, 2]})
    assert call["id"]
    assert answer.finish_reason == "tool_calls"


async def test_a_schema_is_sent_and_strict_only_where_that_is_allowed(
    fake: FakeServer, client: HttpClient
) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    llm = openai(client, target(fake.url + "/v1"))
    for form in (schema, schema | {"additionalProperties": False}):
        answer = await llm.complete(ask("shape", response_schema=form), Seen().chunk, Seen().handle)
        assert isinstance(json.loads(answer.text)["n"], int)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("style", list(Prefill))
async def test_a_prefilled_answer_keeps_the_prefix_and_pays_for_the_rest_only(
    fake: FakeServer, client: HttpClient, stream: bool, style: Prefill
) -> None:
    dialect = Dialect(resume=(Resume.PREFILL, Resume.RESTART), prefill=style)
    llm = openai(client, target(fake.url + "/v1"), dialect)
    prompt = f"resume {stream} {style}"
    full = await llm.complete(ask(prompt, max_tokens=20), Seen().chunk, Seen().handle)
    kept = " ".join(full.text.split()[:8])
    seen = Seen()
    answer = await llm.complete(
        ask(prompt, max_tokens=20, stream=stream, partial=Partial(kept, tokens=8)),
        seen.chunk,
        seen.handle,
    )
    assert answer.text == full.text
    assert answer.usage.output_tokens == 12
    assert answer.resumed is Resume.PREFILL
    assert answer.resumed_from_tokens == 8
    assert seen.handles[0]["kept_chars"] == len(kept)
    assert seen.text == (full.text[len(kept) :] if stream else "")


async def test_a_refused_prefill_starts_again_and_says_so_first(
    fake: FakeServer, client: HttpClient
) -> None:
    llm = openai(client, target(fake.url + "/v1"), PREFILL)
    seen = Seen()
    answer = await llm.complete(
        ask("refuse [[fake: refuse_prefill]]", partial=Partial("something")),
        seen.chunk,
        seen.handle,
    )
    assert seen.handles[0]["kept_chars"] == 0
    assert answer.resumed is Resume.RESTART
    assert answer.resumed_from_tokens == 0
    assert seen.text == answer.text


async def test_a_lost_stream_is_attached_to_again_and_nothing_is_generated_twice(
    fake: FakeServer, client: HttpClient
) -> None:
    llm = openai(client, target(fake.url + "/v1"), LLAMA_CPP)
    prompt = "attach [[fake: chunk_delay_ms=2 cut_after=5]]"
    first = Seen()
    with pytest.raises(errors.ProviderTransient):
        await llm.complete(ask(prompt, idempotency_key="r/a b/é"), first.chunk, first.handle)
    assert len(first.chunks) == 5
    partial = Partial(first.text, tokens=5, handle=first.handles[-1])
    again = Seen()
    answer = await llm.complete(ask(prompt, partial=partial), again.chunk, again.handle)
    assert answer.resumed is Resume.ATTACH
    assert answer.text == first.text + again.text
    assert len(answer.text.split()) == 20
    assert len(fake.arrived("attach")) == 1


async def test_a_stream_that_is_another_generation_is_never_glued_to_ours(
    fake: FakeServer, client: HttpClient
) -> None:
    llm = openai(client, target(fake.url + "/v1"), LLAMA_CPP)
    await llm.complete(ask("other", idempotency_key="k1"), Seen().chunk, Seen().handle)
    partial = Partial("these words are not its", handle={"conversation_id": "k1"})
    answer = await llm.complete(ask("mine", partial=partial), Seen().chunk, Seen().handle)
    assert answer.resumed is Resume.PREFILL
    assert answer.text.startswith("these words are not its")


async def test_an_unknown_conversation_falls_through_to_prefill(
    fake: FakeServer, client: HttpClient
) -> None:
    llm = openai(client, target(fake.url + "/v1"), LLAMA_CPP)
    full = await llm.complete(ask("gone"), Seen().chunk, Seen().handle)
    kept = full.text[:10]
    partial = Partial(kept, handle={"conversation_id": "nobody"})
    answer = await llm.complete(ask("gone", partial=partial), Seen().chunk, Seen().handle)
    assert answer.resumed is Resume.PREFILL
    assert answer.text == full.text


async def test_a_stream_over_plain_http_asks_for_a_connection_of_its_own(
    client: HttpClient,
) -> None:
    heads: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append((await reader.readuntil(b"\r\n\r\n")).decode().lower())
        answer = b'data: {"choices": [{"delta": {"content": "hi"}, "finish_reason": "stop"}]}\n\n'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        llm = openai(client, target(f"http://127.0.0.1:{port}/v1"))
        assert (await llm.complete(ask("x"), Seen().chunk, Seen().handle)).text == "hi"
    assert "connection: close" in heads[0]


def test_only_a_request_that_was_not_written_counts_as_unsent() -> None:
    unsent, lost = aiohttp.ClientOSError("x"), aiohttp.ClientOSError("y")
    unsent.__cause__ = aiohttp.ClientConnectionResetError("Cannot write to closing transport")
    lost.__cause__ = ConnectionResetError("reset by peer")
    assert (_is_unsent(unsent), _is_unsent(lost)) == (True, False)


async def test_a_server_without_usage_is_estimated(fake: FakeServer, client: HttpClient) -> None:
    llm = openai(client, target(fake.url + "/v1"))
    answer = await llm.complete(ask("how much [[fake: no_usage]]"), Seen().chunk, Seen().handle)
    assert answer.usage.output_tokens >= 20
    assert answer.usage.input_tokens > 0
    assert not answer.is_priced


async def test_azure_names_the_deployment_and_the_version_in_the_path(
    fake: FakeServer, client: HttpClient
) -> None:
    to = target(fake.url, provider="azure", headers={"api-key": "k"}, key="k")
    llm = openai(client, to, Dialect(api_version="2024-10-21"))
    answer = await llm.complete(ask("cloud", model="gpt-4o"), Seen().chunk, Seen().handle)
    assert answer.usage.cost_usd > 0


async def test_embeddings_are_one_unit_vector_per_text_in_order(
    fake: FakeServer, client: HttpClient
) -> None:
    to_vectors = openai_embeddings(client, target(fake.url + "/v1"))
    texts = ["a red cat", "a red dog", "tax law"]
    answer = await to_vectors.embed(texts, model="text-embedding-3-small", dimensions=32)
    assert [len(vector) for vector in answer.vectors] == [32, 32, 32]
    near, far = (
        sum(a * b for a, b in zip(answer.vectors[0], other, strict=True))
        for other in answer.vectors[1:]
    )
    assert near > far
    assert answer.usage.cost_usd > 0
    with pytest.raises(errors.ProviderTransient):
        await to_vectors.embed(["x [[fake: status=500]]"], model="text-embedding-3-small")


async def test_what_a_reader_raises_is_not_called_a_providers_failure(
    fake: FakeServer, client: HttpClient
) -> None:
    async def full_disk(text: str) -> None:
        raise OSError(28, "disk full")

    llm = openai(client, target(fake.url + "/v1"))
    with pytest.raises(OSError, match="disk full"):
        await llm.complete(ask("reader"), full_disk, Seen().handle)


async def test_a_cancelled_call_ends_at_the_provider_too(
    fake: FakeServer, client: HttpClient
) -> None:
    llm = openai(client, target(fake.url + "/v1"))
    began = asyncio.Event()

    async def begin(text: str) -> None:
        began.set()

    question = ask("leave [[fake: tokens=100000 chunk_delay_ms=5]]")
    task = asyncio.create_task(llm.complete(question, begin, Seen().handle))
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(fake.wait_idle)
    (line,) = fake.ended("leave")
    assert line["outcome"] == "aborted"
    assert 1 <= line["tokens"] < 100000


@pytest.mark.timeout(300)
async def test_a_thousand_calls_at_once_all_end_and_are_all_in_the_ledger(fake: FakeServer) -> None:
    raise_file_limit()
    client = http_client()
    llm = openai(client, target(fake.url + "/v1"))

    async def one(number: int) -> str:
        seen = Seen()
        question = ask(f"crowd {number} [[fake: delay_ms=300 tokens=5]]")
        answer = await llm.complete(question, seen.chunk, seen.handle)
        assert seen.text == answer.text
        return answer.text

    texts = await asyncio.gather(*(one(number) for number in range(1000)))
    await client.close()
    assert len(texts) == 1000
    assert {line["outcome"] for line in fake.ended("crowd")} == {"complete"}
    assert len(fake.ended("crowd")) == 1000

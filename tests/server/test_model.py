"""Workflows as models, asked by the official client."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from llm_orchestrator.engine.replay import fold
from tests.server.support import TOKEN, Site

SAY = """
name: say
version: "1.0"
inputs: {prompt: string, pace: {type: number, default: 2}, tone: {type: string, default: plain}}
steps:
  - {id: say, type: llm, provider: echo, model: echo, stream: true, delay_ms: "{{ inputs.pace }}",
     prompt: "{{ inputs.prompt }} {{ inputs.tone }}"}
outputs: {answer: {value: "{{ steps.say.text }}"}}
"""
SHAPED = """
name: shaped
inputs: {messages: {type: array}, system: {type: string, default: ""}}
steps:
  - {id: say, type: llm, provider: echo, model: echo, messages: "{{ inputs.messages }}"}
outputs: {said: {value: "<{{ steps.say.text }}> {{ inputs.system }}"}}
"""
FAILS = """
name: fails
inputs: {prompt: string}
steps:
  - {id: say, type: llm, provider: echo, model: echo, stream: true, fail: authentication,
     prompt: "{{ inputs.prompt }}"}
outputs: {answer: {value: "{{ steps.say.text }}"}}
"""
GATE = """
name: gate
inputs: {prompt: string}
steps:
  - {id: gate, type: approval}
outputs: {answer: {value: "{{ inputs.prompt }}"}}
"""
HELLO: list[Any] = [{"role": "user", "content": "hello there"}]
ANSWER = "echo: hello there plain"


@pytest.fixture
async def client(site: Site) -> AsyncIterator[openai.AsyncOpenAI]:
    for text in (SAY, SHAPED, FAILS, GATE):
        assert (await site.register(text)).is_success, text
    async with client_of(site) as made:
        yield made


@contextlib.asynccontextmanager
async def client_of(site: Site, token: str = TOKEN) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{site.serving.url}/v1", api_key=token, max_retries=0
    ) as made:
        yield made


async def runs(site: Site) -> list[str]:
    found = (await site.get("/runs")).json()["items"]
    return [item["run_id"] for item in found]


async def test_models_are_the_registered_workflows(client: openai.AsyncOpenAI) -> None:
    names = [model.id async for model in client.models.list()]
    assert {"say", "say@1.0", "shaped", "fails"} <= set(names)
    assert (await client.models.retrieve("say@1.0")).id == "say@1.0"
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("nobody")
    assert caught.value.code == "not_found"


async def test_a_chat_is_a_run(site: Site, client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="say",
        messages=HELLO,
        metadata={"tone": "warm", "team": "red"},
        extra_body={"inputs": {"pace": 0}},
    )
    assert answer.choices[0].message.content == "echo: hello there warm"
    assert answer.choices[0].finish_reason == "stop"
    run_id = answer.id.removeprefix("chatcmpl-")
    row = (await site.get(f"/runs/{run_id}")).json()
    assert row["labels"] == {"team": "red"}
    assert row["input"] == {"prompt": "hello there", "tone": "warm", "pace": 0}
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == row["input_tokens"] > 0
    assert answer.usage.completion_tokens == row["output_tokens"] > 0
    assert answer.model == "say@1.0"


async def test_a_streamed_chat_comes_as_it_is_said(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="say@1.0",
        messages=HELLO,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"inputs": {"pace": 20}},
    )
    chunks = [chunk async for chunk in stream]
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == ANSWER
    assert len([piece for piece in pieces if piece]) == len(ANSWER.split())
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0


async def test_what_no_single_step_says_comes_in_one_piece(client: openai.AsyncOpenAI) -> None:
    messages: list[Any] = [{"role": "system", "content": "short"}, *HELLO]
    stream = await client.chat.completions.create(model="shaped", messages=messages, stream=True)
    pieces = [c.choices[0].delta.content async for c in stream if c.choices[0].delta.content]
    assert pieces == ["<echo: hello there> short"]


async def test_a_repeated_key_is_the_first_run(site: Site, client: openai.AsyncOpenAI) -> None:
    headers = {"Idempotency-Key": "once"}
    first = await client.chat.completions.create(model="say", messages=HELLO, extra_headers=headers)
    again = await client.chat.completions.create(
        model="say", messages=HELLO, stream=True, extra_headers=headers
    )
    chunks = [chunk async for chunk in again]
    assert {chunk.id for chunk in chunks} == {first.id}
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == ANSWER
    assert len(await runs(site)) == 1
    other: list[Any] = [{"role": "user", "content": "other"}]
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="say", messages=other, extra_headers=headers)
    assert caught.value.code == "key_reused"


async def test_errors_are_in_openais_shape(site: Site, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        await client.chat.completions.create(model="nobody", messages=HELLO)
    with pytest.raises(openai.BadRequestError):
        await client.chat.completions.create(model="say", messages=HELLO, n=2)
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(
            model="say", messages=HELLO, extra_body={"inputs": {"pace": "quick"}}
        )
    assert bad.value.code == "input"
    assert not await runs(site)
    with pytest.raises(openai.InternalServerError) as failed:
        await client.chat.completions.create(model="fails", messages=HELLO)
    assert failed.value.response.headers["x-should-retry"] == "false"
    async with client_of(site, "wrong") as stranger:
        with pytest.raises(openai.AuthenticationError) as denied:
            await stranger.models.list()
    assert denied.value.code == "invalid_api_key"
    stream = await client.chat.completions.create(model="fails", messages=HELLO, stream=True)
    with pytest.raises(openai.APIError) as broken:
        _ = [chunk async for chunk in stream]
    assert broken.value.code == "failed"


async def test_a_response_is_a_run(client: openai.AsyncOpenAI) -> None:
    made = await client.responses.create(model="say", input="hello there", metadata={"team": "red"})
    assert (made.status, made.output_text) == ("completed", ANSWER)
    assert made.usage is not None
    assert made.usage.output_tokens > 0
    again = await client.responses.retrieve(made.id)
    assert again.to_dict() == made.to_dict()
    assert again.metadata == {"team": "red"}


async def test_a_streamed_response_ends_with_the_whole(client: openai.AsyncOpenAI) -> None:
    stream = await client.responses.create(model="say", input=HELLO, stream=True)
    events = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == ANSWER
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == ANSWER


async def test_a_background_response_is_streamed_again_from_any_number(
    client: openai.AsyncOpenAI,
) -> None:
    stream = await client.responses.create(model="say", input=HELLO, stream=True, background=True)
    events = [event async for event in stream]
    response_id = events[-1].response.id  # type: ignore[union-attr]
    for after in range(-1, len(events)):
        more: dict[str, Any] = {} if after < 0 else {"starting_after": after}
        resumed = await client.responses.retrieve(response_id, stream=True, **more)
        found = [event async for event in resumed]
        assert [e.to_dict() for e in found[2:]] == [e.to_dict() for e in events[after + 3 :]]
        assert [e.sequence_number for e in found] == list(range(after + 1, len(events)))


async def test_a_background_response_is_cancelled(client: openai.AsyncOpenAI) -> None:
    made = await client.responses.create(model="gate", input="hello", background=True)
    assert made.status in ("queued", "in_progress")
    ended = await client.responses.cancel(made.id)
    assert ended.status == "cancelled"
    assert (await client.responses.cancel(made.id)).status == "cancelled"
    with pytest.raises(openai.NotFoundError):
        await client.responses.cancel("resp_nobody")


async def test_only_a_background_response_is_resumed(client: openai.AsyncOpenAI) -> None:
    made = await client.responses.create(model="say", input="hello there")
    with pytest.raises(openai.BadRequestError):
        await client.responses.retrieve(made.id, stream=True, starting_after=3)


async def test_the_run_goes_on_when_its_client_goes(site: Site, client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="say", messages=HELLO, stream=True, extra_body={"inputs": {"pace": 20}}
    )
    async for chunk in stream:
        run_id = chunk.id.removeprefix("chatcmpl-")
        break
    await stream.close()
    row = await site.until(run_id, "completed")
    assert row["output"] == {"answer": ANSWER}
    journal = await site.serving.surface.store.look.load([run_id])
    assert fold(run_id, journal[run_id].entries).attempts == 1


ANEW = """
name: anew
inputs: {prompt: string}
steps:
  - {id: say, type: llm, provider: echo, model: echo, stream: true, delay_ms: 400,
     prompt: "{{ inputs.prompt }}", reply: "wonderful two three four", fail: transient,
     fail_after: 3,
     fallback: [{provider: echo, model: other, reply: "quite another answer", fail: "",
                 delay_ms: 10}]}
outputs: {answer: {value: "{{ steps.say.text }}"}}
"""


async def test_an_answer_that_is_begun_anew_is_never_mixed_with_the_old_one(
    site: Site, client: openai.AsyncOpenAI
) -> None:
    assert (await site.register(ANEW)).is_success
    chat = await client.chat.completions.create(model="anew", messages=HELLO, stream=True)
    with pytest.raises(openai.APIError) as broken:
        _ = [chunk async for chunk in chat]
    assert broken.value.code == "stream_reset"
    stream = await client.responses.create(
        model="anew", input="hello", stream=True, background=True
    )
    events: list[Any] = [event async for event in stream]
    assert (events[-1].type, events[-1].code) == ("error", "stream_reset")
    assert events[-2].type == "response.output_text.delta"
    made = events[0].response
    await site.until(made.id.removeprefix("resp_"), "completed")
    for after in (4, 5, 6):  # what is left of the old answer proves nothing
        resumed = await client.responses.retrieve(made.id, stream=True, starting_after=after)
        rest: list[Any] = [event async for event in resumed]
        assert [(event.type, event.code) for event in rest] == [("error", "stream_reset")]
    fresh = [event async for event in await client.responses.retrieve(made.id, stream=True)]
    deltas = [event.delta for event in fresh if event.type == "response.output_text.delta"]
    assert "".join(deltas) == "quite another answer"

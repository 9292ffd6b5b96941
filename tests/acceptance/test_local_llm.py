"""The provider `local` against the real model in a real server.

After a restart of the server only "the prefix is kept and the rest is generated" may be asserted: a
prompt read in one batch gives slightly other numbers than the same tokens made one by one.
"""

from __future__ import annotations

import asyncio
import json
import re
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from llm_orchestrator.clock import RealClock
from llm_orchestrator.errors import ProviderInvalidRequest, ProviderTransient
from llm_orchestrator.providers import local
from llm_orchestrator.providers.base import LLMRequest, LLMResponse, Partial, Resume
from llm_orchestrator.providers.http import HttpClient
from llm_orchestrator.providers.local import LocalLLM
from llm_orchestrator.providers.local_server import OnDemand
from tests.acceptance.local_lab import SharedServer, data_dir_with_model

pytestmark = pytest.mark.timeout(600)

STORY = LLMRequest(
    model="local",
    messages=[{"role": "user", "content": "Tell a story about a fox and a river."}],
    temperature=0,
    max_tokens=80,
)
SCHEMA = {
    "type": "object",
    "properties": {
        "mood": {"type": "string", "enum": ["happy", "sad", "angry"]},
        "reason": {"type": "string", "maxLength": 60},
    },
    "required": ["mood", "reason"],
    "additionalProperties": False,
}
COMPLAINT = LLMRequest(
    model="local",
    messages=[{"role": "user", "content": "My parcel came broken. Describe my mood as JSON."}],
    temperature=0,
    max_tokens=120,
    response_schema=SCHEMA,
)


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedServer]:
    server = SharedServer(data_dir_with_model(tmp_path_factory.mktemp("local")))
    yield server
    server.stop()


@pytest.fixture
async def llm(shared_server: SharedServer) -> AsyncIterator[LocalLLM]:
    http = HttpClient(clock=RealClock())
    yield LocalLLM(http, shared_server)
    await http.close()


class Reader:
    """What the engine would keep of a stream. `cut_after` breaks off behind that many chunks."""

    def __init__(self, cut_after: int = 0) -> None:
        self.chunks: list[str] = []
        self.handle: dict[str, Any] = {}
        self.first_handle: Mapping[str, Any] | None = None
        self.cut = asyncio.Event()
        self._cut_after = cut_after

    async def on_chunk(self, text: str) -> None:
        self.chunks.append(text)
        if len(self.chunks) == self._cut_after:
            self.cut.set()
            await asyncio.Event().wait()

    def on_handle(self, handle: Mapping[str, Any]) -> None:
        self.first_handle = self.first_handle or dict(handle)
        self.handle = dict(handle)

    @property
    def text(self) -> str:
        return "".join(self.chunks)

    @property
    def partial(self) -> Partial:
        return Partial(self.text, len(self.chunks), self.handle)


async def ask(llm: LocalLLM, request: LLMRequest) -> tuple[LLMResponse, Reader]:
    reader = Reader()
    return await llm.complete(request, reader.on_chunk, reader.on_handle), reader


async def ask_and_leave(llm: LocalLLM, request: LLMRequest, *, after: int) -> Partial:
    """Start an answer and break the connection after some chunks."""
    reader = Reader(cut_after=after)
    task = asyncio.create_task(llm.complete(request, reader.on_chunk, reader.on_handle))
    await reader.cut.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return reader.partial


def tokens_made(server: SharedServer) -> int:
    """The server's own count of generated tokens."""
    address = server.server.base_url.removesuffix("/v1") + "/metrics"
    text = urllib.request.urlopen(address, timeout=60).read().decode()
    found = re.search(r"^llamacpp:tokens_predicted_total (\d+)", text, re.MULTILINE)
    assert found, text
    return int(found[1])


async def test_the_model_answers_the_same_at_temperature_0_and_costs_nothing(
    llm: LocalLLM,
) -> None:
    first, _ = await ask(llm, STORY)
    again, _ = await ask(llm, STORY)
    assert first.text == again.text
    assert "fox" in first.text
    assert first.model == "smollm2-135m-instruct"
    assert first.usage.output_tokens == 80
    assert first.usage.input_tokens > 10
    assert (first.usage.cost_usd, first.is_priced) == (0.0, True)
    assert first.finish_reason == "length"
    assert first.resumed is None


async def test_a_stream_says_the_same_as_a_whole_answer(llm: LocalLLM) -> None:
    streamed, reader = await ask(llm, STORY)
    whole, _ = await ask(llm, replace(STORY, stream=False))
    assert len(reader.chunks) > 40
    assert reader.text == streamed.text == whole.text


async def test_an_answer_without_a_limit_ends_all_the_same(
    llm: LocalLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "ANSWER_TOKENS_MAX", 5)
    answer, _ = await ask(llm, replace(STORY, max_tokens=None))
    assert (answer.usage.output_tokens, answer.finish_reason) == (5, "length")


async def test_requests_at_the_same_time_do_not_disturb_each_other(llm: LocalLLM) -> None:
    alone, _ = await ask(llm, STORY)
    together = await asyncio.gather(*(ask(llm, STORY) for _ in range(4)))
    assert {answer.text for answer, _ in together} == {alone.text}


async def test_short_streams_one_after_the_other_never_meet_a_closed_connection(
    llm: LocalLLM,
) -> None:
    for _ in range(8):
        answer, _ = await ask(llm, replace(STORY, max_tokens=2))
        assert answer.usage.output_tokens == 2


async def test_a_dropped_stream_is_attached_to_and_nothing_is_made_twice(
    llm: LocalLLM, shared_server: SharedServer
) -> None:
    full, _ = await ask(llm, STORY)
    before = tokens_made(shared_server)
    request = replace(STORY, idempotency_key="run-1/story")
    partial = await ask_and_leave(llm, request, after=10)
    assert full.text.startswith(partial.text)
    answer, reader = await ask(llm, replace(request, partial=partial))
    assert answer.resumed is Resume.ATTACH
    assert answer.text == full.text == partial.text + reader.text
    assert answer.resumed_from_tokens == 10
    assert reader.first_handle is not None
    assert reader.first_handle["kept_chars"] == len(partial.text)
    assert tokens_made(shared_server) - before == 80


async def test_a_finished_answer_that_nobody_read_is_fetched_and_not_made_again(
    llm: LocalLLM, shared_server: SharedServer
) -> None:
    request = replace(STORY, idempotency_key="run-2/story", max_tokens=20)
    full, reader = await ask(llm, request)
    before = tokens_made(shared_server)
    partial = Partial("".join(reader.chunks[:3]), 3, reader.handle)
    answer, _ = await ask(llm, replace(request, partial=partial))
    assert (answer.resumed, answer.text) == (Resume.ATTACH, full.text)
    assert tokens_made(shared_server) == before


@pytest.mark.parametrize("stream", [True, False])
async def test_a_kept_prefix_is_continued_and_never_doubled(
    llm: LocalLLM, shared_server: SharedServer, stream: bool
) -> None:
    _, reader = await ask(llm, STORY)
    partial = Partial("".join(reader.chunks[:30]), 30)
    before = tokens_made(shared_server)
    answer, rest = await ask(llm, replace(STORY, partial=partial, stream=stream))
    assert answer.resumed is Resume.PREFILL
    assert answer.resumed_from_tokens == 30
    assert answer.text.startswith(partial.text)
    assert not answer.text.removeprefix(partial.text).startswith(partial.text[:20])
    assert answer.usage.output_tokens <= 50
    assert tokens_made(shared_server) - before <= 50
    if stream:
        assert partial.text + rest.text == answer.text
    assert len(answer.text) > len(partial.text)


async def test_a_schema_is_kept_also_by_an_answer_that_was_resumed(llm: LocalLLM) -> None:
    full, reader = await ask(llm, COMPLAINT)
    jsonschema.validate(json.loads(full.text), SCHEMA)
    for cut in (1, len(reader.chunks) // 2, len(reader.chunks) - 1):
        partial = Partial("".join(reader.chunks[:cut]), cut)
        answer, _ = await ask(llm, replace(COMPLAINT, partial=partial))
        assert answer.text.startswith(partial.text)
        jsonschema.validate(json.loads(answer.text), SCHEMA)


async def test_a_server_killed_in_the_middle_costs_only_the_rest(
    llm: LocalLLM, shared_server: SharedServer
) -> None:
    request = replace(STORY, idempotency_key="run-3/story")
    reader = Reader(cut_after=20)
    task = asyncio.create_task(llm.complete(request, reader.on_chunk, reader.on_handle))
    await reader.cut.wait()
    shared_server.kill()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    answer, rest = await ask(llm, replace(request, partial=reader.partial))
    assert answer.resumed is Resume.PREFILL
    assert answer.text == reader.text + rest.text
    assert answer.text != reader.text
    # A new server has counted nothing but the rest.
    assert tokens_made(shared_server) <= 60
    assert answer.usage.output_tokens <= 60


async def test_a_server_that_dies_under_a_reader_is_a_transient_error(
    llm: LocalLLM, shared_server: SharedServer
) -> None:
    reader = Reader()

    async def kill_at_first(text: str) -> None:
        await reader.on_chunk(text)
        if len(reader.chunks) == 1:
            shared_server.kill()

    with pytest.raises(ProviderTransient) as caught:
        await llm.complete(replace(STORY, max_tokens=1000), kill_at_first, reader.on_handle)
    assert caught.value.provider == "local"
    answer, _ = await ask(llm, replace(STORY, max_tokens=2))
    assert answer.usage.output_tokens == 2


async def test_a_prompt_beyond_the_context_is_the_authors_mistake(llm: LocalLLM) -> None:
    long = [{"role": "user", "content": "word " * 6000}]
    with pytest.raises(ProviderInvalidRequest, match="context size"):
        await ask(llm, replace(STORY, messages=long))


async def test_what_keeps_the_server_from_starting_is_told_with_its_remedy(
    tmp_path: Path,
) -> None:
    http = HttpClient(clock=RealClock())
    llm = LocalLLM(http, OnDemand(tmp_path))
    with pytest.raises(ProviderInvalidRequest) as caught:
        await ask(llm, STORY)
    assert caught.value.hint == "llmo local pull"
    await llm.close()

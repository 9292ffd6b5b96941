from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from llm_orchestrator.clock import RealClock
from llm_orchestrator.errors import (
    AuthorError,
    OrchestratorError,
    ProviderAuthentication,
    ProviderContentFiltered,
    ProviderInvalidRequest,
    ProviderRateLimited,
    ProviderTimeout,
    ProviderTransient,
    ProviderUnavailable,
)
from llm_orchestrator.model import Json, Usage
from llm_orchestrator.providers.base import LLMRequest, LLMResponse, OnChunk, Partial, Resume
from llm_orchestrator.providers.echo import Echo
from llm_orchestrator.steps.llm import LLM
from tests.unit.steps.support import Room, Scripted, Shelf, config, fail, say

SCHEMA = {
    "type": "object",
    "properties": {"mood": {"enum": ["good", "bad"]}},
    "required": ["mood"],
}


def room(*models: Scripted, **fields: Json) -> Room:
    return Room(providers=Shelf(llms={model.name: model for model in models}), **fields)


def ask(**fields: Json) -> Json:
    return config("llm", **{"provider": "one", "model": "m1", "prompt": "Hi", **fields})


async def test_outputs_come_in_binding_order_and_usage_is_booked() -> None:
    model = Scripted("one", say("Hel", "lo", response_id="r-9"))
    here = room(model)
    outputs = await LLM().execute(here, ask(system="Be brief", temperature=0.5, max_tokens=9))
    assert list(outputs) == ["text", "model", "tokens", "metadata", "data", "tool_calls"]
    assert tuple(outputs) == LLM.outputs
    assert outputs["text"] == here.stream == "Hello"
    assert outputs["tokens"] == 15
    assert outputs["metadata"] == {
        "provider": "one",
        "finish_reason": "stop",
        "response_id": "r-9",
        "usage": Usage(10, 5, 0, 0.01).to_json(),
        "is_priced": True,
        "resumed_from_tokens": 0,
    }
    assert here.usage == [Usage(10, 5, 0, 0.01)]
    request = model.requests[0]
    assert (request.system, request.temperature, request.max_tokens) == ("Be brief", 0.5, 9)
    assert request.messages == [{"role": "user", "content": "Hi"}]
    assert request.idempotency_key == "key-1"


async def test_further_parameters_reach_the_provider() -> None:
    model = Scripted("one", say("ok"))
    await LLM().execute(room(model), ask(top_p=0.9, parameters={"model_family": "x"}))
    assert model.requests[0].extra == {"top_p": 0.9, "model_family": "x"}


async def test_messages_are_sent_as_they_are() -> None:
    model = Scripted("one", say("ok"))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    await LLM().execute(room(model), ask(prompt=None, messages=messages))
    assert model.requests[0].messages == messages


async def test_tool_calls_come_out_and_are_no_answer_to_check() -> None:
    calls = [{"id": "c1", "name": "add", "arguments": {"a": 1}}]
    model = Scripted("one", say(tool_calls=calls, finish_reason="tool_calls"))
    tools = [{"name": "add", "parameters": {"type": "object"}}]
    outputs = await LLM().execute(room(model), ask(tools=tools, response_schema=SCHEMA))
    assert outputs["tool_calls"] == calls
    assert outputs["data"] is None
    assert list(model.requests[0].tools) == tools


async def test_an_answer_that_fits_the_schema_is_parsed() -> None:
    outputs = await LLM().execute(
        room(Scripted("one", say('```json\n{"mood": "good"}\n```'))), ask(response_schema=SCHEMA)
    )
    assert outputs["data"] == {"mood": "good"}


async def test_a_wrong_answer_is_sent_back_with_what_is_wrong_and_each_try_is_booked() -> None:
    model = Scripted("one", say("fine"), say('{"mood": "so so"}'), say('{"mood": "bad"}'))
    here = room(model)
    outputs = await LLM().execute(here, ask(response_schema=SCHEMA))
    assert outputs["data"] == {"mood": "bad"}
    assert outputs["text"] == here.stream == '{"mood": "bad"}'
    assert len(here.usage) == 3
    assert outputs["tokens"] == 45
    assert here.notes["reasks"] == 2
    assert "not JSON" in model.requests[1].messages[-1]["content"]
    assert "so so" in model.requests[2].messages[-1]["content"]
    assert model.requests[2].messages[1] == {"role": "assistant", "content": "fine"}


async def test_reasks_are_bounded_and_the_last_problem_is_told() -> None:
    model = Scripted("one", say("a"), say("b"), say('{"mood": 1}'), say("never asked"))
    here = room(model)
    with pytest.raises(AuthorError, match=r"in 3 tries.*mood"):
        await LLM().execute(here, ask(response_schema=SCHEMA))
    assert len(model.requests) == len(here.usage) == 3


async def test_each_question_has_an_idempotency_key_of_its_own() -> None:
    model = Scripted("one", say("a"), fail(ProviderTransient("down")))
    other = Scripted("two", say("b"), say('{"mood": "bad"}'))
    step = ask(response_schema=SCHEMA, fallback=[{"provider": "two", "model": "m2"}])
    await LLM().execute(room(model, other), step)
    keys = [r.idempotency_key for r in (*model.requests, *other.requests)]
    assert len(set(keys)) == 4
    assert keys[0] == "key-1"


async def test_a_schema_that_points_elsewhere_is_refused_and_never_fetched() -> None:
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            fetched.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"type": "object"}')

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        schema = {"$ref": f"http://127.0.0.1:{server.server_port}/schema.json"}
        with pytest.raises(AuthorError, match="refers to"):
            await LLM().execute(room(Scripted("one", say("{}"))), ask(response_schema=schema))
        server.shutdown()
    assert fetched == []


async def test_a_schema_that_is_none_is_the_authors_mistake() -> None:
    with pytest.raises(AuthorError, match="schema is wrong"):
        await LLM().execute(
            room(Scripted("one", say("{}"))), ask(response_schema={"type": "objekt"})
        )


@pytest.mark.parametrize(
    "error",
    [
        ProviderTransient("503"),
        ProviderRateLimited("429"),
        ProviderTimeout("slow"),
        ProviderUnavailable("breaker"),
        ProviderAuthentication("no key"),
    ],
)
async def test_the_next_provider_is_asked_and_the_first_ones_text_is_void(
    error: OrchestratorError,
) -> None:
    first, second = Scripted("one", fail(error, "half an ")), Scripted("two", say("whole"))
    here = room(first, second)
    step = ask(fallback=[{"provider": "two", "model": "m2", "top_k": 3}], top_p=0.5)
    outputs = await LLM().execute(here, step)
    assert outputs["text"] == here.stream == "whole"
    assert outputs["metadata"]["provider"] == "two"
    assert outputs["model"] == "m2"
    assert here.notes["fallback"] == {
        "to": {"provider": "two", "model": "m2"},
        "failed": [{"provider": "one", "model": "m1", "error": error.kind}],
    }
    assert second.requests[0].extra == {"top_p": 0.5, "top_k": 3}


@pytest.mark.parametrize("error", [ProviderInvalidRequest("bad"), ProviderContentFiltered("no")])
async def test_an_error_that_another_provider_would_repeat_ends_the_step(
    error: OrchestratorError,
) -> None:
    second = Scripted("two", say("never"))
    step = ask(fallback=[{"provider": "two", "model": "m2"}])
    with pytest.raises(type(error)):
        await LLM().execute(room(Scripted("one", fail(error)), second), step)
    assert not second.requests


@pytest.mark.parametrize(
    ("first", "second", "raised"),
    [
        (ProviderRateLimited("a"), ProviderAuthentication("b"), ProviderRateLimited),
        (ProviderAuthentication("a"), ProviderTimeout("b"), ProviderTimeout),
        (ProviderUnavailable("a"), ProviderTransient("b"), ProviderTransient),
        (ProviderUnavailable("a"), ProviderAuthentication("b"), ProviderUnavailable),
        (ProviderAuthentication("a"), ProviderAuthentication("b"), ProviderAuthentication),
    ],
)
async def test_when_all_fail_the_most_hopeful_error_decides(
    first: Exception, second: Exception, raised: type[Exception]
) -> None:
    models = Scripted("one", fail(first)), Scripted("two", fail(second))
    step = ask(fallback=[{"provider": "two", "model": "m2"}])
    with pytest.raises(raised) as caught:
        await LLM().execute(room(*models), step)
    assert type(caught.value) is raised


def resumed(how: Resume, *pieces: str, kept: str = "", tokens: int = 0) -> Scripted:
    async def play(request: LLMRequest, on_chunk: OnChunk, on_handle: Json) -> LLMResponse:
        on_handle({"conversation": "c2", "kept_chars": len(kept)})
        for piece in pieces:
            await on_chunk(piece)
        text = kept + "".join(pieces)
        return LLMResponse(text, "m1", Usage(1, 1), resumed=how, resumed_from_tokens=tokens)

    return Scripted("one", play)


async def partial_of(step: Json) -> Partial:
    """What an attempt that died in the middle of its stream leaves behind."""
    dying = room(
        Scripted("one", fail(KeyboardInterrupt(), "Once ", "upon ", handle={"conversation": "c1"}))
    )
    with pytest.raises(KeyboardInterrupt):
        await LLM().execute(dying, step)
    return dying.interrupted()


async def test_an_interrupted_answer_goes_on_from_its_prefix() -> None:
    model = resumed(Resume.PREFILL, "a time", kept="Once upon ", tokens=2)
    here = room(model, partial=await partial_of(ask()))
    outputs = await LLM().execute(here, ask())
    assert model.requests[0].partial == Partial("Once upon ", 2, {"conversation": "c1"})
    assert outputs["text"] == here.stream == "Once upon a time"
    assert here.resets == 0
    assert here.notes == {"resume": "prefill", "resumed_from_tokens": 2}
    assert outputs["metadata"]["resumed_from_tokens"] == 2
    assert here.handle["handle"] == {"conversation": "c2"}


async def test_a_restart_resets_readers_before_its_first_chunk() -> None:
    model = resumed(Resume.RESTART, "Long ", "ago")
    here = room(model, partial=await partial_of(ask()))
    outputs = await LLM().execute(here, ask())
    assert outputs["text"] == here.stream == "Long ago"
    assert here.resets == 1
    assert here.notes == {"resume": "restart"}
    assert here.handle == {
        "provider": "one",
        "model": "m1",
        "follow_up": [],
        "handle": {"conversation": "c2"},
    }


async def test_a_provider_that_keeps_less_than_was_shown_shows_only_what_it_kept() -> None:
    model = resumed(Resume.ATTACH, "dawn", kept="Once ", tokens=1)
    here = room(model, partial=await partial_of(ask()))
    outputs = await LLM().execute(here, ask())
    assert outputs["text"] == here.stream == "Once dawn"


async def test_a_restart_that_nobody_announced_is_mended_at_the_end() -> None:
    model = Scripted("one", say("New ", "text"))
    here = room(model, partial=await partial_of(ask()))
    outputs = await LLM().execute(here, ask())
    assert outputs["text"] == here.stream == "New text"


async def test_half_an_answer_of_another_model_is_not_continued() -> None:
    model = Scripted("one", say("Fresh"))
    here = room(model, partial=await partial_of(ask()))
    outputs = await LLM().execute(here, ask(model="m7"))
    assert model.requests[0].partial is None
    assert outputs["text"] == here.stream == "Fresh"


async def test_who_left_half_an_answer_is_asked_first() -> None:
    step = ask(provider="zero", model="m0", fallback=[{"provider": "one", "model": "m1"}])
    partial = await partial_of(ask())
    first = Scripted("zero", say("not asked"))
    model = resumed(Resume.PREFILL, "a time", kept="Once upon ", tokens=2)
    outputs = await LLM().execute(room(first, model, partial=partial), step)
    assert outputs["text"] == "Once upon a time"
    assert not first.requests


async def test_a_reask_that_was_cut_off_goes_on_without_asking_the_first_question_again() -> None:
    step = ask(response_schema=SCHEMA)
    dying = room(Scripted("one", say("fine"), fail(KeyboardInterrupt(), '{"mood": ')))
    with pytest.raises(KeyboardInterrupt):
        await LLM().execute(dying, step)
    model = resumed(Resume.PREFILL, '"bad"}', kept='{"mood": ', tokens=1)
    here = room(model, partial=dying.interrupted())
    outputs = await LLM().execute(here, step)
    assert outputs["data"] == {"mood": "bad"}
    assert len(model.requests) == 1
    assert model.requests[0].messages[1] == {"role": "assistant", "content": "fine"}
    assert json.loads(json.dumps(here.handle)) == here.handle


async def test_the_echo_model_answers_and_is_resumed() -> None:
    here = Room(providers=Shelf(llms={"echo": Echo(RealClock())}))
    step = ask(provider="echo", model="e", prompt="tell a long tale")
    assert (await LLM().execute(here, step))["text"] == here.stream == "echo: tell a long tale"
    kept = {"provider": "echo", "model": "e", "follow_up": [], "handle": {}}
    again = Room(providers=here.providers, partial=Partial("echo: tell a", 3, kept))
    outputs = await LLM().execute(again, step)
    assert outputs["text"] == again.stream == "echo: tell a long tale"
    assert again.notes["resume"] == "prefill"

"""A run's events as its readers get them, over HTTP, from the node that drives the run."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import pytest

from llm_orchestrator.client.events import Event, Held, Parser
from llm_orchestrator.engine.replay import fold
from llm_orchestrator.server import streams_sse
from llm_orchestrator.server.streams import Reader
from llm_orchestrator.server.streams_sse import EventStream
from llm_orchestrator.server.streams_watch import WAITING_CHARS_MAX, Watch
from tests.server.support import Site, make_config, serve

TALK = """
name: talk
inputs: {words: {type: string, default: "one two three four five six"}}
steps:
  - {id: first, type: llm, provider: echo, model: echo, stream: true, delay_ms: 5,
     prompt: "{{ inputs.words }}"}
  - {id: second, type: llm, provider: echo, model: echo, stream: false,
     prompt: "then {{ steps.first.text }}"}
outputs: {said: {value: "{{ steps.second.text }}"}}
"""


async def read(
    site: Site, path: str, *, after: str = "", at_most: int = 10_000, **query: Any
) -> list[Event]:
    """Events until the stream ends, or `at_most` of them."""
    found = []
    async for event in reading(site, path, after=after, **query):
        found.append(event)
        if len(found) == at_most:
            break
    return found


async def reading(site: Site, path: str, *, after: str = "", **query: Any) -> AsyncGenerator[Event]:
    headers = {"last-event-id": after} if after else {}
    async with site.http.stream(
        "GET", f"/api/v1/runs/{path}", headers=headers, params=query
    ) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for event in parsed(answer, after):
            yield event


async def parsed(answer: httpx.Response, after: str = "") -> AsyncIterator[Event]:
    parser = Parser(after)
    async for line in answer.aiter_lines():
        for event in parser.feed(line):
            yield event


def texts(events: list[Event]) -> dict[str, str]:
    held = Held()
    for event in events:
        held.apply(event)
    return held.text


async def recorded(site: Site, run_id: str) -> dict[str, str]:
    """Each step's text as the journal has it."""
    journal = await site.serving.surface.store.look.load([run_id])
    done = fold(run_id, journal[run_id].entries).finished
    return {step: each.result["text"] for step, each in done.items() if "text" in each.result}


async def test_a_reader_holds_what_is_recorded_and_every_entry_once(site: Site) -> None:
    assert (await site.register(TALK)).is_success
    run_id = (await site.execute("talk", wait=0))["run_id"]
    events = await read(site, f"{run_id}/events")
    kinds = [event.kind for event in events]
    assert kinds[0] == "accepted"
    assert kinds[-1] == "end"
    assert kinds.count("step_finished") == 2
    assert texts(events) == await recorded(site, run_id)
    seqs = [int(event.id) for event in events if event.id.isdigit()]
    assert seqs == list(range(1, len(seqs) + 1))
    assert events[-1].data["state"] == "completed"
    assert events[-1].data["output"] == {"said": texts(events)["second"]}


MANY = """
name: many
inputs: {topics: {type: array, default: [one, two, three]}, pace: {type: number, default: 5}}
steps:
  - id: all
    type: map
    items: inputs.topics
    steps:
      - {id: say, type: llm, provider: echo, model: echo, stream: true,
         delay_ms: "{{ inputs.pace }}", prompt: "about {{ item }} and more of {{ item }}"}
  - {id: form, type: llm, provider: echo, model: echo, depends_on: all, prompt: fill it in,
     response_schema: {type: object, properties: {a: {type: string}}, required: [a]}}
outputs: {form: {value: "{{ steps.form.data }}"}}
"""
ABSENT = "01920000-0000-7000-8000-000000000009"
GATE = """
name: gate
steps: [{id: gate, type: approval}]
"""


async def started(site: Site, text: str, inputs: Any = None) -> str:
    answer = await site.register(text)
    assert answer.is_success, answer.text
    run_id: str = (await site.execute(answer.json()["name"], inputs, wait=0))["run_id"]
    return run_id


async def test_steps_within_steps_stream_under_their_paths(site: Site) -> None:
    run_id = await started(site, MANY)
    held = texts(await read(site, f"{run_id}/events"))
    assert held == await recorded(site, run_id)
    assert held["all/1/say"] == "echo: about two and more of two"
    assert json.loads(held["form"]) == {"a": "text"}
    one = await read(site, f"{run_id}/steps/all/1/say/events")
    assert texts(one) == {"all/1/say": held["all/1/say"]}
    assert [event.kind for event in one] == ["intent", "chunk", "step_finished", "end"]
    assert one[-1].data["state"] == "completed"
    bare = await read(site, f"{run_id}/events", text=False)
    assert not texts(bare)
    assert bare[-1].kind == "end"


async def test_a_reader_that_comes_back_again_and_again_misses_nothing(site: Site) -> None:
    run_id = await started(site, MANY, {"topics": ["one two three"], "pace": 30})
    found: list[Event] = []
    while not found or found[-1].kind != "end":
        after = found[-1].id if found else ""
        found += await read(site, f"{run_id}/events", after=after, at_most=3)
    assert texts(found) == await recorded(site, run_id)
    seqs = [int(event.id) for event in found if event.id.isdigit()]
    assert seqs == list(range(1, len(seqs) + 1))
    last = {"last-event-id": found[-1].id}
    done = await site.http.get(f"/api/v1/runs/{run_id}/events", headers=last)
    assert done.status_code == 204


async def test_a_node_that_does_not_drive_the_run_tells_what_is_kept(
    postgres_url: str, tmp_path: Path
) -> None:
    (tmp_path / "face").mkdir()
    async with (
        serve(make_config(postgres_url, tmp_path)) as site,
        serve(make_config(postgres_url, tmp_path / "face"), parts="api") as face,
    ):
        run_id = await started(site, MANY, {"topics": ["one"], "pace": 300})
        events = await read(face, f"{run_id}/events")
        assert texts(events) == await recorded(face, run_id)
        said = [event.kind for event in events if event.data.get("step") == "all/0/say"]
        assert said.count("chunk") > 1  # before it was finished
        assert "reset" not in said


async def test_what_is_no_run_or_no_position_is_refused(site: Site) -> None:
    absent = await site.get(f"/runs/{ABSENT}/events")
    assert (absent.status_code, absent.json()["code"]) == (404, "not_found")
    run_id = await started(site, GATE)
    wrong = await site.get(f"/runs/{run_id}/events", after="yesterday")
    assert wrong.status_code == 422


async def test_streams_are_bounded_and_their_places_come_back(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams_sse, "STREAMS_MAX", 1)
    run_id = await started(site, GATE)
    wrong = await site.get(f"/runs/{ABSENT}/events")
    assert wrong.status_code == 404  # it takes no place
    async with aclosing(reading(site, f"{run_id}/events")) as events:
        await anext(events)
        refused = await site.get(f"/runs/{run_id}/events")
        assert (refused.status_code, refused.json()["code"]) == (503, "too_many_streams")
        assert int(refused.headers["retry-after"]) > 0
    assert (await site.post(f"/runs/{run_id}/cancel")).is_success
    while (await site.get(f"/runs/{run_id}/events")).status_code != 200:
        pass  # the server has yet to notice that the reader went


async def test_a_server_that_stops_tells_its_readers_to_come_back(site: Site) -> None:
    run_id = await started(site, GATE)
    found = []
    async for event in reading(site, f"{run_id}/events"):
        found.append(event)
        if event.kind == "waiting":
            stopping = asyncio.create_task(site.serving.drain(0.0))
    assert found[-1].kind == "reconnect"
    assert found[-1].data["reason"] == "stopping"
    assert found[-1].id == found[-2].id
    assert await stopping


async def test_a_reader_that_does_not_keep_up_is_told_to_come_back(site: Site) -> None:
    run_id = await started(site, GATE)
    surface = site.serving.surface
    watch = Watch(surface, run_id, Reader())
    await watch.open()
    try:
        for number in range(WAITING_CHARS_MAX // 1_000 + 1):
            data = {"text": "x" * 1_000, "offset": number * 1_000, "row": 1000, "epoch": 1}
            surface.feed.publish(run_id, "chunk", "say", 1, data)
        events = [event async for event in watch.events()]
    finally:
        watch.close()
    assert [event and event.name for event in events] == ["reconnect"]
    assert events[0] is not None
    assert events[0].data["reason"] == "slow"


async def test_a_quiet_stream_gives_signs_of_life(site: Site) -> None:
    run_id = await started(site, GATE)
    watch = Watch(site.serving.surface, run_id, Reader())
    await watch.open()
    try:
        async for event in watch.events(silence_s=0.001):
            if event is None:
                break
    finally:
        watch.close()


async def test_a_reader_that_takes_nothing_is_cut_off() -> None:
    left: list[bool] = []

    async def pieces() -> AsyncIterator[bytes]:
        while True:
            yield b"piece"

    async def never(*_: Any) -> Any:
        await asyncio.Event().wait()

    async def taken(message: Any) -> None:
        if message["type"] == "http.response.body":
            await never()

    response = EventStream(pieces(), lambda: left.append(True), slow_s=0.001)
    await response({"type": "http"}, never, taken)
    assert left == [True]

"""A run's events as its readers get them, over HTTP, from the node that drives the run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx

from llm_orchestrator.client.events import Event, Held, Parser
from tests.server.support import Site

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


async def reading(site: Site, path: str, *, after: str = "", **query: Any) -> AsyncIterator[Event]:
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
    from llm_orchestrator.engine.replay import fold

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

"""The client against real servers: it finds the one that answers, and starts nothing twice."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from llm_orchestrator.client import ApiError, AsyncClient, Client, Event, Held, NoEndpoint
from tests.server.support import ECHO, LISTENS, TOKEN, Site, make_config, serve

SAYS = """
name: says
inputs: {}
steps:
  - {id: a, type: llm, provider: echo, model: echo, prompt: one two three, stream: true,
     output: [text]}
"""


@pytest.fixture
async def two(postgres_url: str, tmp_path: Path) -> AsyncIterator[tuple[Site, Site]]:
    """Two nodes of one store."""
    places = [tmp_path / name for name in ("a", "b")]
    for place in places:
        place.mkdir()
    async with (
        serve(make_config(postgres_url, places[0])) as first,
        serve(make_config(postgres_url, places[1])) as second,
    ):
        yield first, second


@contextmanager
def black_hole() -> Iterator[str]:
    """An address that takes connections from nobody and refuses none: its queue is full."""
    with closing(socket.socket()) as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        callers = [socket.socket() for _ in range(3)]
        for caller in callers:
            caller.setblocking(False)
            caller.connect_ex(listening.getsockname())
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        for caller in callers:
            caller.close()


def nobody() -> str:
    """An address that refuses."""
    with closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{one.getsockname()[1]}"


async def test_dead_and_black_holed_endpoints_are_passed_by(two: tuple[Site, Site]) -> None:
    with black_hole() as hole:
        endpoints = [hole, nobody(), two[0].serving.url]
        async with AsyncClient(endpoints, token=TOKEN) as client:
            await client.register(ECHO)
            run = await client.execute("echo", {"topic": "whales"}, wait_s=20)
            assert run["output"] == {"said": "whales!"}


async def test_a_node_that_stops_is_left_and_the_run_goes_on(two: tuple[Site, Site]) -> None:
    first, second = two
    urls = [first.serving.url, second.serving.url]
    async with AsyncClient(urls, token=TOKEN) as client:
        await client.register(LISTENS)
        run_id = (await client.execute("listens"))["run_id"]
        await first.until(run_id, "waiting")
        seen: list[Event] = []
        is_open = asyncio.Event()

        async def read() -> None:
            async for event in client.events(run_id):
                seen.append(event)
                is_open.set()

        reading = asyncio.create_task(read())
        await is_open.wait()
        await first.serving.drain(1.0)
        await client.signal(run_id, "word", "hello")
        found = await client.result(run_id, wait_s=30)
        assert found["output"] == {"heard": "hello"}
        await reading
        ids = [event.id for event in seen if event.kind != "end"]
        assert len(ids) == len(set(ids)), "an event came twice"
        entries = [int(each) for each in ids if each.isdigit()]
        assert entries == sorted(entries)
        assert seen[-1].kind == "end"


async def test_asking_again_with_the_same_key_is_the_same_run(two: tuple[Site, Site]) -> None:
    first, second = two
    async with (
        AsyncClient([first.serving.url], token=TOKEN) as here,
        AsyncClient([second.serving.url], token=TOKEN) as there,
    ):
        await here.register(ECHO)
        once = await here.execute("echo", {"topic": "a"}, idempotency_key="k")
        again = await there.execute("echo", {"topic": "a"}, idempotency_key="k")
        assert once["run_id"] == again["run_id"]
        with pytest.raises(ApiError) as raised:
            await there.execute("echo", {"topic": "b"}, idempotency_key="k")
        assert (raised.value.status, raised.value.run_id) == (422, once["run_id"])


async def test_a_stream_is_held_as_it_was_said(two: tuple[Site, Site]) -> None:
    async with AsyncClient([two[1].serving.url], token=TOKEN) as client:
        await client.register(SAYS)
        run_id = (await client.execute("says"))["run_id"]
        held = Held()
        async for event in client.events(run_id):
            held.apply(event)
        result = await client.result(run_id)
        assert held.text["a"] == result["output"]["a"]["text"]


async def test_what_the_server_refuses_is_said_at_once(two: tuple[Site, Site]) -> None:
    async with AsyncClient([two[0].serving.url], token="wrong") as client:
        with pytest.raises(ApiError) as raised:
            await client.workflows()
        assert raised.value.status == 401


async def test_nobody_answers_is_an_error_that_names_everybody() -> None:
    first, second = nobody(), nobody()
    async with AsyncClient([first, second], patience_s=0.3) as client:
        with pytest.raises(NoEndpoint) as raised:
            await client.workflows()
    assert first in raised.value.message
    assert second in raised.value.message


async def test_the_blocking_client_does_the_same(two: tuple[Site, Site]) -> None:
    url = two[0].serving.url

    def work() -> None:
        with Client([nobody(), url], token=TOKEN) as client:
            client.register(ECHO)
            run = client.execute("echo", {"topic": "whales"}, wait_s=20)
            assert run["output"] == {"said": "whales!"}
            assert [each["run_id"] for each in client.runs(workflow="echo")] == [run["run_id"]]
            assert list(client.events(run["run_id"]))[-1].kind == "end"

    await asyncio.to_thread(work)

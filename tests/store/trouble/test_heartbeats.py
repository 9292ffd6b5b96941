"""Beats when the server is slow, dead, demoted or another one; and whose session has closed."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import pytest

from llm_orchestrator.drill.postgres_lab import PostgresServer
from llm_orchestrator.drill.proxy import Proxy
from llm_orchestrator.errors import StoreUnavailable
from llm_orchestrator.store import postgres_connect, postgres_members
from llm_orchestrator.store.base import Member, Pulse
from llm_orchestrator.store.postgres import PostgresStore
from llm_orchestrator.store.postgres_members import PostgresMembers
from tests.store.trouble.support import (
    HANG_S,
    hold_commits,
    opened,
    release_commits,
    set_server,
    through,
    watched,
)


@asynccontextmanager
async def joined(store: PostgresStore, *names: str) -> AsyncIterator[list[PostgresMembers]]:
    """Nodes that have beaten once, each on a connection of its own."""
    found = []
    try:
        for name in names:
            members = await store.members()
            found.append(members)
            await members.join(name, "here", {})
            await members.beat(name, {})
        async with asyncio.timeout(HANG_S):
            yield found
    finally:
        for members in found:
            await members.close()


def of(pulse: Pulse, name: str) -> Member:
    return next(member for member in pulse.members if member.node_id == name)


async def test_others_see_whose_session_has_closed(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    async with opened(postgres_url) as store, joined(store, "a", "b") as (a, b):
        assert of(await a.beat("a", {}), "b").is_connected
        await b.close()
        while of(await a.watch("a"), "b").is_connected:
            pass
        assert not next(n for n in await store.shelf.nodes() if n.node_id == "b").is_connected
        assert await store.is_served()  # by a
        again = await b.beat("b", {})
        assert of(again, "b").is_connected
        assert again.session == (await b.watch("b")).session == 2  # a new one, and it says so
        assert of(await a.watch("a"), "b").is_connected
        async with watched(postgres_server, postgres_url) as witness:
            await witness.see(
                "SELECT pg_terminate_backend(session_pid, 10000) FROM nodes WHERE node_id = 'b'"
            )
        pulse = await a.watch("a")
        assert not of(pulse, "b").is_connected
        assert of(pulse, "b").beat == 2
        with contextlib.suppress(StoreUnavailable):  # unless he has heard it close
            await b.watch("b")
        assert of(await b.beat("b", {}), "b").beat == 3


async def test_nobody_is_buried_who_has_beaten_meanwhile(postgres_url: str) -> None:
    async with opened(postgres_url) as store, joined(store, "a", "b") as (a, b):
        seen = of(await a.watch("a"), "b").beat
        await b.beat("b", {})
        assert not await a.bury("b", seen)
        assert await a.bury("b", seen + 1)
        pulse = await b.beat("b", {})
        assert of(pulse, "b").state == "dead"
        assert [member.node_id for member in (await a.watch("a")).members] == ["a"]


@pytest.mark.parametrize("how", ["frozen", "hole", "killed"])
async def test_a_beat_ends_although_the_server_does_not_answer(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within its own bound, however long others may connect: a lease is short."""
    monkeypatch.setattr(postgres_connect, "CONNECT_S", 100 * HANG_S)
    with PostgresServer() as server, Proxy(server.port) as proxy:
        url = through(server.create_database("store"), proxy.port)
        async with opened(url) as store, joined(store, "a") as (a,):
            before = await a.beat("a", {})
            monkeypatch.setattr(postgres_members, "BEAT_S", 0.3)
            {"frozen": server.freeze, "hole": proxy.black_hole, "killed": server.kill}[how]()
            for _ in range(3):  # on the connection that there was, then on none
                with pytest.raises(StoreUnavailable) as caught:
                    await a.beat("a", {})
                assert caught.value.hint
            if how == "killed":
                server.start()
            server.thaw()
            proxy.heal()
            monkeypatch.setattr(postgres_members, "BEAT_S", HANG_S)
            after = await a.beat("a", {})
            assert of(after, "a").beat > of(before, "a").beat
            assert of(after, "a").is_connected
            # Another server process has no memory of sessions: nobody is judged by them at first.
            assert (after.server == before.server) == (how != "killed")


async def test_a_beat_waits_for_no_standby_and_ends_on_a_read_only_server() -> None:
    with PostgresServer() as server:
        url = server.create_database("store")
        async with (
            opened(url) as store,
            watched(server, url) as witness,
            joined(store, "a") as (a,),
        ):
            await hold_commits(server, witness)
            assert of(await a.beat("a", {}), "a").beat == 2
            assert await a.bury("nobody", 0) is False
            release_commits(server)
            set_server(server, "default_transaction_read_only", "on")
            await witness.until("SHOW transaction_read_only", is_value="on")
            for ask in (a.watch("a"), a.beat("a", {}), a.watch("a")):
                with pytest.raises(StoreUnavailable):
                    await ask
            set_server(server, "default_transaction_read_only", "off")
            await witness.until("SHOW transaction_read_only", is_value="off")
            assert of(await a.beat("a", {}), "a").beat == 3


async def test_a_heart_beats_on_a_thread_while_its_process_is_busy(postgres_url: str) -> None:
    """The event loop of the store is blocked all the while."""
    beats: list[int] = []
    name = urlsplit(postgres_url).path

    async def beat(store: PostgresStore) -> None:
        members = await store.members()
        await members.join(name, "here", {})
        beats.extend([of(await members.beat(name, {}), name).beat for _ in range(5)])
        await members.close()

    async with opened(postgres_url) as store:
        thread = threading.Thread(target=lambda: asyncio.run(beat(store)))
        thread.start()
        thread.join(HANG_S)
    assert beats == [1, 2, 3, 4, 5]

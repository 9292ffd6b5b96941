"""News between nodes: soon when all is well; when it is not, a gap that says: look everywhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from llm_orchestrator.drill.postgres_lab import PostgresServer
from llm_orchestrator.drill.proxy import Proxy, Trap
from llm_orchestrator.store import postgres_bell
from llm_orchestrator.store.base import Batch, News
from llm_orchestrator.store.postgres import PostgresStore
from llm_orchestrator.store.postgres_bell import pack, unpack
from tests.store.support import accepted, new_run
from tests.store.trouble.support import (
    HANG_S,
    Ear,
    Witness,
    note,
    opened,
    post,
    set_server,
    through,
    watched,
)


@asynccontextmanager
async def listening(url: str) -> AsyncIterator[tuple[PostgresStore, Ear]]:
    """A node, and what it hears; its bell is connected."""
    async with opened(url) as store:
        ear = Ear(store)
        await store.open_as_engine()
        await ear.until(lambda news: news.is_gap)
        ear.forget()
        yield store, ear


async def end_bells(witness: Witness) -> None:
    await witness.see(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE application_name LIKE '%bell' AND datname = current_database()"
    )


async def test_news_reach_every_other_store(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    """From a node by its bell, from a client by whatever connection it has."""
    async with (
        asyncio.timeout(HANG_S),
        listening(postgres_url) as (first, heard_first),
        listening(postgres_url) as (_, heard_second),
        opened(postgres_url) as client,
    ):
        run = await accepted(first)
        await heard_second.until(lambda news: news.is_due)
        await post(first, "one", run_id=run.run_id)
        await heard_second.until(lambda news: run.run_id in news.posted)
        heard_first.forget()
        heard_second.forget()
        await post(client, "two", run_id=run.run_id)
        for heard in (heard_first, heard_second):
            news = await heard.until(lambda news: run.run_id in news.posted)
            assert not news.is_gap


async def test_more_news_than_a_message_holds_come_in_several(postgres_url: str) -> None:
    async with (
        asyncio.timeout(HANG_S),
        listening(postgres_url) as (first, _),
        listening(postgres_url) as (_, heard),
    ):
        ids = {new_run(number).run_id for number in range(500_000, 501_000)}
        strange = note("no id " * 2_000)  # nobody can have such a run: it is no news
        changes = (*(note(run_id) for run_id in sorted(ids)), strange)
        await first.commit(Batch(changes=changes))
        news = await heard.until(lambda news: news.posted >= ids)
        assert news.posted == ids
        assert not news.is_gap


def test_messages_fit_whatever_is_in_them() -> None:
    ids = [frozenset(new_run(number).run_id for number in range(k, 2_000, 3)) for k in range(3)]
    news = News(is_due=True, posted=ids[0], freed=ids[1], mended=ids[2])
    for sender in ("node-1", "n" * 200, "ä" * 60, '"\\' * 50):
        words = list(pack(sender, news))
        assert max(len(word.encode()) for word in words) < 8_000
        heard = News()
        for word in words:
            assert unpack(word)[0] == sender
            heard |= unpack(word)[1]
        assert heard == news
    assert list(pack("n", News(is_due=True)))
    assert unpack(next(iter(pack("n", News(is_due=True))))) == ("n", News(is_due=True))


GARBAGE = (
    "",
    "hello",
    "[1, 2]",
    '"text"',
    "{}",
    '{"n": "x"}',
    '{"n": "x", "d": true, "p": 7}',
    "[" * 7_000,
    '{"n": "x", "d": true, "p": [[]]}',
    '{"n": "x", "d": true, "p": "abc"}',
)


async def test_garbage_is_a_gap(postgres_server: PostgresServer, postgres_url: str) -> None:
    async with (
        asyncio.timeout(HANG_S),
        listening(postgres_url) as (_, heard),
        watched(postgres_server, postgres_url) as witness,
    ):
        for text in GARBAGE:
            heard.forget()
            await witness.see("SELECT pg_notify('llm_orchestrator', $1)", text)
            await heard.until(lambda news: news.is_gap)
        assert await witness.sessions("bell") == 1  # it was not disturbed


@pytest.mark.parametrize("how", ["terminated", "reset", "hole", "read-only"])
async def test_a_lost_connection_comes_back_and_reports_a_gap(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_bell, "PING_S", 0.1)
    monkeypatch.setattr(postgres_bell, "ANSWER_S", 0.2)
    with PostgresServer() as server, Proxy(server.port) as proxy:
        url = server.create_database("store")
        async with (
            asyncio.timeout(HANG_S),
            listening(through(url, proxy.port)) as (_, heard),
            listening(url) as (other, _),
            watched(server, url) as witness,
        ):
            run = await accepted(other)
            await heard.until(lambda news: news.is_due)
            heard.forget()
            if how == "terminated":
                await end_bells(witness)
            elif how == "reset":
                proxy.reset()
            elif how == "hole":
                proxy.black_hole()
                proxy.heal(is_old_lost=True)
            else:
                set_server(server, "default_transaction_read_only", "on")
                await witness.until(
                    "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE '%bell'",
                    is_value=0,
                )
                set_server(server, "default_transaction_read_only", "off")
            await heard.until(lambda news: news.is_gap)
            await post(other, "hello", run_id=run.run_id)
            await heard.until(lambda news: run.run_id in news.posted)


async def test_news_that_could_not_be_told_are_told_later(
    postgres_server: PostgresServer, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_bell, "ANSWER_S", 0.2)
    with Proxy(postgres_server.port) as proxy:
        async with (
            asyncio.timeout(HANG_S),
            listening(through(postgres_url, proxy.port)) as (first, _),
            listening(postgres_url) as (_, heard),
        ):
            run = await accepted(first)
            await heard.until(lambda news: news.is_due)
            trap = proxy.set_trap(Trap(run.run_id[:8].encode() + b"-", is_passed=False))
            bell = first._bell
            assert bell is not None
            bell.ring(News(posted=frozenset([run.run_id])))
            await asyncio.to_thread(trap.wait)
            proxy.reset()
            await heard.until(lambda news: run.run_id in news.posted)

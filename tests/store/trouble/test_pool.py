"""Reading when connections are scarce, slow or broken: a bounded wait and one clear error."""

from __future__ import annotations

import asyncio
import socket

import pytest

from llm_orchestrator.drill.postgres_lab import PostgresServer
from llm_orchestrator.drill.proxy import Proxy
from llm_orchestrator.errors import StoreUnavailable
from llm_orchestrator.store import postgres_connect, postgres_read
from tests.store.trouble.support import HANG_S, opened, through, warmed_up, watched


async def test_an_exhausted_pool_names_its_setting_and_counts(
    postgres_server: PostgresServer, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        opened(postgres_url, pool_size=2) as store,
        watched(postgres_server, postgres_url) as witness,
        watched(postgres_server, postgres_url) as holder,
        asyncio.timeout(HANG_S),
    ):
        writer = await warmed_up(store)
        await holder.see("BEGIN")
        await holder.see("LOCK TABLE runs")
        busy = [asyncio.create_task(store.look.run(writer.run_id)) for _ in range(2)]
        await witness.until_waiting("reader", "relation", count=2)
        assert store.exhausted == 0
        samples = {sample.labels: sample.value for sample in store.metrics.read_gauges()}
        assert (samples["busy",], samples["idle",]) == (2, 0)
        monkeypatch.setattr(postgres_read, "WAIT_S", 0.1)
        for count in (1, 2):
            with pytest.raises(StoreUnavailable, match="all 2 connections") as caught:
                await store.look.run(writer.run_id)
            assert caught.value.hint == "raise DB_POOL_SIZE (now 2)"
            assert store.exhausted == count
            assert store.metrics.counters["pool_timeouts_total"].values == {(): count}
        await holder.see("COMMIT")
        for run in await asyncio.gather(*busy):
            assert run is not None
        assert await store.look.run(writer.run_id) is not None  # and goes on
        assert store.exhausted == 2


async def test_a_read_that_hangs_ends(
    postgres_server: PostgresServer, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_read, "READ_S", 0.2)
    with Proxy(postgres_server.port) as proxy:
        async with opened(through(postgres_url, proxy.port)) as store, asyncio.timeout(HANG_S):
            writer = await warmed_up(store)
            await store.look.run(writer.run_id)
            proxy.black_hole()
            with pytest.raises(StoreUnavailable) as caught:
                await store.look.run(writer.run_id)
            assert caught.value.hint
            proxy.heal(is_old_lost=True)
            assert await store.look.run(writer.run_id) is not None


async def test_idle_connections_that_broke_together_cost_one_wait(
    postgres_server: PostgresServer, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_read, "TRUST_S", 0.0)
    monkeypatch.setattr(postgres_read, "ASK_S", 0.2)
    asked: list[object] = []
    ask = postgres_connect.server_of

    async def count(connection: object) -> object:
        asked.append(connection)
        return await ask(connection)

    with Proxy(postgres_server.port) as proxy:
        async with (
            opened(through(postgres_url, proxy.port)) as store,
            watched(postgres_server, postgres_url) as witness,
            watched(postgres_server, postgres_url) as holder,
            asyncio.timeout(HANG_S),
        ):
            writer = await warmed_up(store)
            await holder.see("BEGIN")
            await holder.see("LOCK TABLE runs")
            busy = [asyncio.create_task(store.look.run(writer.run_id)) for _ in range(5)]
            await witness.until_waiting("reader", "relation", count=5)
            await holder.see("COMMIT")
            await asyncio.gather(*busy)
            monkeypatch.setattr(postgres_read, "server_of", count)
            proxy.black_hole()
            proxy.heal(is_old_lost=True)
            assert await store.look.run(writer.run_id) is not None
            assert len(asked) == 1


async def test_whoever_is_cancelled_gives_his_connection_back(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    async with (
        opened(postgres_url, pool_size=1) as store,
        watched(postgres_server, postgres_url) as witness,
        watched(postgres_server, postgres_url) as holder,
        asyncio.timeout(HANG_S),
    ):
        writer = await warmed_up(store)
        await holder.see("BEGIN")
        await holder.see("LOCK TABLE runs")
        busy = asyncio.create_task(store.look.run(writer.run_id))
        await witness.until_waiting("reader", "relation")
        busy.cancel()
        with pytest.raises(asyncio.CancelledError):
            await busy
        await holder.see("COMMIT")
        assert await store.look.run(writer.run_id) is not None


async def test_the_kernel_notices_a_peer_that_is_gone_without_a_word(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    """On both sides: the server's are seconds and milliseconds of the session."""
    async with opened(postgres_url) as store, store._pool.connection() as connection:
        peer = connection._transport.get_extra_info("socket")
        assert peer.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        for name, value in (
            ("TCP_KEEPIDLE", 5),
            ("TCP_KEEPINTVL", 2),
            ("TCP_KEEPCNT", 3),
            ("TCP_USER_TIMEOUT", 10_000),
        ):
            assert peer.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value
        for name, text in (
            ("tcp_keepalives_idle", "5"),
            ("tcp_keepalives_interval", "2"),
            ("tcp_keepalives_count", "3"),
            ("tcp_user_timeout", "10000"),
            ("idle_in_transaction_session_timeout", "1s"),
        ):
            assert await connection.fetchval(f"SHOW {name}") == text

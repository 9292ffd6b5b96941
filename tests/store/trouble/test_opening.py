"""A store that cannot be opened says why, once, with what to do about it, and without a secret."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_orchestrator.drill.postgres_lab import PostgresServer
from llm_orchestrator.errors import (
    ConfigError,
    OrchestratorError,
    StoreAbsent,
    StoreDenied,
    StoreForeign,
    StoreNewer,
    StoreUnavailable,
)
from llm_orchestrator.store import postgres_connect, postgres_schema
from llm_orchestrator.store.postgres_address import parse_address
from tests.postgres import fresh_database
from tests.store.support import Writer, accepted, draft, land
from tests.store.trouble.support import opened, set_server, watched

SECRET = "s3cr3t"


@pytest.fixture(scope="module")
def own_server() -> Iterator[PostgresServer]:
    """A server whose settings may be changed."""
    with PostgresServer() as server:
        yield server


async def refusal(url: str, kind: type[OrchestratorError], *, may_create: bool = True) -> str:
    """The message of the one error that opening raises."""
    with pytest.raises(kind) as caught:
        async with opened(url):
            pass
    error = caught.value
    assert error.hint
    assert SECRET not in f"{error} {error.message} {error.hint} {error!r}"
    return error.message


async def test_a_server_that_is_not_there(own_server: PostgresServer) -> None:
    dead = PostgresServer()
    url = dead.url("store", password=SECRET)
    message = await refusal(url, StoreUnavailable)
    assert f"store on 127.0.0.1:{dead.port}" in message
    assert "111" in message or "refused" in message
    dead.stop()


async def test_a_wrong_password(postgres_server: PostgresServer) -> None:
    postgres_server.create_role("a user", "right")
    url = postgres_server.url(user="a user", password=SECRET)
    assert 'password authentication failed for user "a user"' in await refusal(url, StoreDenied)


async def test_a_user_without_rights(postgres_server: PostgresServer, postgres_url: str) -> None:
    database = postgres_url.rpartition("/")[2]
    postgres_server.create_role("guest", "it's/@: %41")
    url = postgres_server.url(database, user="guest", password="it's/@: %41")
    assert "permission denied for schema public" in await refusal(url, StoreDenied)


async def test_an_unknown_database(postgres_server: PostgresServer) -> None:
    url = postgres_server.url("nowhere", password=SECRET)
    assert 'database "nowhere" does not exist' in await refusal(url, StoreAbsent)


async def test_a_database_without_a_store_is_not_made_by_a_look(postgres_url: str) -> None:
    from llm_orchestrator.clock import RealClock
    from llm_orchestrator.store.postgres import PostgresStore

    store = PostgresStore(postgres_url, node_id="looker", clock=RealClock())
    with pytest.raises(StoreAbsent) as caught:
        await store.open_as_client()
    assert caught.value.hint
    await store.close()


async def test_a_server_that_is_read_only(own_server: PostgresServer) -> None:
    with fresh_database(own_server) as url:
        set_server(own_server, "default_transaction_read_only", "on")
        message = await refusal(url, StoreUnavailable)
        assert "read-only" in message
        set_server(own_server, "default_transaction_read_only", "off")
        async with opened(url) as store:
            await accepted(store)


async def test_a_standby(own_server: PostgresServer) -> None:
    with fresh_database(own_server) as url, own_server.standby() as standby:
        message = await refusal(standby.url(url.rpartition("/")[2]), StoreUnavailable)
        assert "standby" in message


async def test_a_schema_newer_than_the_program(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    async with opened(postgres_url), watched(postgres_server, postgres_url) as witness:
        await witness.see("INSERT INTO schema_version VALUES (999, 0)")
        assert "schema 999" in await refusal(postgres_url, StoreNewer)
        assert await witness.see("SELECT max(version) FROM schema_version") == 999


async def test_an_older_schema_is_migrated_once_whoever_opens(
    postgres_server: PostgresServer,
    postgres_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with opened(postgres_url) as store, watched(postgres_server, postgres_url) as witness:
        writer = await accepted(store)
        before = await witness.see("SELECT max(version) FROM schema_version")
        folder = tmp_path / "migrations"
        shutil.copytree(postgres_schema._FOLDER, folder)
        # Slower than anybody waits for a lock elsewhere; run twice, it would fail.
        monkeypatch.setitem(postgres_connect.SETTINGS, "lock_timeout", "100ms")
        script = "ALTER TABLE runs ADD COLUMN team text; SELECT pg_sleep(0.5);"
        (folder / f"postgres_{before + 1:03d}.sql").write_text(script)
        monkeypatch.setattr(postgres_schema, "_FOLDER", folder)

        async def join() -> Writer:
            async with opened(postgres_url) as another:
                return await accepted(another)

        await asyncio.gather(*(join() for _ in range(3)))
        assert await witness.see(
            "SELECT array_agg(version ORDER BY version) FROM schema_version"
        ) == list(range(1, before + 2))
        # The old program's session goes on: forward migrations only add.
        assert (await land(store, writer.append(draft()))).refused == {}
        assert await witness.entries(writer.run_id) == 2


async def test_a_migration_that_fails_leaves_the_store_as_it_was(
    postgres_server: PostgresServer,
    postgres_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with opened(postgres_url), watched(postgres_server, postgres_url) as witness:
        before = await witness.see("SELECT max(version) FROM schema_version")
        folder = tmp_path / "migrations"
        shutil.copytree(postgres_schema._FOLDER, folder)
        script = "ALTER TABLE runs ADD COLUMN team text; SELECT 1/0;"
        (folder / f"postgres_{before + 1:03d}.sql").write_text(script)
        monkeypatch.setattr(postgres_schema, "_FOLDER", folder)
        assert "division by zero" in await refusal(postgres_url, OrchestratorError)
        columns = "SELECT count(*) FROM information_schema.columns WHERE column_name = 'team'"
        assert await witness.see(columns) == 0
        assert await witness.see("SELECT max(version) FROM schema_version") == before


async def test_tables_that_are_missing(postgres_server: PostgresServer, postgres_url: str) -> None:
    async with opened(postgres_url) as store, watched(postgres_server, postgres_url) as witness:
        writer = await accepted(store)
        await witness.see("DROP TABLE inbox, store")
        assert "store" in await refusal(postgres_url, StoreForeign)
        with pytest.raises(StoreForeign) as caught:
            await land(store, writer.append(draft()))
        assert caught.value.hint


async def test_somebody_elses_tables(postgres_server: PostgresServer, postgres_url: str) -> None:
    async with watched(postgres_server, postgres_url) as witness:
        await witness.see("CREATE TABLE schema_version (version text); ")
        await witness.see("INSERT INTO schema_version VALUES ('V1__init')")
        assert "schema_version" in await refusal(postgres_url, StoreForeign)


@pytest.mark.parametrize(
    "url",
    [
        "mysql://user:s3cr3t@host/database",
        "postgresql://user:s3cr3t@host",
        "postgresql://user:s3cr3t@host/",
        "postgresql://user:s3cr3t@host:port/database",
        "postgresql://user:s3cr3t@host:99999/database",
        "postgresql://user:s3cr3t@host,,other/database",
        "postgresql://user:pa/s3cr3t@host/database",
        "postgresql://user:12/s3cr3t@host",
        "postgresql://user:pa#s3cr3t@host/database",
        "postgresql://user:pa?s3cr3t@host/database",
        "postgresql://user@host?password=s3cr3t",
        "postgresql://[::1/database?password=s3cr3t",
        "postgresql://user:s3cr3t@host/database?sslmode=perhaps",
        "not a url s3cr3t@",
    ],
)
async def test_a_url_of_the_wrong_shape(url: str) -> None:
    await refusal(url, ConfigError)


def test_a_url_may_name_hosts_and_what_other_drivers_want() -> None:
    address = parse_address(
        "postgresql://user:p%40ss@one:5433,[::1],three/data%20base?target_session_attrs=read-write"
        "&connect_timeout=2&keepalives=1&keepalives_idle=1&keepalives_interval=1&keepalives_count=3"
        "&tcp_user_timeout=3000&gssencmode=disable&channel_binding=prefer&sslmode=disable"
    )
    assert address.hosts == (
        "postgresql://user:p%40ss@one:5433/data%20base?sslmode=disable",
        "postgresql://user:p%40ss@[::1]/data%20base?sslmode=disable",
        "postgresql://user:p%40ss@three/data%20base?sslmode=disable",
    )
    assert address.shown == "data base on one:5433,[::1],three"
    careless = parse_address("postgresql://me:p@ss:w%rd@host/database")
    assert careless.hosts == ("postgresql://me:p%40ss%3Aw%25rd@host/database",)
    sockets = parse_address("postgresql:///db?host=/run/a,/run/b&port=1,2&user=me&password=s3cr3t")
    assert len(sockets.hosts) == 2
    assert SECRET not in sockets.shown


async def test_such_urls_are_opened(postgres_server: PostgresServer, postgres_url: str) -> None:
    database = postgres_url.rpartition("/")[2]
    socket = postgres_server.url(database, via="socket")
    options = "target_session_attrs=read-write&connect_timeout=2&keepalives=1&gssencmode=prefer"
    for url in (f"{postgres_url}?{options}", f"{socket}&{options}"):
        async with opened(url) as store:
            await accepted(store)
    postgres_server.create_role("owner", "p@ss/w:rd")
    postgres_server.psql(f'GRANT ALL ON DATABASE "{database}" TO owner')
    postgres_server.psql("GRANT ALL ON SCHEMA public TO owner", database=database)
    postgres_server.psql("GRANT ALL ON ALL TABLES IN SCHEMA public TO owner", database=database)
    async with opened(postgres_server.url(database, user="owner", password="p@ss/w:rd")) as store:
        await accepted(store)

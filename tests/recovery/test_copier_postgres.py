"""Copies on PostgreSQL: other people's databases, long names, missing rights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill.postgres_lab import PostgresServer
from llm_orchestrator.errors import StoreDenied
from llm_orchestrator.store.postgres_copy import PostgresCopier
from tests.recovery.test_carry import opened
from tests.recovery.test_copier import NEW, put, value_of


class Home:
    """A server, and a store in it."""

    def __init__(self, server: PostgresServer, name: str) -> None:
        self.server = server
        self.name = name
        self.url = server.create_database(name)
        self.copier = PostgresCopier(self.url, RealClock())

    def databases(self) -> set[str]:
        return set(self.server.psql("SELECT datname FROM pg_database").splitlines())


@pytest.fixture(params=["short", "n" * 60])
def home(request: pytest.FixtureRequest, postgres_server: PostgresServer) -> Iterator[Home]:
    before = set(postgres_server.psql("SELECT datname FROM pg_database").splitlines())
    made = Home(postgres_server, request.param)
    yield made
    for each in made.databases() - before:
        postgres_server.psql('DROP DATABASE :"name" WITH (FORCE)', name=each)


async def test_what_was_kept_is_found_whatever_the_name(home: Home, tmp_path: Path) -> None:
    async with opened(home.url) as store:
        await put(store, 1)
        dump, _ = await home.copier.dump(tmp_path)
        await put(store, 2)
    old = await (await home.copier.load(dump)).take_over(NEW)
    assert await home.copier.kept() == [old]
    assert await value_of(home.server.url(old)) == 2
    assert await value_of(home.url) == 1
    limit = home.server.psql(
        "SELECT datconnlimit FROM pg_database WHERE datname = :'name'", name=home.name
    )
    assert limit == "-1"
    await home.copier.drop(old)
    assert await home.copier.kept() == []


async def test_databases_of_other_people_stay(home: Home, tmp_path: Path) -> None:
    async with opened(home.url):
        dump, _ = await home.copier.dump(tmp_path)
    theirs = {f"{home.name[:40]}_{word}" for word in ("restore_mine", "restore_0123abcd", "old_a")}
    for name in theirs:
        home.server.create_database(name)
    assert await home.copier.leftovers() == []
    assert await home.copier.kept() == []
    await (await home.copier.load(dump)).discard()
    assert theirs <= home.databases()


async def test_who_may_not_hears_so_before_anything_is_touched(home: Home, tmp_path: Path) -> None:
    async with opened(home.url) as store:
        await put(store, 1)
        dump, _ = await home.copier.dump(tmp_path)
    before = home.databases()
    home.server.psql("CREATE ROLE poor LOGIN CREATEDB")
    try:
        poor = PostgresCopier(home.server.url(home.name, user="poor"), RealClock())
        with pytest.raises(StoreDenied, match="must own"):
            await poor.load(dump)
    finally:
        home.server.psql("DROP ROLE poor")
    assert home.databases() == before
    assert await value_of(home.url) == 1

"""Every finding of a PostgreSQL server, from a report; what a real one reports."""

from __future__ import annotations

from typing import Any

import pytest

from llm_orchestrator.cli.doctor_postgres import (
    Finding,
    check_clock,
    check_durability,
    check_nodes,
    check_pool,
    check_round_trip,
    check_sessions,
    check_version,
)
from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill.postgres_lab import PostgresServer
from llm_orchestrator.errors import StoreUnavailable
from llm_orchestrator.store.base import Member
from llm_orchestrator.store.postgres_report import About, Report, is_pooled, report

ABOUT = About(150004, "15.4", "on", "", 0, True, 100, 20)
GOOD = Report(ABOUT, 0.4, 0.01, is_pooled=False, is_direct_pooled=False, is_same_server=True)


def about(**changes: Any) -> Report:
    return GOOD._replace(about=ABOUT._replace(**changes))


def direct(**changes: Any) -> Finding:
    return check_sessions(GOOD._replace(**changes), has_direct=True)


def member(*, is_here: bool = True) -> Member:
    return Member("n", "local", "alive", 1, is_here, 0, 0)


DIRECT = "LLM_ORCHESTRATOR_DIRECT_URL"
CASES: list[tuple[Finding, str, str, str]] = [
    (check_version(GOOD), "ok", "15.4, a primary", ""),
    (check_version(about(version_number=140011, version="14.11")), "error", "14.11", "15 or later"),
    (check_round_trip(GOOD), "ok", "0.40 ms", ""),
    (check_round_trip(GOOD._replace(round_trip_ms=80.0)), "warning", "each step", "near"),
    (check_clock(GOOD), "ok", "+0.01 s", ""),
    (check_clock(GOOD._replace(drift_s=-3600.0)), "warning", "-3600.00 s", "timedatectl"),
    (check_sessions(GOOD, has_direct=False), "ok", "no pooler", ""),
    (direct(is_pooled=True), "ok", "directly", ""),
    (direct(is_pooled=True, is_direct_pooled=True), "error", "the direct URL leads", DIRECT),
    (direct(is_same_server=False), "error", "another server", DIRECT),
    (
        check_sessions(GOOD._replace(is_direct_pooled=True), has_direct=False),
        "error",
        "the store's URL leads to a pooler",
        DIRECT,
    ),
    (check_durability(GOOD), "ok", "is on, no synchronous standby", ""),
    (check_durability(about(is_durable=False)), "warning", "fsync is off", "fsync = on"),
    (check_durability(about(standby_names="s1")), "warning", "commits wait", "pg_stat"),
    (check_durability(about(standby_names="s1", standbys=1)), "ok", "1 standby server", ""),
    (check_pool(GOOD, 10), "ok", "DB_POOL_SIZE 10: a node opens up to 14", ""),
    (check_pool(GOOD, 90), "warning", "80 of 100 left", "DB_POOL_SIZE"),
    (check_nodes([]), "ok", "none lives", "llmo serve"),
    (check_nodes([member(), member()]), "ok", "2 nodes alive", "llmo nodes list"),
    (check_nodes([member(), member(is_here=False)]), "warning", "1 not connected", "llmo nodes"),
]


@pytest.mark.parametrize(("found", "state", "words", "hint"), CASES)
def test_a_finding_says_what_is_and_what_mends_it(
    found: Finding, state: str, words: str, hint: str
) -> None:
    assert found.state == state
    assert words in found.finding
    assert hint in found.hint


async def test_a_real_server_is_reported_as_it_is(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    found = await report(postgres_url, direct_url="", clock=RealClock())
    version = postgres_server.psql("SHOW server_version_num")
    assert str(found.about.version_number) == version
    assert (found.about.is_durable, found.about.connections_max) == (False, 200)
    assert (found.is_pooled, found.is_direct_pooled, found.is_same_server) == (False, False, True)
    assert abs(found.drift_s) < 60
    assert found.round_trip_ms > 0


async def test_a_server_that_takes_no_writes_is_refused(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    name = postgres_url.rpartition("/")[2]
    alter = 'ALTER DATABASE :"name" SET default_transaction_read_only = on'
    postgres_server.psql(alter, name=name)
    with pytest.raises(StoreUnavailable, match="takes no writes"):
        await report(postgres_url, direct_url="", clock=RealClock())


async def test_a_direct_url_of_another_server_is_noticed(postgres_url: str) -> None:
    with PostgresServer() as other:
        found = await report(postgres_url, direct_url=other.url(), clock=RealClock())
    assert not found.is_same_server


class Answering:
    """A connection that was given one process id when it began, and meets another behind it."""

    def __init__(self, given: int, met: int) -> None:
        self._given, self._met = given, met

    def get_server_pid(self) -> int:
        return self._given

    async def fetchval(self, _: str) -> int:
        return self._met


async def test_a_pooler_shows_by_the_process_behind_it() -> None:
    assert await is_pooled(Answering(given=1_234_567, met=4_711))
    assert not await is_pooled(Answering(given=4_711, met=4_711))

"""`llmo doctor --production`: the document's list is the code's, and each item can fail."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from ruamel.yaml import YAML

from llm_orchestrator.cli.doctor_postgres import Finding
from llm_orchestrator.cli.doctor_production import _alerts, _folder
from llm_orchestrator.cli.production_items import (
    ALERTS,
    ITEMS,
    NOT_CHECKED,
    NOT_OK,
    OK,
    Facts,
    Folder,
    Stored,
    judge,
)
from llm_orchestrator.config import Config
from llm_orchestrator.drill.postgres_lab import PostgresServer
from llm_orchestrator.recovery.patroni import Cluster, Server
from llm_orchestrator.recovery.readiness import Backups, Exposure, Objective
from llm_orchestrator.security.audit_check import Checked
from llm_orchestrator.security.audit_check import Flaw as AuditFlaw
from llm_orchestrator.store.base import Member
from llm_orchestrator.store.postgres_report import About, Follower, Report, Way
from tests.acceptance.cli_support import Shell

ROOT = Path(__file__).resolve().parents[3]
HOUR = 3_600 * 1_000_000
NOW = 1_000_000 * HOUR
ABOUT = About(170002, "17.2", "on", "ANY 1 (b, c)", 1, True, 100, 20)
SERVER = Report(ABOUT, 0.4, 0.01, is_pooled=False, is_direct_pooled=False, is_same_server=True)
BACKUPS = Backups({"taken_at": NOW - HOUR // 2}, {"at": NOW - HOUR, "backup_id": "b"}, {})
PAYING = {"steps": [{"type": "map", "do": [{"type": "llm"}]}]}


def member(name: str, host: str) -> Member:
    return Member(name, "local", "alive", 1, True, 0, 0, {"host": host})


STORED = Stored(
    now_us=NOW,
    nodes=[member("a", "one"), member("b", "two")],
    backups=BACKUPS,
    archive=Exposure("archive", 0.0),
    definitions={"pays": {**PAYING, "budget": {"max_usd": 1}}, "adds": {"steps": []}},
    audit=Checked(1, 5),
    integrity=Finding("integrity", "ok", "whole"),
    server=SERVER,
    way=Way("10.0.0.1", "10.0.0.9", True, (Follower("b", "10.0.0.2", "quorum"),)),
)
CONFIG = Config(
    token="t" * 32,
    backup_schedule="@hourly",
    backup_place="s3://b/p",
    backup_recipients=("age1a", "age1b"),
    archive_place="s3://b/a",
    patroni_urls=("http://a:8008",),
)
LEADER = Server("a-db1", "a", "leader", "running", 0)
TODAY = datetime(2026, 11, 1, tzinfo=UTC)


def drill(status: str, *overrides: str) -> dict[str, Any]:
    finished = (TODAY - timedelta(days=30)).isoformat()
    return {"overrides": overrides, "finished_at": finished, "summary": {"status": status}}


GOOD = Facts(
    config=CONFIG,
    is_server=True,
    is_loopback=True,
    sqlite="3.51.3",
    folder=Folder("/data", "", 10 << 30, "ext4"),
    files_max=65_536,
    memory=(4 << 30, "control group"),
    goal=Objective(rto_s=600, rpo_s=3_600),
    keys=1,
    keys_flaw="",
    place_flaw="",
    archive_flaw="",
    alerts=ALERTS | {"Another"},
    alerts_flaw="",
    stored=STORED,
    cluster=Cluster([LEADER], "a-db1", "strict"),
    drills={"region_failback": drill("missed")},
    now=TODAY,
)


def config(**changes: Any) -> Facts:
    return replace(GOOD, config=replace(CONFIG, **changes))


def stored(**changes: Any) -> Facts:
    return replace(GOOD, stored=replace(STORED, **changes))


def about(**changes: Any) -> Facts:
    return stored(server=SERVER._replace(about=ABOUT._replace(**changes)))


def followers(*found: Follower) -> Facts:
    return stored(way=Way("10.0.0.1", "10.0.0.9", True, found))


def file(facts: Facts = GOOD, **changes: Any) -> Facts:
    """The same on SQLite."""
    assert facts.stored is not None
    changed = replace(facts.stored, server=None, way=None)
    return replace(facts, is_server=False, stored=changed, **changes)


def answers(facts: Facts) -> dict[str, str]:
    return {found.check: found.state for found in judge(facts)}


def test_a_site_that_lacks_nothing_is_ok_but_for_what_nobody_can_see() -> None:
    found = judge(GOOD)
    assert {each.check for each in found if each.state != OK} == {"failure domain"}
    assert answers(GOOD)["failure domain"] == NOT_CHECKED


AWAY = Follower("b", "10.0.0.2", "async")
FAILING: list[tuple[str, Facts, str]] = [
    ("python", replace(GOOD, python=(3, 10)), "3.10"),
    ("token", config(token=""), "no token"),
    ("token", config(token="short"), "5 characters"),
    ("transport", replace(GOOD, is_loopback=False), "plain HTTP"),
    ("file descriptors", replace(GOOD, files_max=1_024), "1024"),
    ("memory", replace(GOOD, memory=(256 << 20, "memory_limit_mb")), "256 MiB"),
    ("spool folder", replace(GOOD, folder=Folder("/d", "no space", 0, "")), "no space"),
    ("spool folder", replace(GOOD, folder=Folder("/d", "", 1 << 20, "ext4")), "0.0 GiB"),
    ("spool folder", replace(GOOD, folder=Folder("/d", "", 9 << 30, "tmpfs")), "tmpfs"),
    (
        "backup schedule",
        replace(config(backup_schedule=""), stored=replace(STORED, backups=Backups({}, {}, {}))),
        "not set",
    ),
    ("backup place", replace(GOOD, place_flaw=None), "this machine only"),
    ("backup place", replace(GOOD, place_flaw="no such bucket"), "no such bucket"),
    ("sealing keys", config(backup_recipients=()), "0 keys"),
    ("sealing keys", config(backup_recipients=("age1a",)), "1 key"),
    ("sealing keys", replace(GOOD, keys=0), "0 keys to open"),
    ("sealing keys", replace(GOOD, keys_flaw="cannot be read"), "cannot be read"),
    ("alert rules", replace(GOOD, alerts=ALERTS - {"NoNodeAlive"}), "NoNodeAlive"),
    ("alert rules", replace(GOOD, alerts=None, alerts_flaw="refused"), "refused"),
    ("store", replace(GOOD, stored=None, store_flaw="does not answer"), "does not answer"),
    ("store", file(config(archive_place="")), "only copy"),
    ("database version", about(version_number=140_000, version="14.0"), "14.0"),
    ("database version", file(sqlite="3.45.1"), "3.45.1"),
    ("durability", about(is_durable=False), "fsync is off"),
    ("durability", about(synchronous_commit="local"), "is local"),
    ("synchronous copy", about(standby_names=""), "is empty"),
    ("synchronous copy", followers(AWAY), "nobody"),
    ("synchronous copy", file(config(archive_mode="async")), "no second place"),
    ("failure domain", followers(), "no server follows"),
    ("failure domain", followers(AWAY._replace(address="127.0.0.1")), "own machine"),
    ("failure domain", followers(AWAY._replace(address="10.0.0.1")), "own machine"),
    ("failure domain", file(config(archive_place="")), "no second copy"),
    (
        "failure domain",
        file(folder=Folder("/d", "", 9 << 30, "ext4", is_archive_here=True)),
        "own device",
    ),
    ("database transport", stored(way=Way("10.0.0.1", "10.0.0.9", False, ())), "plain text"),
    ("connections", stored(server=SERVER._replace(is_direct_pooled=True)), "pooler"),
    ("connections", about(connections=99), "1 of"),
    ("clock", stored(server=SERVER._replace(drift_s=90.0)), "+90.00 s"),
    ("nodes", stored(nodes=[member("a", "one")]), "1 node on 1 machine"),
    ("nodes", stored(nodes=[member("a", "one"), member("b", "one")]), "on 1 machine"),
    ("nodes", file(), "one node"),
    ("backup age", stored(backups=Backups({}, {}, {})), "no backup"),
    ("backup age", stored(backups=replace(BACKUPS, last={"taken_at": NOW - 3 * HOUR})), "3.0 h"),
    ("proved backup", stored(backups=replace(BACKUPS, proved={})), "ever proved"),
    (
        "proved backup",
        stored(backups=replace(BACKUPS, disproved={"at": NOW, "backup_id": "c"})),
        "c is no good",
    ),
    (
        "proved backup",
        stored(backups=replace(BACKUPS, proved={"at": NOW - 200 * HOUR, "backup_id": "b"})),
        "200.0 h",
    ),
    ("archive", replace(GOOD, archive_flaw="no such bucket"), "no such bucket"),
    ("archive", stored(archive=Exposure("archive", None, detail="has a hole")), "has a hole"),
    ("archive", stored(archive=Exposure("archive", 60.0)), "60.0 s"),
    ("archive", file(config(archive_place="")), "not set"),
    ("budgets", stored(definitions={"pays": PAYING}), "without one: pays"),
    ("audit chain", stored(audit=Checked(1, 5, [], [AuditFlaw("a", 2, "is gone")])), "is gone"),
    ("journals", stored(integrity=Finding("integrity", "error", "run r is damaged")), "run r"),
    ("cluster manager", replace(GOOD, cluster=None), "no address"),
    ("cluster manager", replace(GOOD, cluster=Cluster([LEADER], "a-db1", "off")), "for nobody"),
    ("cluster manager", replace(GOOD, cluster=Cluster([LEADER], "", "strict")), "nobody leads"),
    ("drills", replace(GOOD, drills={"one": drill("lost"), "two": drill("passed")}), "in one"),
    ("drills", replace(GOOD, now=TODAY + timedelta(days=63)), "2026-10-02"),
]


@pytest.mark.parametrize(
    ("item", "facts", "words"), FAILING, ids=lambda value: value if isinstance(value, str) else ""
)
def test_each_item_fails_when_its_thing_is_missing(item: str, facts: Facts, words: str) -> None:
    found = next(each for each in judge(facts) if each.check == item)
    assert found.state == NOT_OK
    assert words in found.finding
    assert found.hint


def test_there_is_no_item_that_cannot_fail() -> None:
    assert {item for item, _, _ in FAILING} == set(ITEMS)


UNSEEN: list[tuple[str, Facts]] = [
    ("memory", replace(GOOD, memory=(0, "unknown"))),
    ("backup schedule", config(backup_schedule="")),
    ("alert rules", replace(GOOD, alerts=None)),
    ("clock", file()),
    ("archive", config(archive_place="")),
    ("budgets", stored(definitions={})),
    ("audit chain", stored(audit=Checked())),
    ("failure domain", file()),
    ("cluster manager", config(patroni_urls=())),
    ("drills", replace(GOOD, drills={})),
    ("drills", replace(GOOD, drills={"one": drill("passed", "load.in_flight=2")})),
]


@pytest.mark.parametrize(("item", "facts"), UNSEEN)
def test_what_cannot_be_seen_is_not_vouched_for(item: str, facts: Facts) -> None:
    found = next(each for each in judge(facts) if each.check == item)
    assert found.state == NOT_CHECKED
    assert found.finding
    assert found.hint


def test_without_its_store_nothing_is_said_of_what_is_in_it() -> None:
    found = answers(replace(GOOD, stored=None, store_flaw="gone"))
    behind = ITEMS[ITEMS.index("store") + 1 :]
    assert [found[item] for item in behind] == [NOT_CHECKED] * len(behind)


# -- the document, the rules ----------------------------------------------------------------------


def test_the_document_lists_what_is_checked() -> None:
    text = (ROOT / "docs" / "production_readiness.md").read_text()
    assert tuple(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)) == ITEMS


def test_the_rules_that_must_be_loaded_are_those_of_the_highest_severity() -> None:
    rules = YAML(typ="safe").load(ROOT / "deploy" / "prometheus" / "alerts.yml")
    severe = {
        rule["alert"]
        for group in rules["groups"]
        for rule in group["rules"]
        if str(rule.get("labels", {}).get("severity")).upper() == "P0"
    }
    assert severe == ALERTS


@contextmanager
def prometheus(body: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


async def test_the_rules_are_those_that_prometheus_has_loaded() -> None:
    loaded = b'{"data": {"groups": [{"rules": [{"name": "A"}, {"name": "B"}]}]}}'
    with prometheus(loaded) as url:
        assert await _alerts(url) == (frozenset({"A", "B"}), "")
    with prometheus(b'{"status": "error"}') as url:
        names, flaw = await _alerts(url)
    assert names is None
    assert "KeyError" in flaw
    names, flaw = await _alerts(url)
    assert names is None
    assert "does not tell its rules" in flaw


# -- real folders, real stores --------------------------------------------------------------------


def test_a_folder_that_takes_no_file_is_told(tmp_path: Path) -> None:
    found = _folder(tmp_path / "not" / "yet", str(tmp_path), lambda _: "ext4")
    assert (found.flaw, found.is_archive_here, found.path) == ("", True, str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert "cannot be written" in _folder(Path("/proc/self"), "", lambda _: "proc").flaw


def doctor(shell: Shell, url: str = "", **settings: str) -> tuple[int, dict[str, str], str]:
    """Exit code, the state of each item, and what is said beside."""
    words = ["--store", url] if url else []
    done = shell(*words, "doctor", "--production", "-o", "json", environment=settings)
    return done.code, {row["check"]: row["state"] for row in done.json}, done.err


def test_of_a_real_file_it_says_what_is_and_what_is_not(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    code, found, said = doctor(shell)
    assert code == 1
    assert found["store"] == NOT_OK
    assert found["journals"] == NOT_CHECKED
    assert "what is not checked is not vouched for" in said

    assert shell("run", "hello.yaml").code == 0
    assert shell("backup", "create").code == 0
    _, found, _ = doctor(shell, LLM_ORCHESTRATOR_TOKEN="t" * 32)
    assert {item: found[item] for item in ("token", "journals", "backup age", "durability")} == {
        "token": OK,
        "journals": OK,
        "backup age": OK,
        "durability": OK,
    }
    assert found["store"] == found["budgets"] == found["proved backup"] == NOT_OK


def test_an_archive_on_the_same_device_is_no_second_place(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    place = tmp_path / "archive"
    (tmp_path / "llm-orchestrator.toml").write_text(f'archive_place = "{place}"\n')
    assert shell("run", "hello.yaml").code == 0
    _, found, _ = doctor(shell)
    assert found["store"] == found["synchronous copy"] == found["archive"] == OK
    assert found["failure domain"] == NOT_OK


@pytest.mark.timeout(180)
def test_of_a_real_server_it_says_whether_commits_wait_for_a_standby(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    with PostgresServer() as server:
        url = server.create_database("site")
        assert shell("--store", url, "run", "hello.yaml").code == 0
        _, found, _ = doctor(shell, url)
        assert found["store"] == found["database version"] == found["connections"] == OK
        assert found["database transport"] == found["clock"] == found["journals"] == OK
        assert found["synchronous copy"] == found["nodes"] == NOT_OK
        assert found["durability"] == NOT_OK  # the server of this test may lose its memory

        with server.standby():
            server.psql("ALTER SYSTEM SET synchronous_standby_names = '*'")
            server.psql("SELECT pg_reload_conf()")
            while (
                server.psql("SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'")
                == "0"
            ):
                pass
            _, found, _ = doctor(shell, url)
            assert found["synchronous copy"] == OK
            assert found["failure domain"] == NOT_OK
        while server.psql("SELECT count(*) FROM pg_stat_replication") != "0":
            pass
        _, found, _ = doctor(shell, url)
        assert found["synchronous copy"] == NOT_OK

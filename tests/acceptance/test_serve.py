"""`llmo serve` as a process: where it listens, who may, what its signals do, what systemd hears."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.acceptance.cli_support import Shell, read_until


@pytest.fixture
def llmo(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def url_of(line: str) -> str:
    found = re.search(r'http://[^\s"]+', line)
    assert found, line
    return found.group()


def status_of(url: str, *, token: str = "") -> int:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_without_a_token_it_listens_on_this_machine_only(llmo: Shell) -> None:
    done = llmo("serve", "--host", "0.0.0.0", "--port", "0")
    assert done.code == 2
    assert "no token is set" in done.err
    assert "LLM_ORCHESTRATOR_TOKEN" in done.err
    for words, environment in (
        (("--insecure",), {}),
        ((), {"LLM_ORCHESTRATOR_TOKEN": "s3cret-token"}),
    ):
        llmo.environment |= environment
        process = llmo.start("serve", "--host", "0.0.0.0", "--port", "0", *words)
        read_until(process, "ready: ")
        process.terminate()
        process.communicate(timeout=30)
        assert process.returncode == 0


def test_a_port_that_is_taken_is_said_before_the_store_is_touched(llmo: Shell) -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = llmo("serve", "--port", str(taken.getsockname()[1]))
    assert done.code == 2
    assert "cannot listen on 127.0.0.1" in done.err
    assert not llmo.store.exists()


def test_everything_but_health_and_metrics_wants_the_token(llmo: Shell) -> None:
    llmo.environment["LLM_ORCHESTRATOR_TOKEN"] = "s3cret-token"
    process = llmo.start("serve", "--port", "0")
    try:
        url = url_of(read_until(process, "ready: "))
        for path in ("/health", "/health/live", "/health/ready", "/health/startup", "/metrics"):
            assert status_of(url + path) == 200, path
        assert status_of(url + "/openapi.json") == 200
        for path in ("/api/v1/runs", "/api/v1/workflows", "/api/v1/admin/config", "/v1/models"):
            assert status_of(url + path) == 401, path
            assert status_of(url + path, token="s3cret-tokem") == 401, path
            assert status_of(url + path, token="s3cret-token") == 200, path
    finally:
        process.terminate()
        _, said = process.communicate(timeout=30)
    assert "s3cret-token" not in said


def test_a_worker_answers_for_its_health_only(llmo: Shell) -> None:
    process = llmo.start("serve", "--port", "0", "--serve", "worker")
    try:
        url = url_of(read_until(process, "ready: "))
        assert status_of(url + "/health/ready") == 200
        assert status_of(url + "/metrics") == 200
        assert status_of(url + "/api/v1/runs") == 404
    finally:
        process.terminate()
        process.communicate(timeout=30)
    assert llmo("serve", "--serve", "everything").code == 2


def test_hangup_reads_the_settings_again(llmo: Shell) -> None:
    settings = llmo.folder / "llm-orchestrator.toml"
    settings.write_text("runs_max = 100\n")
    process = llmo.start("serve", "--port", "0")
    try:
        url = url_of(read_until(process, "ready: "))
        settings.write_text('runs_max = 50\nregion = "north"\n')
        process.send_signal(signal.SIGHUP)
        assert "runs_max" in read_until(process, "settings changed")
        assert "region" in read_until(process, "need a restart")
        with urllib.request.urlopen(f"{url}/api/v1/admin/config") as answer:
            shown = {each["name"]: each["value"] for each in json.load(answer)["items"]}
        assert (shown["runs_max"], shown["region"]) == (50, "local")
        settings.write_text('runs_max = "x\n')
        process.send_signal(signal.SIGHUP)
        read_until(process, "settings stay as they were")
        assert status_of(f"{url}/health/live") == 200
    finally:
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == 0


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[socket.socket]:
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(30)
        yield listening


def test_systemd_is_told_how_it_stands(llmo: Shell, supervisor: socket.socket) -> None:
    llmo.environment["NOTIFY_SOCKET"] = supervisor.getsockname()
    llmo.environment["WATCHDOG_USEC"] = "200000"

    def hear(word: str) -> str:
        while True:
            said = supervisor.recv(4096).decode()
            if word in said:
                return said

    process = llmo.start("serve", "--port", "0")
    try:
        assert "STATUS=" in hear("READY=1")
        hear("WATCHDOG=1")
        process.send_signal(signal.SIGHUP)
        assert "MONOTONIC_USEC=" in hear("RELOADING=1")
        hear("READY=1")
    finally:
        process.terminate()
        hear("STOPPING=1")
        process.communicate(timeout=30)
    assert process.returncode == 0


def test_a_second_signal_ends_it_at_once(llmo: Shell) -> None:
    (llmo.folder / "slow.yaml").write_text(
        "name: slow\nsteps:\n  - {id: a, type: llm, provider: echo, model: echo, prompt: hi,"
        " delay_ms: 60000}\n"
    )
    process = llmo.start("serve", "--port", "0", "--grace", "60")
    read_until(process, "ready: ")
    started = llmo("run", "slow.yaml", "--detach")
    assert started.code == 0, started.err
    [run_id] = started.out.split()
    while llmo("runs", "show", run_id, "-o", "json").json["state"] != "running":
        pass
    process.terminate()
    read_until(process, "stopping")
    while process.poll() is None:
        process.terminate()
        try:
            process.wait(0.5)
        except subprocess.TimeoutExpired:
            continue
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert llmo("runs", "show", run_id, "-o", "json").json["state"] == "running"

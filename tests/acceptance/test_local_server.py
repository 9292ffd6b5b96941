"""The server's life: real processes, real signals."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llm_orchestrator.errors import ConfigError
from llm_orchestrator.providers import local_model
from llm_orchestrator.providers.local_server import (
    STATE_FILE,
    LocalServer,
    LocalServerFailed,
    OnDemand,
    discover,
    read_state,
    stop_shared,
)
from tests.acceptance.local_lab import data_dir_with_model, wait_until_gone

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return data_dir_with_model(tmp_path)


@pytest.fixture
async def server() -> AsyncIterator[LocalServer]:
    server = LocalServer()
    yield server
    await server.stop()


async def test_a_private_server_is_found_by_nobody_and_stops(
    data_dir: Path, server: LocalServer
) -> None:
    url = await server.start(data_dir)
    assert await server.start(data_dir) == url
    assert await discover(data_dir) is None
    assert not (data_dir / STATE_FILE).exists()
    pid = server.pid
    await server.stop()
    wait_until_gone(pid)
    assert not server.is_running


async def test_a_shared_server_is_found_until_it_stops(data_dir: Path, server: LocalServer) -> None:
    url = await server.start(data_dir, is_shared=True)
    assert await discover(data_dir) == url
    await server.stop()
    assert await discover(data_dir) is None
    assert not (data_dir / STATE_FILE).exists()


def test_a_detached_server_outlives_who_started_it(data_dir: Path) -> None:
    program = (
        "import asyncio, sys; from pathlib import Path\n"
        "from llm_orchestrator.providers.local_server import LocalServer\n"
        "print(asyncio.run(LocalServer().start(Path(sys.argv[1]), is_detached=True)))"
    )
    command = [sys.executable, "-W", "error", "-c", program, str(data_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    state = read_state(data_dir)
    assert state is not None
    try:
        assert done.stderr == ""
        assert asyncio.run(discover(data_dir)) == done.stdout.strip() == state.base_url
    finally:
        assert asyncio.run(stop_shared(data_dir))
    assert asyncio.run(discover(data_dir)) is None
    assert not asyncio.run(stop_shared(data_dir))


def test_a_private_server_dies_with_its_parent_however_that_dies(data_dir: Path) -> None:
    program = (
        "import asyncio, sys; from pathlib import Path\n"
        "from llm_orchestrator.providers.local_server import LocalServer\n"
        "async def main():\n"
        "    server = LocalServer()\n"
        "    await server.start(Path(sys.argv[1]))\n"
        "    print(server.pid, flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(data_dir)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    os.kill(pid, 0)
    parent.kill()
    parent.communicate()
    wait_until_gone(pid)


def test_sigterm_ends_a_server_started_by_hand(data_dir: Path) -> None:
    model = local_model.require(data_dir)
    command = [sys.executable, "-m", "llm_orchestrator.providers.local_server", "--model"]
    child = subprocess.Popen(
        [*command, str(model)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdout is not None
    line = json.loads(child.stdout.readline())
    assert line["pid"] == child.pid
    child.send_signal(signal.SIGTERM)
    rest, _ = child.communicate(timeout=60)
    assert rest == ""
    assert child.returncode == 0


async def test_a_state_file_of_a_dead_or_reused_pid_is_not_believed(
    data_dir: Path, server: LocalServer
) -> None:
    await server.start(data_dir, is_shared=True)
    state = json.loads((data_dir / STATE_FILE).read_text())
    os.kill(server.pid, signal.SIGKILL)
    wait_until_gone(server.pid)
    assert read_state(data_dir) is not None
    assert await discover(data_dir) is None
    # The pid belongs to somebody else by now: it must not be asked, and above all not be ended.
    bystander = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "input()", stdin=subprocess.PIPE
    )
    (data_dir / STATE_FILE).write_text(json.dumps({**state, "pid": bystander.pid}))
    assert await discover(data_dir) is None
    assert not await stop_shared(data_dir)
    assert bystander.returncode is None
    await bystander.communicate(b"\n")
    (data_dir / STATE_FILE).write_text("not json")
    assert await discover(data_dir) is None


async def test_on_demand_takes_a_shared_server_and_replaces_a_dead_one(data_dir: Path) -> None:
    shared = LocalServer()
    source = OnDemand(data_dir)
    try:
        url = await shared.start(data_dir, is_shared=True)
        assert await source.url() == url
        await shared.stop()
        own = await source.url()
        assert own != url
        assert await source.url() == own
        pid = source.pid
        os.kill(pid, signal.SIGKILL)
        wait_until_gone(pid)
        assert await source.url() != own
    finally:
        await shared.stop()
        await source.close()
    wait_until_gone(source.pid)


async def test_without_the_model_the_command_that_fetches_it_is_named(
    tmp_path: Path, server: LocalServer
) -> None:
    with pytest.raises(ConfigError) as caught:
        await server.start(tmp_path)
    assert caught.value.hint == "llmo local pull"


async def test_without_the_extra_the_command_that_installs_it_is_named(
    data_dir: Path, server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(ConfigError) as caught:
        await server.start(data_dir)
    assert caught.value.hint == "pip install 'llm-orchestrator[local]'"


async def test_without_libgomp_the_system_package_is_named(
    data_dir: Path, server: LocalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "modules"
    broken.mkdir()
    said = "libgomp.so.1: cannot open shared object file: No such file or directory"
    (broken / "xllamacpp.py").write_text(f"raise ImportError({said!r})")
    monkeypatch.setenv("PYTHONPATH", str(broken))
    with pytest.raises(LocalServerFailed, match=r"libgomp\.so\.1") as caught:
        await server.start(data_dir)
    assert caught.value.hint == "apt-get install libgomp1"


async def test_a_model_that_is_no_model_is_reported(tmp_path: Path, server: LocalServer) -> None:
    target = tmp_path / "models" / local_model.MODEL_FILE
    target.parent.mkdir()
    with target.open("wb") as file:
        file.truncate(local_model.MODEL_SIZE)
    with pytest.raises(LocalServerFailed, match=r"llama\.cpp does not start") as caught:
        await server.start(tmp_path)
    assert "llmo local pull" in str(caught.value.hint)


async def test_a_port_in_use_is_reported(data_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LocalServerFailed, match=f"port {port}") as caught:
            await LocalServer(port=port).start(data_dir)
    assert "taken" in str(caught.value.hint)

"""The lab's smallest form, its network, and what holds for every lab: it leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_orchestrator.cli.lab import Version, _spec
from llm_orchestrator.drill.lab import Lab, LabSpec, down, up
from llm_orchestrator.drill.lab import lab as labs
from llm_orchestrator.drill.lab import state as states
from llm_orchestrator.drill.lab.host import MARK
from llm_orchestrator.drill.lab.network import Network, clear, inside
from llm_orchestrator.drill.lab.spec import make_plan, settings
from llm_orchestrator.drill.lab_process import LabError, state, wait
from tests.drill.lab_support import HELLO, llmo, network_of, traces

GREET = """\
from llm_orchestrator import Context, workflow


@workflow
async def greet(ctx: Context) -> str:
    return "hello"
"""
SINGLE = LabSpec(is_single=True)
HANG_S = 60.0
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root: network namespaces")


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where a lab may be made; its path is short, for sockets lie below it."""
    with tempfile.TemporaryDirectory(prefix="lab-", ignore_cleanup_errors=True) as base:
        place = Path(base).resolve() / "lab"
        yield place
        down(place)
        assert not traces(place)


@pytest.fixture
def lab(folder: Path) -> Lab:
    """One node on SQLite."""
    return up(SINGLE, folder, tell=lambda text: None)


def ask(url: str, body: bytes | None = None, kind: str = "application/json") -> Any:
    """The JSON of an answer."""
    request = urllib.request.Request(url, body, {"content-type": kind})
    with urllib.request.urlopen(request, timeout=HANG_S) as answer:
        return json.load(answer)


def until(happens: Any, what: str) -> None:
    assert wait(happens, HANG_S), f"it hangs: {what}"


def test_one_command_makes_it_and_one_leaves_nothing(folder: Path) -> None:
    made = llmo("up", "--single", folder=folder)
    assert made.returncode == 0, made.stderr
    print(f"\n{made.stderr.splitlines()[-1]}")
    (endpoint,) = made.stdout.split()
    ask(f"{endpoint}/api/v1/workflows", HELLO.encode(), "application/yaml")
    run = ask(f"{endpoint}/api/v1/workflows/hello/execute?wait=30", b'{"inputs": {"number": 1}}')
    assert run["state"] == "completed"
    found = json.loads(llmo("status", "-o", "json", folder=folder).stdout)
    assert (found["state"], found["endpoints"]) == ("ready", [endpoint])
    assert all(each["pid"] and not each["restarts"] for each in found["processes"])
    ledger = Lab.load(folder).llm_ledger.read_text()
    assert f"{run['run_id']}/say" in ledger
    assert len(traces(folder).processes) == 3  # with the supervisor
    assert llmo("down", folder=folder).returncode == 0
    assert not traces(folder)
    assert not folder.exists()
    assert llmo("status", folder=folder).returncode == 4


def test_a_lab_that_is_killed_half_made_is_cleared_at_once(folder: Path) -> None:
    def kill(step: str) -> None:
        if pid := Lab.load(folder).supervisor:
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(LabError, match="the supervisor died"):
        up(SINGLE, folder, tell=kill)
    assert not traces(folder)
    assert not folder.exists()


def test_down_while_up_is_under_way_ends_both_in_order(folder: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "llm_orchestrator", "lab", "up", "--single", "--folder", folder],
        stderr=subprocess.PIPE,
        text=True,
    ) as making:
        until(lambda: states.owner(folder) not in (0, making.pid), "a supervisor")
        down(folder)  # at once: a command takes longer to start than a lab
        _, told = making.communicate(timeout=HANG_S)
    assert making.returncode == 1
    assert "the supervisor died" in told or "taken down while it was made" in told
    assert not traces(folder)
    assert not folder.exists()


def test_workflows_in_python_are_executed_and_one_command_undoes_faults(folder: Path) -> None:
    code = folder.with_name("greet.py")
    code.write_text(GREET)
    lab = up(LabSpec(is_single=True, imports=(str(code),)), folder, tell=lambda text: None)
    assert Lab.load(folder).plan == lab.plan
    lab.process("a-node1/node").freeze()
    lab.process("llm/llm").kill(is_held=True)
    assert llmo("calm", folder=folder).returncode == 0
    until(lambda: lab.process("llm/llm").pid, "a process that is released")
    url = f"{lab.endpoints[0]}/api/v1/workflows/greet/execute?wait=30"
    assert ask(url, b'{"inputs": {}}')["output"] == "hello"


def test_a_lab_that_lives_is_left_alone(lab: Lab) -> None:
    with pytest.raises(LabError, match="lives in"):
        up(SINGLE, lab.folder, tell=lambda text: None)
    assert lab.process("a-node1/node").pid
    with pytest.raises(LabError, match="nothing can be cut"):
        _ = lab.hosts["a-node1"].network  # its hosts are loopback addresses


def test_what_is_asked_for_is_what_is_made(folder: Path) -> None:
    def asked(**more: bool) -> LabSpec:
        return _spec(2, Version.V18, **{"is_single": False, "is_loopback": False, **more})

    is_root = os.getuid() == 0
    assert asked() == LabSpec(regions=2, postgres=18, has_network=is_root)
    assert asked(has_barman=True).has_barman
    assert asked(is_loopback=True) == LabSpec(regions=2, postgres=18)
    assert _spec(1, None, is_single=True, is_loopback=False) == SINGLE
    refused = llmo("up", "--single", "--regions", "2", folder=folder)
    assert (refused.returncode, folder.exists()) == (2, False)
    assert "--single" in refused.stderr


def test_what_dies_is_started_again_unless_it_is_held(lab: Lab) -> None:
    node, llm = lab.process("a-node1/node"), lab.process("llm/llm")
    before = node.pid
    node.kill(is_held=True)
    for count in (1, 2):  # twice: by then the node would be back
        llm.kill()
        until(lambda n=count: llm.pid and llm.restarts == n, "a process that is started again")
    assert (node.pid, node.restarts, node.is_held) == (0, 0, True)
    node.release()
    until(lambda: node.pid, "a process that is released")
    assert node.pid != before
    node.tell(TZ="Asia/Kathmandu")
    node.kill()
    until(lambda: node.restarts == 2 and node.pid, "a process that is started again")
    assert b"TZ=Asia/Kathmandu" in Path(f"/proc/{node.pid}/environ").read_bytes()
    node.freeze()
    assert state(node.pid) == "T"
    node.thaw()
    until(lambda: state(node.pid) in "SR", "a process that goes on")


@pytest.mark.parametrize("after", ["down", "up"])
def test_after_kill_9_of_the_lab_itself_the_next_command_clears(lab: Lab, after: str) -> None:
    os.kill(lab.supervisor, signal.SIGKILL)
    until(lambda: not lab.supervisor, "a supervisor that dies")
    assert llmo("status", folder=lab.folder).returncode == 1
    old = lab.folder / "a-node1" / "old"
    old.touch()
    if after == "down":
        assert down(lab.folder)
    else:
        up(SINGLE, lab.folder, tell=lambda text: None)
        assert (old.parent / "runs.db").exists()
        assert not old.exists()
        assert len(traces(lab.folder).processes) == 3
        assert down(lab.folder)
    assert not lab.folder.exists()


def test_a_folder_with_other_peoples_files_is_neither_taken_nor_cleared(folder: Path) -> None:
    folder.mkdir()
    (folder / "letter").write_text("dear")
    with pytest.raises(LabError, match="not empty"):
        up(SINGLE, folder, tell=lambda text: None)
    assert not down(folder)
    assert (folder / "letter").read_text() == "dear"


def test_a_lab_that_does_not_come_up_says_why_and_is_gone(folder: Path) -> None:
    with pytest.raises(LabError, match="PostgreSQL 99 is not here"):
        up(LabSpec(postgres=99), folder, tell=lambda text: None)
    assert not folder.exists()


@needs_root
def test_a_folder_that_postgresql_cannot_reach_is_refused(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    with pytest.raises(LabError, match="cannot reach"):
        up(LabSpec(), folder, tell=lambda text: None)


def test_a_folder_that_was_there_stays_empty(folder: Path) -> None:
    folder.mkdir()
    up(SINGLE, folder, tell=lambda text: None)
    assert down(folder)
    assert list(folder.iterdir()) == []


def test_grandchildren_go_and_a_shell_that_somebody_left_in_the_folder_lives(lab: Lab) -> None:
    command, place = ["sleep", "600"], lab.folder / "llm"
    mark = {**os.environ, MARK: states.lab_id(lab.folder)}
    with (
        subprocess.Popen(command, cwd=place, env=mark) as grandchild,
        subprocess.Popen(command, cwd=place) as shell,
    ):
        try:
            assert down(lab.folder)
            assert grandchild.wait(HANG_S) == -signal.SIGKILL
            assert shell.poll() is None
        finally:
            grandchild.kill()
            shell.kill()


@needs_root
def test_what_a_drill_has_mounted_goes_and_what_was_there_stays(lab: Lab) -> None:
    point, other = lab.folder / "llm" / "a disk", lab.folder.parent / "other"
    for place in (point, other):
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "none", str(place)], check=True)
    try:
        assert down(lab.folder)
        assert other.is_mount()
    finally:
        subprocess.run(["umount", str(other)], check=True)


@needs_root
def test_a_lab_of_somebody_else_is_not_touched(lab: Lab) -> None:
    os.chown(lab.folder, 65_534, -1)
    try:
        with pytest.raises(LabError, match="somebody else"):
            down(lab.folder)
        assert lab.process("llm/llm").pid
    finally:
        os.chown(lab.folder, 0, -1)


def test_ports_that_others_have_are_not_taken() -> None:
    ports = settings()["ports"]
    shifted = labs.free_ports("127.77.255.1", ports)
    assert set(shifted) == set(ports)
    with socket.socket() as taken:
        taken.bind(("127.77.255.1", shifted["node"]))
        others = labs.free_ports("127.77.255.1", ports)
    assert others["node"] != shifted["node"]
    assert {others[what] - ports[what] for what in ports} == {others["node"] - ports["node"]}


# --- the network ---


@pytest.fixture
def network(folder: Path) -> Iterator[Network]:
    """A switch and hosts, and nothing that runs on them."""
    plan = make_plan(
        LabSpec(has_network=True),
        states.lab_id(folder),
        net=1,
        ports=settings()["ports"],
        password="",
    )
    made = Network(states.lab_id(folder), plan.places)
    try:
        made.make()
        yield made
    finally:
        clear(states.lab_id(folder))


def ways(network: Network, one: str, other: str) -> tuple[bool, bool]:
    """Whether `one` is heard by `other`, and the other way round."""
    return network.heard(one, other) == 3, network.heard(other, one) == 3


@needs_root
def test_a_cut_is_a_black_hole_until_it_is_healed(network: Network) -> None:
    a, b, c = "a-db1", "a-db2", "a-db3"
    assert ways(network, a, b) == (True, True)
    network.cut(a)
    assert ways(network, a, b) == (False, False)
    assert ways(network, b, c) == (True, True)
    network.heal_host(a)
    assert ways(network, a, b) == (True, True)
    network.cut(a, hears=False)
    assert ways(network, a, b) == (False, True)
    network.heal()
    network.cut_between(a, b, both_ways=False)
    network.cut_between(c, b)
    assert ways(network, a, b) == (False, True)
    assert ways(network, c, b) == (False, False)
    assert ways(network, a, c) == (True, True)
    network.heal_host(a)
    assert ways(network, a, b) == (True, True)
    assert ways(network, c, b) == (False, False)  # c is still cut from it
    network.heal()
    assert ways(network, c, b) == (True, True)


@needs_root
def test_so_much_is_lost_as_was_asked_for(network: Network) -> None:
    network.lose("a-db1", 30)
    assert 100 < network.heard("a-db1", "a-db2", count=200) < 180  # 140, seven deviations
    assert network.heard("a-db3", "a-db2", count=200) == 200
    network.lose("a-db1", 100)
    assert network.heard("a-db2", "a-db1", count=20) == 0
    network.heal_host("a-db1")
    assert network.heard("a-db1", "a-db2", count=200) == 200


@needs_root
def test_who_looks_inside_comes_back(network: Network, folder: Path) -> None:
    here = network_of("thread-self")
    with inside(f"{states.lab_id(folder)}-client"):
        assert network_of("thread-self") != here
        there = subprocess.run(["cat", "/proc/net/dev"], capture_output=True, text=True, check=True)
    assert network_of("thread-self") == here
    names = {line.partition(":")[0].strip() for line in there.stdout.splitlines()[2:]}
    assert {"lo", "eth0"} <= names
    with pytest.raises(LabError, match="no network namespace"), inside("llmo-no-such"):
        pass
    assert network_of("thread-self") == here


def test_network_namespaces_are_refused_without_root(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: 12_345)
    monkeypatch.setattr(labs, "_prepare", lambda given: labs._Where(given, is_ours=True))
    with pytest.raises(LabError, match="need root"):
        up(LabSpec(has_network=True), folder, tell=lambda text: None)

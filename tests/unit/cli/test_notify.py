"""What systemd hears: over real sockets, with a path and in the abstract namespace."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_orchestrator.cli.notify import Notifier
from llm_orchestrator.clock import RealClock
from llm_orchestrator.config import Supervisor, supervisor

_numbers = itertools.count(1)


class Ear:
    """The supervisor's end."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(20)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)

    def hear(self) -> dict[str, str]:
        """The next message's lines."""
        text = self._socket.recv(4096).decode()
        return dict(line.split("=", 1) for line in text.split("\n"))

    def is_silent(self) -> bool:
        """True when nothing waits to be heard."""
        self._socket.setblocking(False)
        try:
            self._socket.recv(4096)
        except BlockingIOError:
            return True
        return False

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def ear(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ear]:
    if request.param == "abstract" and sys.platform != "linux":
        pytest.skip("only Linux has the abstract namespace")
    name = f"@llmo-test-{os.getpid()}-{next(_numbers)}"
    made = Ear(str(tmp_path / "notify") if request.param == "path" else name)
    yield made
    made.close()


async def test_states_arrive_as_systemd_wants_them(ear: Ear) -> None:
    notifier = Notifier(Supervisor(ear.address), RealClock())
    notifier.ready("node a\non http://h:1")
    assert ear.hear() == {"READY": "1", "STATUS": "node a on http://h:1"}
    before = time.clock_gettime(time.CLOCK_MONOTONIC) * 1e6
    notifier.reloading()
    heard = ear.hear()
    after = time.clock_gettime(time.CLOCK_MONOTONIC) * 1e6
    assert heard["RELOADING"] == "1"
    assert before - 1 <= int(heard["MONOTONIC_USEC"]) <= after
    notifier.ready()
    assert ear.hear() == {"READY": "1"}
    notifier.status("200 runs")
    assert ear.hear() == {"STATUS": "200 runs"}
    notifier.stopping("bye")
    assert ear.hear() == {"STOPPING": "1", "STATUS": "bye"}


class Counted(RealClock):
    """Notes how long was slept, and sleeps not at all; ends after some turns."""

    def __init__(self, turns: int) -> None:
        self.slept: list[float] = []
        self._turns = turns

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        if len(self.slept) == self._turns:
            raise asyncio.CancelledError
        await asyncio.sleep(0)


async def test_the_watchdog_is_fed_twice_as_often_as_it_bites_and_only_while_alive(
    ear: Ear,
) -> None:
    clock = Counted(5)
    lives = iter([True, True, False, False, True])
    notifier = Notifier(Supervisor(ear.address, watchdog_s=6.0), clock)
    with pytest.raises(asyncio.CancelledError):
        await notifier.watch(lambda: next(lives))
    assert clock.slept == [3.0] * 5
    assert [ear.hear() for _ in range(3)] == [{"WATCHDOG": "1"}] * 3
    assert ear.is_silent()


async def test_without_a_supervisor_or_with_a_deaf_one_nothing_happens(tmp_path: Path) -> None:
    clock = Counted(1)
    for address in ("", str(tmp_path / "nobody"), "@nobody-listens-here"):
        notifier = Notifier(Supervisor(address), clock)
        notifier.ready("x")
        notifier.stopping()
        await notifier.watch(lambda: True)
    assert clock.slept == []


def test_the_environment_says_who_supervises_and_the_watchdog_whom_it_means() -> None:
    told = {"NOTIFY_SOCKET": "@s", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "12"}
    assert supervisor(told, pid=12) == Supervisor("@s", 3.0)
    assert supervisor(told, pid=13) == Supervisor("@s", 0.0)
    assert supervisor({"WATCHDOG_USEC": "x"}, pid=1) == Supervisor("", 0.0)

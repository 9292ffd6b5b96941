"""Workflows reach what anybody could reach, and what the operator allows; nothing else, ever."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from llm_orchestrator.errors import ConfigError, OrchestratorError, ProviderInvalidRequest
from llm_orchestrator.model import Json
from llm_orchestrator.steps.action import Action, Actions
from llm_orchestrator.steps.outgoing import Outgoing, is_public
from tests.unit.steps.support import Room, config

PRIVATE = [
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254",
    "100.64.0.1", "192.0.2.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
    "::1", "::", "fe80::1", "fc00::1", "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1",
    "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::a00:1", "2002:7f00:1::", "2002:a00:1::",
    "2001:0:4136:e378:8000:63bf:80ff:fffe",
]  # fmt: skip
PUBLIC = ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"]


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_of_this_machine_and_its_networks_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    with pytest.raises(ProviderInvalidRequest, match="may not reach"):
        Outgoing().check("example.com", address)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are(address: str) -> None:
    Outgoing().check("example.com", address)


def test_what_is_allowed_is_allowed_and_no_more() -> None:
    policy = Outgoing(["10.0.0.0/8", "intranet.example", "fd00::5"])
    policy.check("a", "10.9.9.9")
    policy.check("a", "::ffff:10.9.9.9")
    policy.check("Intranet.Example.", "192.168.1.1")
    policy.check("a", "fd00::5")
    for host, address in (("a", "11.0.0.1x"), ("other.example", "192.168.1.1"), ("a", "fd00::6")):
        with pytest.raises(ProviderInvalidRequest):
            policy.check(host, address)


@pytest.mark.parametrize("entry", ["", "10.0.0.0/33", "http://a", "a b", "10.0.0.1/8"])
def test_an_entry_that_means_nothing_is_refused(entry: str) -> None:
    with pytest.raises(ConfigError, match="outgoing_allow"):
        Outgoing([entry])


class Here:
    """A server on loopback that counts, and may send its visitors on."""

    def __init__(self) -> None:
        self.visits = 0
        self.location = ""
        self.port = 0

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.visits += 1
        if self.location:
            return web.Response(status=302, headers={"location": self.location})
        return web.json_response({"metadata": "secret"})


@pytest.fixture
async def here() -> AsyncIterator[Here]:
    found = Here()
    runner = web.ServerRunner(web.Server(found.handle), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    found.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
    yield found
    await runner.cleanup()


async def get(url: str, *allow: str) -> Json:
    step = config("action", action="http", url=url, timeout=10)
    return await Action(Actions(outgoing_allow=allow)).execute(Room(), step)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "LOCALHOST.", "127.1", "2130706433", "0x7f000001", "0177.0.0.1",
        "127.0.0.1.", "[::ffff:127.0.0.1]", "0", "0.0.0.0", "127.0.1",
    ],
)  # fmt: skip
async def test_no_spelling_of_this_machine_gets_there(here: Here, host: str) -> None:
    with pytest.raises(OrchestratorError) as raised:
        await get(f"http://{host}:{here.port}/latest?token=hidden")
    assert here.visits == 0
    assert "hidden" not in raised.value.message
    if host == "127.0.0.1":
        assert not raised.value.retryable
        assert "outgoing_allow" in (raised.value.hint or "")


async def test_an_allowed_address_is_reached_by_it_and_by_its_name(here: Here) -> None:
    assert (await get(f"http://127.0.0.1:{here.port}/", "127.0.0.1"))["status"] == 200
    assert (await get(f"http://localhost:{here.port}/", "localhost"))["status"] == 200
    assert here.visits == 2


async def test_a_redirect_is_checked_at_each_hop(here: Here) -> None:
    here.location = f"http://127.0.0.2:{here.port}/"
    with pytest.raises(ProviderInvalidRequest, match=r"127\.0\.0\.2"):
        await get(f"http://127.0.0.1:{here.port}/", "127.0.0.1")
    assert here.visits == 1
    here.location = f"http://127.0.0.1:{here.port}/"  # allowed by that name only
    with pytest.raises(ProviderInvalidRequest, match=r"127\.0\.0\.1 leads"):
        await get(f"http://localhost:{here.port}/", "localhost")


class Names:
    """Answers look-ups of `*.test` from a script; the last answer is repeated."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: dict[str, list[list[str]]] = {}
        self.asked: list[str] = []
        monkeypatch.setattr(socket, "getaddrinfo", self.look_up)

    def look_up(self, host: str, port: Any, *rest: Any, **more: Any) -> list[Any]:
        self.asked.append(host)
        script = self.answers[host]
        found = script.pop(0) if len(script) > 1 else script[0]
        return [self._row(address, port) for address in found]

    def _row(self, address: str, port: Any) -> tuple[Any, ...]:
        if ":" in address:
            return socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port, 0, 0)
        return socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    return Names(monkeypatch)


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every address that a socket is asked to connect to; beyond this machine nothing is."""
    found: list[str] = []
    connect = asyncio.SelectorEventLoop.sock_connect

    async def watched(loop: Any, sock: socket.socket, address: Any) -> None:
        found.append(address[0])
        if not ipaddress.ip_address(address[0]).is_loopback:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "nobody is there")
        await connect(loop, sock, address)

    monkeypatch.setattr(asyncio.SelectorEventLoop, "sock_connect", watched)
    return found


@pytest.mark.parametrize(
    "answers",
    [
        ["127.0.0.1", "1.1.1.1"],
        ["1.1.1.1", "127.0.0.1"],
        ["1.1.1.1", "::1", "2606:4700::1111"],
        ["2606:4700::1111", "::ffff:127.0.0.1"],
        ["::ffff:7f00:1"],
        ["64:ff9b::7f00:1", "127.0.0.1"],
        ["1.1.1.1", "169.254.169.254"],
    ],
    ids=" ".join,
)
async def test_of_several_answers_only_public_ones_are_connected_to(
    here: Here, names: Names, attempts: list[str], answers: list[str]
) -> None:
    names.answers["mixed.test"] = [answers]
    with pytest.raises(OrchestratorError) as raised:
        await get(f"http://mixed.test:{here.port}/?token=hidden")
    assert here.visits == 0
    public = [each for each in answers if is_public(ipaddress.ip_address(each))]
    assert set(attempts) == set(public)
    assert raised.value.retryable is bool(public), "one that might answer is worth another try"
    assert "hidden" not in raised.value.message


async def test_each_connection_is_checked_by_its_own_look_up(
    here: Here, names: Names, attempts: list[str]
) -> None:
    """An answer that was good is forgotten: the next request asks, and is checked, again."""
    names.answers["turns.test"] = [["1.1.1.1"], ["127.0.0.1"], ["1.1.1.1"]]
    for _ in range(3):
        with pytest.raises(OrchestratorError):
            await get(f"http://turns.test:{here.port}/")
    assert (here.visits, attempts) == (0, ["1.1.1.1", "1.1.1.1"])
    assert names.asked == ["turns.test"] * 3


async def test_a_redirect_to_a_name_with_other_answers_is_checked(
    here: Here, names: Names, attempts: list[str]
) -> None:
    """The first hop is allowed by its name; the second one has to be public by itself."""
    names.answers["door.test"] = [["127.0.0.1"]]
    names.answers["inside.test"] = [["::ffff:127.0.0.1", "127.0.0.1"]]
    here.location = f"http://inside.test:{here.port}/"
    with pytest.raises(ProviderInvalidRequest, match=r"inside\.test leads to"):
        await get(f"http://door.test:{here.port}/", "door.test")
    assert (here.visits, attempts) == (1, ["127.0.0.1"])


async def test_a_redirect_back_to_a_name_that_has_moved_is_checked(
    here: Here, names: Names, attempts: list[str]
) -> None:
    """The address was allowed, not the name: on the second hop it leads elsewhere."""
    names.answers["moves.test"] = [["127.0.0.1"], ["127.0.0.2", "::1"]]
    here.location = f"http://moves.test:{here.port}/again"
    with pytest.raises(ProviderInvalidRequest, match=r"moves\.test leads to"):
        await get(f"http://moves.test:{here.port}/", "127.0.0.1")
    assert (here.visits, attempts) == (1, ["127.0.0.1"])
    assert names.asked == ["moves.test"] * 2


async def test_a_name_that_changes_its_mind_is_not_followed(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def look_up(host: str, port: Any, *rest: Any, **more: Any) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(ProviderInvalidRequest, match=r"127\.0\.0\.1"):
        await get(f"http://rebind.test:{here.port}/")
    assert here.visits == 0
    assert asked == ["rebind.test"], "looked up once: what was checked is what is connected to"

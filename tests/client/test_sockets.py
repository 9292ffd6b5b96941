"""A host that vanishes behind a kept connection or a name: namespaces, a real black hole."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from llm_orchestrator.client.asynchronous import ANSWER_S, AsyncTransport
from llm_orchestrator.client.sockets import LOST_S
from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill.cluster_names import Names
from llm_orchestrator.drill.lab import network
from llm_orchestrator.drill.lab.spec import Place
from llm_orchestrator.drill.lab.state import lab_id

PORT = 8080
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root: network namespaces")
pytestmark = [pytest.mark.serial, needs_root]


class Answer(BaseHTTPRequestHandler):
    """Says at which address it was asked, and keeps the connection."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        said = str(self.connection.getsockname()[0]).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    """Listens with a socket that was opened on another host."""

    daemon_threads = True

    def __init__(self, place: Place) -> None:
        super().__init__((place.address, PORT), Answer, bind_and_activate=False)
        self.socket.close()
        with network.inside(place.namespace):
            self.socket = socket.socket()
        self.server_bind()
        self.server_activate()
        Thread(target=self.serve_forever, daemon=True).start()

    def server_bind(self) -> None:
        self.socket.bind(self.server_address)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[network.Network, list[Place]]]:
    """A client's host and two that serve."""
    ident = lab_id(tmp_path)
    places = [
        Place(name, "", f"10.78.0.{number}", f"{ident}-{name}", ())
        for number, name in enumerate(("client", "one", "two"), 1)
    ]
    made = network.Network(ident, places)
    servers: list[Server] = []
    try:
        made.make()
        servers += [Server(place) for place in places[1:]]
        yield made, places
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
        network.clear(ident)


def test_a_kept_connection_to_a_host_that_is_gone_is_left_soon(
    hosts: tuple[network.Network, list[Place]],
) -> None:
    made, places = hosts
    clock = RealClock()

    async def work() -> float:
        urls = [f"http://{place.address}:{PORT}" for place in places[1:]]
        async with AsyncTransport(urls) as client:
            assert await client.request("GET", "/") == places[1].address
            made.cut("one")
            began_s = clock.monotonic()
            assert await client.request("GET", "/", patience_s=60.0) == places[2].address
            return clock.monotonic() - began_s

    with network.inside(places[0].namespace):
        took_s = asyncio.run(work())
    assert LOST_S * 0.5 < took_s < ANSWER_S * 0.7, "the kernel gives it up, no time limit of ours"


ASKS = """\
import sys
from llm_orchestrator.client import Client
with Client([sys.argv[1]], patience_s=20) as client:
    for _ in sys.stdin:
        print(client.request("GET", "/"), flush=True)
"""


def test_a_name_that_is_changed_counts_at_once(
    hosts: tuple[network.Network, list[Place]], tmp_path: Path
) -> None:
    made, (here, one, two) = hosts
    names = Names(tmp_path / "hosts")
    names.put("service.test", one.address)
    words = [*network.prefix(here), *names.before(), sys.executable, "-c", ASKS]
    with subprocess.Popen(
        [*words, f"http://service.test:{PORT}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    ) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        client.stdin.write("\n")
        client.stdin.flush()
        assert client.stdout.readline().strip() == one.address
        made.cut("one")
        names.put("service.test", two.address)
        client.stdin.write("\n")
        client.stdin.close()
        assert client.stdout.readline().strip() == two.address
    assert "service.test" not in Path("/etc/hosts").read_text()

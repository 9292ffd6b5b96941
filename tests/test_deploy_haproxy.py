"""HAProxy as it is shipped, in front of three members: who is primary decides where one gets to.

The file is the shipped one; addresses of this machine stand in the place of the containers' names.
The members are stand-ins: Patroni's answer to `/primary`, and a port that says whose it is.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer

import pytest

from llm_orchestrator.drill.lab.spec import settings
from tests.deploying import CLUSTER

LONG_S = 30.0
"""More than three checks that fail, and far less than `idle_s`."""


class Server(ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True


class Member:
    """One member: its name at its database's port, `is_primary` at Patroni's."""

    def __init__(self, name: str) -> None:
        self.name, self.is_primary = name, False
        member = self

        class Patroni(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                is_it = member.is_primary and self.path == "/primary"
                self.send_response(HTTPStatus.OK if is_it else HTTPStatus.SERVICE_UNAVAILABLE)
                self.end_headers()

            do_OPTIONS = do_GET  # noqa: N815

            def log_message(self, *_words: object) -> None:
                """It says nothing."""

        class Database(BaseRequestHandler):
            def handle(self) -> None:
                self.request.sendall(member.name.encode())
                self.request.recv(1)  # it stays until the other side goes

        self.patroni = ThreadingHTTPServer(("127.0.0.1", 0), Patroni)
        self.database = Server(("127.0.0.1", 0), Database)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        servers = (self.patroni, self.database)
        threads = [threading.Thread(target=each.serve_forever, args=(0.05,)) for each in servers]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            for each, thread in zip(servers, threads, strict=True):
                each.shutdown()
                thread.join()
                each.server_close()


def file_for(members: list[Member], port: int) -> str:
    """The shipped file, on this machine."""
    ports, text = settings()["ports"], (CLUSTER.parent / "haproxy.cfg").read_text()
    text = text.replace(f"bind *:{ports['postgres']}", f"bind 127.0.0.1:{port}")
    for member in members:
        name = member.name
        there = f"server {name} {name}:{ports['postgres']} check port {ports['patroni']} "
        database, patroni = member.database.server_address[1], member.patroni.server_port
        assert there in text
        here = f"server {name} 127.0.0.1:{database} check port {patroni} "
        text = text.replace(there, here)
    return text


def reach(port: int) -> tuple[str, socket.socket]:
    """Who answers, and the session, which the caller closes. "" for nobody."""
    session = socket.create_connection(("127.0.0.1", port), timeout=LONG_S)
    with contextlib.suppress(ConnectionError):
        return session.recv(100).decode(), session
    return "", session


def reach_one(port: int, name: str, process: subprocess.Popen[bytes]) -> socket.socket:
    """A session with the member `name`, as soon as one gets there."""
    until = time.monotonic() + LONG_S
    while time.monotonic() < until:
        assert process.poll() is None
        with contextlib.suppress(ConnectionError):
            found, session = reach(port)
            if found == name:
                return session
            session.close()
        time.sleep(0.05)
    raise AssertionError(f"nobody got to {name}")


def test_one_gets_to_the_primary_and_no_session_outlives_its_being_one(tmp_path: Path) -> None:
    program = shutil.which("haproxy")
    if program is None:
        pytest.skip("haproxy is not on this machine (scripts/tools)")
    members = [Member(f"postgres{number}") for number in (1, 2, 3)]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = int(taken.getsockname()[1])
    (tmp_path / "haproxy.cfg").write_text(file_for(members, port))
    with contextlib.ExitStack() as stack:
        for member in members:
            stack.enter_context(member.running())
        members[0].is_primary = True
        words = [program, "-db", "-f", str(tmp_path / "haproxy.cfg")]
        process = stack.enter_context(subprocess.Popen(words, stderr=subprocess.DEVNULL))
        stack.callback(process.terminate)
        with reach_one(port, "postgres1", process) as old:
            members[0].is_primary, members[2].is_primary = False, True
            assert old.recv(1) == b""
        reach_one(port, "postgres3", process).close()
        members[2].is_primary = False
        began = time.monotonic()
        while time.monotonic() < began + LONG_S:
            with contextlib.suppress(ConnectionError):
                name, session = reach(port)
                session.close()
                if name == "":
                    break
        else:
            raise AssertionError("it leads to somebody who is no primary")

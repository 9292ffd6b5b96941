"""What the proxy does to a connection, seen from both ends of real sockets."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from llm_orchestrator.drill.proxy import Proxy, Trap

LIMIT_S = 10.0


class Pair:
    """A client, the proxy, and the server's end of the client's connection."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.listener.settimeout(LIMIT_S)
        self.proxy = stack.enter_context(Proxy(self.listener.getsockname()[1]))

    def connect(self) -> tuple[socket.socket, socket.socket]:
        client = self._stack.enter_context(self.dial())
        server, _ = self.listener.accept()
        server.settimeout(LIMIT_S)
        return client, self._stack.enter_context(server)

    def dial(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.proxy.port), LIMIT_S)


@pytest.fixture
def pair() -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(stack)


def receive(sock: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count and (data := sock.recv(count - len(found))):
        found += data
    return found


def is_silent(sock: socket.socket) -> bool:
    """Nothing has come, not even a closing. What would come has had the time of a round trip."""
    sock.settimeout(0.1)
    try:
        sock.recv(1)
    except TimeoutError:
        return True
    finally:
        sock.settimeout(LIMIT_S)
    return False


def test_bytes_and_closings_pass_both_ways(pair: Pair) -> None:
    client, server = pair.connect()
    client.sendall(b"up")
    assert server.recv(10) == b"up"
    server.sendall(b"down")
    assert client.recv(10) == b"down"
    server.close()
    assert client.recv(10) == b""
    client, server = pair.connect()
    client.close()
    assert server.recv(10) == b""
    assert pair.proxy.accepted == 2


def test_a_black_hole_keeps_bytes_and_closings_back_until_it_is_healed(pair: Pair) -> None:
    client, server = pair.connect()
    pair.proxy.black_hole()
    client.sendall(b"one")
    client.sendall(b"two")
    client.close()
    server.sendall(b"never mind")
    assert is_silent(server)
    pair.proxy.heal()
    assert receive(server, 6) == b"onetwo"
    assert server.recv(10) == b""


def test_a_black_hole_may_be_one_way(pair: Pair) -> None:
    client, server = pair.connect()
    pair.proxy.black_hole("down")
    client.sendall(b"up")
    assert server.recv(10) == b"up"
    server.sendall(b"down")
    assert is_silent(client)
    pair.proxy.heal()
    assert client.recv(10) == b"down"


def test_a_black_hole_swallows_new_connections_too(pair: Pair) -> None:
    pair.proxy.black_hole()
    client, server = pair.connect()
    client.sendall(b"up")
    assert is_silent(server)


def test_old_connections_may_stay_in_their_hole(pair: Pair) -> None:
    old, old_server = pair.connect()
    pair.proxy.black_hole()
    old.sendall(b"lost")
    pair.proxy.heal(is_old_lost=True)
    new, new_server = pair.connect()
    old.close()
    new.sendall(b"new")
    assert new_server.recv(10) == b"new"
    assert is_silent(old_server)
    pair.proxy.heal()
    assert old_server.recv(10) == b"lost"
    pair.proxy.reset()
    with pytest.raises(ConnectionResetError):
        new.recv(10)


def test_a_reset_breaks_both_sides_and_new_connections_are_taken(pair: Pair) -> None:
    client, server = pair.connect()
    pair.proxy.reset()
    for sock in (client, server):
        with pytest.raises(ConnectionResetError):
            sock.recv(10)
    client, server = pair.connect()
    client.sendall(b"up")
    assert server.recv(10) == b"up"


def test_a_delay_keeps_the_order_when_it_ends(pair: Pair) -> None:
    client, server = pair.connect()
    pair.proxy.delay(0.2)
    client.sendall(b"slow ")
    assert is_silent(server)
    pair.proxy.delay(0)
    client.sendall(b"fast")
    assert receive(server, 9) == b"slow fast"


@pytest.mark.parametrize("is_passed", [True, False])
def test_a_trap_strikes_one_connection_when_its_bytes_come(pair: Pair, is_passed: bool) -> None:
    client, server = pair.connect()
    other, other_server = pair.connect()
    trap = pair.proxy.set_trap(Trap(b"now", is_passed=is_passed))
    client.sendall(b"not yet")
    assert server.recv(10) == b"not yet"
    assert not trap.sprung.is_set()
    client.sendall(b"and now!")
    trap.wait()
    if is_passed:
        assert server.recv(10) == b"and now!"
    server.sendall(b"answer")
    assert is_silent(server)
    assert is_silent(client)
    other.sendall(b"now")
    assert other_server.recv(10) == b"now"
    pair.proxy.heal()
    assert client.recv(10) == b"answer"
    if not is_passed:
        assert server.recv(10) == b"and now!"


def test_a_server_that_refuses_breaks_the_client(pair: Pair) -> None:
    pair.listener.close()
    with pytest.raises(ConnectionResetError), pair.dial() as client:
        client.recv(10)


def test_nothing_is_left_of_a_proxy() -> None:
    before = threading.active_count()
    with ExitStack() as stack:
        pair = Pair(stack)
        pair.connect()
        pair.proxy.black_hole()
        client, _ = pair.connect()
        client.close()
        port = pair.proxy.port
    assert threading.active_count() == before
    with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
        probe.connect(("127.0.0.1", port))

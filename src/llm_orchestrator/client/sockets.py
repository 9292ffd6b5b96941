"""How the client's connections notice that the other end is gone without a word.

A connection that is kept for the next call knows nothing of a host, or a route, that has vanished
since: what is sent into it is never acknowledged, and TCP goes on for many minutes. A time limit
for the answer is no remedy, for an answer may well take long. So the kernel is told to give up
what nobody acknowledges, and to ask on connections that are silent; the answer's own time is free.
"""

from __future__ import annotations

import socket

import httpx

LOST_S = 2.0
"""Sent, or asked for, and not acknowledged for so long: the connection breaks."""
_IDLE_S = 1
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=100)
"""Who waits for the end of a run holds a connection; how many wait is the caller's affair."""


def socket_options() -> list[tuple[int, int, int]]:
    """For every connection; what a system does not have is left out."""
    tcp = {
        "TCP_NODELAY": 1,
        "TCP_USER_TIMEOUT": int(LOST_S * 1000),
        "TCP_KEEPIDLE": _IDLE_S,
        "TCP_KEEPINTVL": _IDLE_S,
        "TCP_KEEPCNT": int(LOST_S),
    }
    found = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    for name, value in tcp.items():
        if hasattr(socket, name):
            found.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    return found

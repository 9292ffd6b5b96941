"""Talking HTTP to the lab's hosts from outside, by sockets of the client's namespace."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

import aiohttp

from llm_orchestrator.drill.lab.network import inside
from llm_orchestrator.drill.lab.spec import Plan


def client_namespace(plan: Plan) -> str:
    """Where clients are; "" is the machine itself."""
    return next((place.namespace for place in plan.places if place.name == "client"), "")


def connector(plan: Plan) -> aiohttp.TCPConnector:
    """For an aiohttp session whose connections begin in the lab's client host."""
    namespace = client_namespace(plan)

    def make(info: tuple[Any, ...]) -> socket.socket:
        with inside(namespace):
            made = socket.socket(info[0], info[1], info[2])
        made.setblocking(False)
        return made

    return aiohttp.TCPConnector(socket_factory=make, limit=0)


def client_of(plan: Plan, *, timeout_s: float) -> aiohttp.ClientSession:
    """A session that asks the lab's hosts; each request has `timeout_s`."""
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    return aiohttp.ClientSession(connector=connector(plan), timeout=timeout)


async def get(client: aiohttp.ClientSession, url: str) -> tuple[int, Mapping[str, Any]]:
    """Status and JSON of an answer; 0 when there is none, {} when it is no object."""
    try:
        async with client.get(url) as answer:
            try:
                body = await answer.json(content_type=None)
            except ValueError:
                body = {}
            return answer.status, body if isinstance(body, dict) else {}
    except (aiohttp.ClientError, OSError, TimeoutError):
        return 0, {}

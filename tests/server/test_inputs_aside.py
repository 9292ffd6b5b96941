"""Checking inputs that may be dear to check: the event loop stays free meanwhile."""

from __future__ import annotations

import asyncio
import threading

import pytest

from llm_orchestrator.language import sandbox
from llm_orchestrator.model import Json
from tests.server.support import ECHO, Site

HANG_S = 60.0
DEAR = "(a+)+b"


class Gate:
    """Questions for a child begin, and are answered only when the gate is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = asyncio.Event()
        self.is_open = threading.Event()
        loop, ask = asyncio.get_running_loop(), sandbox._children.ask

        def ask_at_the_gate(data: bytes) -> object:
            loop.call_soon_threadsafe(self.begun.set)
            assert self.is_open.wait(HANG_S), "nobody opened: the loop was not free"
            return ask(data)

        monkeypatch.setattr(sandbox._children, "ask", ask_at_the_gate)


@pytest.mark.parametrize("way", ["execute", "fork"])
async def test_a_dear_pattern_leaves_the_loop_free(
    site: Site, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = f"inputs:\n  code: {{type: string, default: aab, pattern: '{DEAR}'}}\n"
    assert (await site.register(ECHO.replace("inputs:\n", code, 1))).status_code == 201
    body: dict[str, Json] = {"inputs": {"topic": "x", "code": "aaab"}}
    path = "/workflows/echo/execute"
    if way == "fork":
        first = await site.execute("echo", {"topic": "x"})
        path, body = f"/runs/{first['run_id']}/fork", {"step": "say", **body}
    gate = Gate(monkeypatch)
    asking = asyncio.ensure_future(site.post(path, body))
    async with asyncio.timeout(HANG_S):
        await gate.begun.wait()
        assert (await site.get("/runs")).status_code == 200
        gate.is_open.set()
        answer = await asking
    assert answer.status_code in (201, 202), answer.text

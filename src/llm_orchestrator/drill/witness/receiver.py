"""The receiver of effects: it takes what the runs' webhooks say and writes it down, fsynced.

It keeps no promise for the sender: it counts every delivery, also one under a key that it knows.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web


class Receiver:
    """An HTTP server on a port that the system chooses."""

    def __init__(self, write: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
        self._write = write
        self._runner: web.AppRunner | None = None
        self.port = 0

    async def start(self, host: str) -> None:
        """Listen."""
        app = web.Application()
        app.router.add_post("/effect", self._take)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, 0).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Listen no more."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _take(self, request: web.Request) -> web.Response:
        body = await request.json()
        ident = request.headers.get("webhook-id", "")
        await self._write({"event": "effect", "key": str(body["key"]), "id": ident})
        return web.json_response({"taken": ident})

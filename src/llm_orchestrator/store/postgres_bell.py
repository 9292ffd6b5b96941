"""News between nodes: LISTEN and NOTIFY, on a connection of its own.

NOTIFY takes one lock for the whole cluster until its transaction ends, so it never stands in a
transaction that writes (law 5): it follows the commit, one sender a node, and whatever gathers
meanwhile goes with the next one. A lost message costs time only: everybody polls, too.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import StoreError, StoreUnavailable
from llm_orchestrator.store.base import News
from llm_orchestrator.store.postgres_address import Address
from llm_orchestrator.store.postgres_connect import Connection, connect, server_of
from llm_orchestrator.store.rows import is_run_id

logger = logging.getLogger(__name__)
CHANNEL = "llm_orchestrator"
PING_S = 1.0
ANSWER_S = 2.0
_BYTES_MAX = 7_900
"""PostgreSQL takes 8,000 bytes a message."""
_ID_BYTES = 39
"""An id, its quotes, a comma."""


class Bell:
    """Tells other nodes what was committed here, and this one what was committed there."""

    def __init__(
        self, name: str, address: Address, clock: Clock, *, heard: Callable[[News], None]
    ) -> None:
        self._name = name
        self._address = address
        self._clock = clock
        self._heard = heard
        self._pending = News()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to listen."""
        self._task = asyncio.get_running_loop().create_task(self._serve(), name="bell")

    def ring(self, news: News) -> None:
        """Tell everybody, soon."""
        self._pending = self._pending | news
        self._wake.set()

    async def close(self) -> None:
        """Stop listening."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _serve(self) -> None:
        while True:
            connection: Connection | None = None
            try:
                settings = {"application_name": "llm-orchestrator bell"}
                connection, _ = await connect(self._address, settings=settings)
                async with asyncio.timeout(ANSWER_S):
                    await connection.add_listener(CHANNEL, self._listen)
                self._heard(News(is_due=True, is_gap=True))
                await self._ring_forever(connection)
            except (StoreError, OSError, TimeoutError) as error:
                logger.debug("no wake-ups for now: %s", error)
            except Exception as error:  # noqa: BLE001 (the driver raises what it likes)
                logger.debug("no wake-ups for now: %r", error)
            finally:
                if connection is not None:
                    connection.terminate()
            await self._clock.sleep(0.2)

    async def _ring_forever(self, connection: Connection) -> None:
        while True:
            try:
                async with asyncio.timeout(PING_S):
                    await self._wake.wait()
            except TimeoutError:
                async with asyncio.timeout(ANSWER_S):
                    server = await server_of(connection)
                if server.is_read_only:
                    raise StoreUnavailable("nobody commits here any more") from None
                continue
            self._wake.clear()
            news, self._pending = self._pending, News()
            try:
                async with asyncio.timeout(ANSWER_S):
                    await connection.execute(
                        "SELECT pg_notify($1, word) FROM unnest($2::text[]) AS word",
                        CHANNEL,
                        list(pack(self._name, news)),
                    )
            except BaseException:
                self.ring(news)  # on the next connection; heard twice, it does no harm
                raise

    def _listen(self, *heard: Any) -> None:
        """Called with connection, process id, channel and payload."""
        sender, news = unpack(heard[-1])
        if sender != self._name:
            self._heard(news)


def pack(sender: str, news: News) -> Iterable[str]:
    """News as messages that PostgreSQL takes. What can be no run's id is no news."""
    parts = {"p": news.posted, "f": news.freed, "m": news.mended}
    ids = [(key, one) for key, some in parts.items() for one in sorted(filter(is_run_id, some))]
    facts: dict[str, Any] = {"n": sender, "d": news.is_due}
    if news.is_order:
        facts["o"] = True
    if news.is_workflow:
        facts["w"] = True
    head = {**facts, **{key: [] for key in parts}}
    count = max(1, (_BYTES_MAX - len(_text(head))) // _ID_BYTES)
    for start in range(0, max(1, len(ids)), count):
        message = dict(facts)
        for key, run_id in ids[start : start + count]:
            message.setdefault(key, []).append(run_id)
        yield _text(message)


def _text(message: dict[str, Any]) -> str:
    return json.dumps(message, separators=(",", ":"))


def unpack(payload: str) -> tuple[str, News]:
    """The inverse; what cannot be read means that anything may have happened."""
    try:
        data = json.loads(payload)
        posted, freed, mended = (frozenset(data.get(key, ())) for key in "pfm")
        if all(map(is_run_id, posted | freed | mended)):
            is_order, is_workflow = bool(data.get("o")), bool(data.get("w"))
            news = News(bool(data["d"]), posted, freed, mended=mended)
            news = replace(news, is_order=is_order, is_workflow=is_workflow)
            return str(data["n"]), news
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    return "", News(is_due=True, is_gap=True)

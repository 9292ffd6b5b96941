"""What others want of a run that is being driven: messages, each taken once, by name."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from llm_orchestrator.model import Json, Message

SIGNAL = "signal"


class Inbox(Protocol):
    """The part of a store that a run reads while it is driven."""

    async def inbox(self, run_id: str) -> list[Message]: ...

    async def inbox_seqs(self, run_ids: Sequence[str]) -> dict[str, int]: ...


class Mailbox:
    """The messages of one run. `redeliver` holds payloads that a rewind gave back."""

    __slots__ = ("_arrival", "_inbox", "_messages", "_redeliver", "_run_id", "_taken", "seen")

    def __init__(self, run_id: str, inbox: Inbox, redeliver: list[dict[str, Json]]) -> None:
        self._run_id = run_id
        self._inbox = inbox
        self._redeliver = redeliver
        self._messages: dict[int, Message] = {}
        self._taken: set[int] = set()
        self._arrival: asyncio.Future[None] | None = None
        self.seen = 0

    async def fetch(self) -> list[Message]:
        """Read what arrived; returns the requests to the run as a whole (cancel, pause, rewind)."""
        requests = []
        sent = await self._inbox.inbox_seqs([self._run_id])
        seen = sent.get(self._run_id, 0)  # consumed ones count: a park saw them too
        for message in await self._inbox.inbox(self._run_id):
            seen = max(seen, message.number)
            if message.number in self._taken or message.number in self._messages:
                continue
            if message.kind == SIGNAL:
                self._messages[message.number] = message
            else:
                self._taken.add(message.number)
                requests.append(message)
        self.seen = max(self.seen, seen)
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)
        return requests

    def take(self, name: str) -> Message | None:
        """The oldest message by `name`, once."""
        for data in self._redeliver:
            if data.get("name") == name:
                self._redeliver.remove(data)
                number = int(data["number"])
                return Message(self._run_id, number, SIGNAL, name, data["payload"], data["by"])
        for number, message in self._messages.items():
            if message.name == name:
                del self._messages[number]
                self._taken.add(number)
                return message
        return None

    def arrival(self) -> asyncio.Future[None]:
        """Ends when something new has been fetched."""
        if self._arrival is None or self._arrival.done():
            self._arrival = asyncio.get_running_loop().create_future()
        return self._arrival

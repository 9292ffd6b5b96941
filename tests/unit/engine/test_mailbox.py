"""A run's mail: each message once, by name, in order."""

from __future__ import annotations

from collections.abc import Sequence

from llm_orchestrator.engine.mailbox import Mailbox
from llm_orchestrator.model import Message

RUN = "run"


class Letters:
    """An inbox that a test fills. Consumed messages are still there until the journal says so."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def put(self, name: str, *, kind: str = "signal", payload: object = None) -> None:
        self.messages.append(Message(RUN, len(self.messages) + 1, kind, name, payload))

    async def inbox(self, run_id: str) -> list[Message]:
        return list(self.messages)

    async def inbox_seqs(self, run_ids: Sequence[str]) -> dict[str, int]:
        return {run_id: len(self.messages) for run_id in run_ids}


def number(message: Message | None) -> int:
    return 0 if message is None else message.number


async def test_messages_are_taken_by_name_oldest_first_and_once() -> None:
    letters = Letters()
    for name in ("a", "b", "a"):
        letters.put(name)
    box = Mailbox(RUN, letters, [])
    await box.fetch()
    assert [number(box.take(name)) for name in ("a", "b", "a", "a", "b")] == [1, 2, 3, 0, 0]


async def test_a_message_that_was_taken_is_not_fetched_again() -> None:
    letters = Letters()
    letters.put("a")
    box = Mailbox(RUN, letters, [])
    await box.fetch()
    assert number(box.take("a")) == 1
    await box.fetch()
    assert box.take("a") is None


async def test_requests_are_handed_out_once_and_are_no_signals() -> None:
    letters = Letters()
    letters.put("", kind="cancel")
    letters.put("a")
    box = Mailbox(RUN, letters, [])
    assert [message.kind for message in await box.fetch()] == ["cancel"]
    assert await box.fetch() == []
    assert number(box.take("a")) == 2


async def test_what_a_rewind_gave_back_comes_first() -> None:
    letters = Letters()
    letters.put("a", payload="old")
    letters.put("a", payload="new")
    back = [{"name": "a", "number": 1, "payload": "old", "by": None}]
    box = Mailbox(RUN, letters, back)
    letters.messages.pop(0)
    await box.fetch()
    first, second = box.take("a"), box.take("a")
    assert first is not None
    assert second is not None
    assert (first.payload, second.payload) == ("old", "new")


async def test_whoever_waits_is_told_when_mail_has_been_fetched() -> None:
    letters = Letters()
    box = Mailbox(RUN, letters, [])
    arrival = box.arrival()
    assert not arrival.done()
    letters.put("a")
    await box.fetch()
    assert arrival.done()
    assert box.seen == 1

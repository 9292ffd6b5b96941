"""What is kept of a half answer, over the lives of the process that asks for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from llm_orchestrator.engine.attempt import CHECKPOINT_S, Attempt
from llm_orchestrator.engine.replay import Fold
from llm_orchestrator.store.base import Append, Batch
from llm_orchestrator.store.memory import MemoryStore
from llm_orchestrator.telemetry import redact
from tests.store.support import HandClock, accepted, claim, land

STEP = "story"


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests have made the process know holds nothing back here."""
    made = redact.Registry()
    monkeypatch.setattr(redact, "_in_data", made)
    monkeypatch.setattr("llm_orchestrator.engine.attempt.redact_data", made.redact_json)


class Life:
    """One process that asks for an answer, until it is killed."""

    def __init__(
        self, store: MemoryStore, clock: HandClock, writer: Any, *, is_rewound: bool = False
    ) -> None:
        self.store = store
        self.clock = clock
        self.writer = writer
        self.pending: list[Append] = []
        self.shown = ""
        services = SimpleNamespace(
            clock=clock,
            look=store.look,
            writer=self,
            commit=store.commit,
            spent=None,
            publish=print,
        )
        execution: Any = SimpleNamespace(
            run_id=writer.run_id,
            fold=Fold(writer.run_id, redone={STEP: 3})
            if is_rewound
            else Fold(writer.run_id, intents={STEP: 1}),
            services=services,
            head=SimpleNamespace(epoch=1),
            idempotency_key=lambda key: key,
            publish=self.told,
        )
        providers: Any = None
        self.attempt = Attempt(execution, STEP, providers)

    def append(self, _: Any, drafts: Any, *, changes: Any) -> None:
        """The group writer's part."""
        self.pending.append(self.writer.append(*drafts, changes=changes))

    def told(self, what: str, _: str, data: dict[str, Any], *, attempt: int) -> None:
        """The reader's part: each chunk goes where it says."""
        if what == "reset":
            self.shown = self.shown[: data["offset"]].ljust(data["offset"], "?")
        if what == "chunk":
            assert data["offset"] == len(self.shown)
            self.shown += data["text"]

    async def says(self, *words: str) -> str:
        """Words come, each with a checkpoint; what a next life would read."""
        await self.attempt.begin(1)
        for word in words:
            self.clock.now += int(CHECKPOINT_S * 1_000_000)
            await self.attempt.emit(word)
        for append in self.pending:
            await self.store.commit(Batch((append,)))
        kept = await self.store.look.progress(self.writer.run_id, STEP)
        return "" if kept is None else kept.text


async def test_an_answer_that_is_continued_twice_keeps_every_word_in_its_place() -> None:
    clock = HandClock()
    store = MemoryStore(clock)
    writer = await accepted(store)
    entry, change = claim()
    await land(store, writer.append(entry, change=change))
    assert await Life(store, clock, writer).says("a ", "b ", "c ") == "a b c "
    assert await Life(store, clock, writer).says("d ", "e ") == "a b c d e "
    assert await Life(store, clock, writer).says("f ") == "a b c d e f "
    assert await Life(store, clock, writer).says() == "a b c d e f "


async def test_a_piece_is_no_write_and_what_came_is_kept_when_the_attempt_is_cut() -> None:
    clock = HandClock()
    store = MemoryStore(clock)
    writer = await accepted(store)
    entry, change = claim()
    await land(store, writer.append(entry, change=change))
    life = Life(store, clock, writer)
    await life.attempt.begin(1)
    for count in range(100):  # as a provider tells it, with every piece
        life.attempt.keep_handle({"provider": "p", "handle": {"id": "x", "output_tokens": count}})
        await life.attempt.emit(f"{count} ")
    assert len(life.pending) == 2  # the handle, and the first piece
    life.attempt.keep_handle({"provider": "p", "handle": {"id": "y", "output_tokens": 100}})
    assert len(life.pending) == 3
    await life.attempt.emit("last ")
    life.attempt.interrupted()
    assert len(life.pending) == 4
    for append in life.pending:
        await store.commit(Batch((append,)))
    kept: Any = await store.look.progress(writer.run_id, STEP)
    assert kept.text == "".join(f"{count} " for count in range(100)) + "last "
    assert kept.handle["handle"]["handle"] == {"id": "y", "output_tokens": 100}
    life.attempt.interrupted()
    assert len(life.pending) == 4, "nothing new, nothing to keep"


async def test_pieces_that_a_rewind_took_back_are_no_part_of_the_next_answer() -> None:
    clock = HandClock()
    store = MemoryStore(clock)
    writer = await accepted(store)
    entry, change = claim()
    await land(store, writer.append(entry, change=change))
    assert await Life(store, clock, writer).says("a ", "b ", "c ") == "a b c "
    assert await Life(store, clock, writer, is_rewound=True).says("x ") == "x "
    assert await Life(store, clock, writer).says("y ") == "x y "


async def test_a_secret_that_lies_across_pieces_is_neither_shown_nor_kept() -> None:
    redact.remember("plant9-in-the-middle")
    clock = HandClock()
    store = MemoryStore(clock)
    writer = await accepted(store)
    entry, change = claim()
    await land(store, writer.append(entry, change=change))
    life = Life(store, clock, writer)
    assert await life.says("my ", "key: plant9", "-in-the-", "middle, and") == "my key: ***, and"
    assert life.shown == "my key: ***, and"
    await life.attempt.emit(" plant9-")
    assert life.shown == "my key: ***, and "
    life.attempt.changes()
    assert life.shown == "my key: ***, and plant9-", "it was none after all"


async def test_what_was_held_back_of_a_cut_answer_comes_again() -> None:
    redact.remember("plant9-in-the-middle")
    clock = HandClock()
    store = MemoryStore(clock)
    writer = await accepted(store)
    entry, change = claim()
    await land(store, writer.append(entry, change=change))
    assert await Life(store, clock, writer).says("a plant9", "-in") == "a "
    life = Life(store, clock, writer)
    assert await life.says("plant9", "-out") == "a plant9-out"
    await life.attempt.emit("plant9")
    await life.attempt.begin(2)
    assert life.attempt.partial is not None
    assert life.attempt.partial.text == "a plant9-out"
    for piece in ("plant9", "-in-the-middle"):
        await life.attempt.emit(piece)
    assert life.shown == "??plant9-out***"


async def test_handles_and_the_outbox_hold_no_secret() -> None:
    redact.remember("plant9-in-the-middle")
    clock = HandClock()
    store = MemoryStore(clock)
    writer = await accepted(store)
    entry, change = claim()
    await land(store, writer.append(entry, change=change))
    life = Life(store, clock, writer)
    life.attempt.keep_handle({"provider": "p", "handle": {"id": "x plant9-in-the-middle"}})
    assert await life.says("a") == "a"
    kept: Any = await store.look.progress(writer.run_id, STEP)
    assert kept.handle["handle"]["handle"] == {"id": "x ***"}
    await life.attempt.post_outbox("notify", {"text": ["plant9-in-the-middle"]})
    assert list((await store.shelf.records("outbox")).values()) == [{"text": ["***"]}]

"""Which definition is the newest is kept for a moment, and never beyond what was heard."""

from __future__ import annotations

from typing import Any

import pytest

from llm_orchestrator.errors import NotFound
from llm_orchestrator.language.load import load_text
from llm_orchestrator.model import Workflow
from llm_orchestrator.server.known import KEPT_S, Known
from llm_orchestrator.store.base import Batch, Register
from llm_orchestrator.store.memory import MemoryStore
from tests.server.support import ECHO
from tests.store.support import HandClock


def definition(tail: str, at: int) -> Workflow:
    found = load_text(ECHO.replace('"!"', f'"{tail}"'))
    return Workflow(found.name, found.version, found.digest, found.canonical(), created_at=at)


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def store(clock: HandClock) -> MemoryStore:
    return MemoryStore(clock)


async def test_an_answer_is_kept_until_there_is_news(store: MemoryStore, clock: HandClock) -> None:
    known = Known(store, clock)
    old, new = definition("!", 1), definition("?", 2)
    await store.commit(Batch(changes=(Register(old),)))
    assert (await known.find("echo")).digest == old.digest
    silent = store.tables.workflows
    silent["echo", new.version, new.digest] = new
    assert (await known.find("echo")).digest == old.digest
    clock.now += int(KEPT_S * 1e6) + 1
    assert (await known.find("echo")).digest == new.digest
    third = definition(".", 3)
    await store.commit(Batch(changes=(Register(third),)))
    assert (await known.find("echo")).digest == third.digest


async def test_what_was_read_before_the_news_is_not_kept(
    store: MemoryStore, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Known(store, clock)
    old, new = definition("!", 1), definition("?", 2)
    await store.commit(Batch(changes=(Register(old),)))
    read = store.shelf.workflow

    async def slow(*given: Any) -> Workflow | None:
        found = await read(*given)
        if found is not None and found.digest == old.digest:
            await store.commit(Batch(changes=(Register(new),)))
        return found

    monkeypatch.setattr(store.shelf, "workflow", slow)
    assert (await known.find("echo")).digest == old.digest
    assert (await known.find("echo")).digest == new.digest


async def test_that_there_is_none_is_never_kept(store: MemoryStore, clock: HandClock) -> None:
    known = Known(store, clock)
    for _ in range(2):
        with pytest.raises(NotFound):
            await known.find("echo")
    flow = definition("!", 1)
    store.tables.workflows["echo", flow.version, flow.digest] = flow
    assert (await known.find("echo")).digest == flow.digest

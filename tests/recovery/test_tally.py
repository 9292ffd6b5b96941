"""How backups ended, as the store remembers it."""

from __future__ import annotations

from typing import Any

import pytest

from llm_orchestrator.errors import NotUploaded, StoreFull, StoreUnavailable
from llm_orchestrator.recovery.create import BACKUP
from llm_orchestrator.recovery.tally import TALLY, Outcome, count_backup, outcome_of
from llm_orchestrator.store.memory import MemoryStore
from tests.unit.engine.support import VirtualClock, virtually


def test_each_end_is_counted_and_the_last_failure_is_kept_in_words() -> None:
    async def main() -> list[Any]:
        store = MemoryStore(VirtualClock())
        seen = []
        for error in (None, StoreFull("the disk is full"), NotUploaded("no bucket"), None):
            assert await count_backup(store, error, 7)
            seen.append((await store.shelf.record(BACKUP, TALLY))[0])
        return seen

    first, second, third, last = virtually(main())
    assert first == {"ok": 1, "partial": 0, "failed": 0, "failed_at": 0, "error": ""}
    assert second["error"] == "the disk is full"
    assert second["failed_at"] == 7
    assert (third["partial"], third["failed"]) == (1, 1)
    assert last == {**third, "ok": 2, "error": ""}


def test_a_file_that_is_only_here_is_half_a_success() -> None:
    assert outcome_of(NotUploaded("")) is Outcome.PARTIAL
    assert outcome_of(StoreFull("")) is Outcome.FAILED


def test_a_store_that_is_away_is_no_further_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> bool:
        store = MemoryStore(VirtualClock())

        async def away(*_: Any) -> Any:
            raise StoreUnavailable("away")

        monkeypatch.setattr(store, "commit", away)
        return await count_backup(store, None, 7)

    assert virtually(main()) is False


def test_two_who_count_at_once_are_both_counted() -> None:
    async def main() -> Any:
        store = MemoryStore(VirtualClock())
        real, shelf = store.shelf.record, store.shelf
        raced = False

        async def record(kind: str, key: str) -> Any:
            nonlocal raced
            answer = await real(kind, key)
            if not raced:
                raced = True
                await count_backup(store, None, 7)  # somebody else, in between
            return answer

        monkeypatch = pytest.MonkeyPatch()
        monkeypatch.setattr(shelf, "record", record)
        try:
            assert await count_backup(store, None, 7)
        finally:
            monkeypatch.undo()
        return (await store.shelf.record(BACKUP, TALLY))[0]

    assert virtually(main())["ok"] == 2

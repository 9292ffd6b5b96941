"""The spool: paid results are on the disk before the store is asked, and outlive a crash."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from llm_orchestrator.engine.execution import Execution, Services
from llm_orchestrator.engine.replay import Fold
from llm_orchestrator.engine.slots import Slots
from llm_orchestrator.errors import ConfigError, Fenced, Refused, StoreError
from llm_orchestrator.model import Draft, Effect, Json, Kind, Policy
from llm_orchestrator.store import spool as spooling
from llm_orchestrator.store.base import Outcome, Receipt
from llm_orchestrator.store.journal import encode
from llm_orchestrator.store.spool_file import Offer
from llm_orchestrator.store.writer import GroupWriter, Head
from tests.store.support import START_US, HandClock
from tests.unit.store.support import (
    DAY_US,
    PAYLOAD,
    STORE,
    Disk,
    files,
    free,
    leave,
    names,
    offer,
    on_disk,
    open_spool,
    paid,
    tidied,
    writing,
)

# --- the order of things ---


async def test_a_paid_result_is_on_the_disk_before_the_store_is_asked(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    async with writing(open_spool(tmp_path), disk) as writer:
        await paid(writer, Head("one"))
    assert disk.seen == [["one/a"]]


async def test_no_commit_begins_before_the_fsync_ends_and_the_loop_stays_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = open_spool(tmp_path)
    disk = Disk(tmp_path)
    begun, may_end = threading.Event(), threading.Event()
    real = os.fsync

    def slow(descriptor: int) -> None:
        begun.set()
        assert may_end.wait(10)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    async with writing(spool, disk) as writer:
        future = paid(writer, Head("one"))
        await asyncio.to_thread(begun.wait, 10)
        for _ in range(100):
            await asyncio.sleep(0)
        assert disk.seen == []
        may_end.set()
        await future
    assert disk.seen == [["one/a"]]


async def test_what_waits_behind_a_commit_that_hangs_is_on_the_disk_too(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    disk.gate.clear()
    async with writing(open_spool(tmp_path), disk) as writer:
        paid(writer, Head("first"))
        await disk.asked.wait()
        waiting = [paid(writer, Head(f"later-{number}")) for number in range(3)]
        for ticket in writer._core.queue:
            await ticket.copies[0].written()
        assert on_disk(tmp_path) == ["first/a", "later-0/a", "later-1/a", "later-2/a"]
        assert len(disk.seen) == 1
        assert not any(future.done() for future in waiting)


async def test_a_new_file_and_a_new_folder_are_durable_by_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
    folder = tmp_path / "data" / "spool"
    spool = open_spool(folder)
    assert {path.stat().st_ino for path in (tmp_path, tmp_path / "data")} <= set(synced)
    async with writing(spool, Disk(folder)) as writer:
        await paid(writer, Head("one"))
        assert synced[-2:] == [path.stat().st_ino for path in (*files(folder), folder)]


async def test_results_that_come_together_share_an_fsync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = open_spool(tmp_path)
    count, real = [0], os.fsync

    def counted(descriptor: int) -> None:
        count[0] += 1
        real(descriptor)

    monkeypatch.setattr(os, "fsync", counted)
    async with writing(spool, Disk(tmp_path)) as writer:
        await asyncio.gather(*(paid(writer, Head(f"run-{number}")) for number in range(100)))
    assert count[0] <= 4, "the first, its folder, everything else"


async def test_free_steps_never_touch_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = open_spool(tmp_path)
    monkeypatch.setattr(spool._thread, "submit", None)
    async with writing(spool, Disk(tmp_path)) as writer:
        await asyncio.gather(*(free(writer, Head(f"run-{number}")) for number in range(10)))
        assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Policy(), []),
        (Policy(is_paid=True), ["one/it"]),
        (Policy(effect=Effect.ONCE), ["one/it"]),
    ],
)
async def test_the_engine_spools_steps_whose_attempt_it_announced(
    tmp_path: Path, policy: Policy, expected: list[str]
) -> None:
    disk = Disk(tmp_path)

    async def work(attempt: int) -> Json:
        return "answer"

    async with writing(open_spool(tmp_path), disk) as writer:
        nothing = cast("Any", None)
        services = Services(
            writer, nothing, disk.commit, HandClock(), Slots(1), nothing, tools=nothing
        )
        execution = Execution(Fold("one"), Head("one"), services)
        assert await execution.perform("it", work, policy) == "answer"
    assert disk.seen[-1] == expected
    assert not any(disk.seen[:-1]), "an intent is no result"


# --- forgetting ---


async def test_the_file_is_emptied_once_everything_has_landed_and_goes_with_the_process(
    tmp_path: Path,
) -> None:
    spool = open_spool(tmp_path)
    async with writing(spool, Disk(tmp_path)) as writer:
        for step in "abc":
            await paid(writer, Head("one"), step)
            await tidied(spool)
            [path] = files(tmp_path)
            assert path.stat().st_size == 0
        assert spool.offers() == {}
    assert os.listdir(tmp_path) == ["spool.lock"]  # noqa: PTH208 (what is there, by any means)


async def test_a_result_that_is_needed_keeps_the_file_as_it_is(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    spool = open_spool(tmp_path)
    async with writing(spool, disk) as writer:
        await paid(writer, Head("one"))
        disk.gate.clear()
        disk.asked.clear()
        paid(writer, Head("two"))
        await disk.asked.wait()
        await tidied(spool)
        assert on_disk(tmp_path) == ["two/a"]


async def test_a_file_that_never_empties_is_followed_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spooling, "FILE_BYTES_MAX", 2_000)
    spool = open_spool(tmp_path)
    disk = Disk(tmp_path, Receipt({"kept": Outcome.FENCED}))
    async with writing(spool, disk) as writer:
        with pytest.raises(Fenced):
            await paid(writer, Head("kept"))
        for number in range(50):
            await paid(writer, Head(f"run-{number}"))
        await tidied(spool)
        kept, current = files(tmp_path)
        assert "kept/a" in on_disk(tmp_path)
        assert kept.stat().st_size < 3_000
        assert current.stat().st_size == 0
        spool.forget("kept", "a")
        await tidied(spool)
        assert files(tmp_path) == [current]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Receipt({"one": Outcome.FENCED}), Fenced),
        (Receipt({"one": Outcome.UNFIT}), Refused),
        (StoreError("gone"), StoreError),
    ],
)
async def test_what_the_store_did_not_take_is_an_offer_in_this_life_and_the_next(
    tmp_path: Path, answer: Receipt | BaseException, error: type[BaseException]
) -> None:
    spool = open_spool(tmp_path)
    async with writing(spool, Disk(tmp_path, answer)) as writer:
        head = Head("one", epoch=5, seq=3, digest=b"\x07" * 32)
        with pytest.raises(error):
            await paid(writer, head)
        with pytest.raises(Fenced):  # paid for while the run was lost already
            await paid(writer, head, "b")
        await paid(writer, Head("two"))
        assert names(spool.offers()) == ["one/a", "one/b"]
        assert spool.held == (2, 2 * len(PAYLOAD))
    spool = open_spool(tmp_path)
    assert spool.held == (2, 2 * len(PAYLOAD))
    first, _ = spool.offers()["one"]
    assert first == Offer("one", "a", 1, 5, STORE, 3, b"\x07" * 32, START_US, PAYLOAD)
    assert first.draft == Draft(Kind.STEP_FINISHED, "a", 1, PAYLOAD)
    assert first.cost_usd == 0.25
    spool.forget("one", "a")
    await tidied(spool)
    assert names(spool.offers()) == ["one/b"]
    assert files(tmp_path), "the other offer is in the same file"
    spool.forget("one", "b")
    spool.forget("one", "never was")
    assert spool.held == (0, 0)
    await spool.close()
    assert files(tmp_path) == []


async def test_what_has_landed_or_was_forgotten_stays_so_beside_what_is_needed(
    tmp_path: Path,
) -> None:
    old = leave(tmp_path, offer(1), offer(2))
    spool = open_spool(tmp_path)
    disk = Disk(tmp_path, Receipt({"kept": Outcome.FENCED}))
    async with writing(spool, disk) as writer:
        spool.forget("run-1", "a")
        with pytest.raises(Fenced):
            await paid(writer, Head("kept"))
        await asyncio.gather(*(paid(writer, Head(f"landed-{number}")) for number in range(9)))
        await tidied(spool)
        assert on_disk(tmp_path) == ["kept/a", "run-2/a"], "also if it were killed now"
    spool = open_spool(tmp_path)
    assert names(spool.offers()) == ["kept/a", "run-2/a"]
    spool.forget("run-2", "a")
    await spool.close()
    assert not old.exists()


async def test_a_writer_that_is_closed_keeps_what_comes_too_late(tmp_path: Path) -> None:
    spool = open_spool(tmp_path)
    writer = GroupWriter(Disk(tmp_path), HandClock(), sinks=(spool,))
    writer.start()
    await writer.close()
    for step in "abc":
        late = paid(writer, Head("one"), step)
        assert isinstance(late.exception(), StoreError)
    await spool.close()
    await spool.close()
    assert on_disk(tmp_path) == ["one/a", "one/b", "one/c"]


async def test_an_offer_of_another_store_is_neither_shown_nor_lost(tmp_path: Path) -> None:
    path = leave(tmp_path, offer(1), offer(2, store_id="other"))
    spool = open_spool(tmp_path)
    assert names(spool.offers()) == ["run-1/a"]
    spool.forget("run-1", "a")
    spool.forget("run-2", "a")
    await spool.close()
    assert path.exists()
    spool = open_spool(tmp_path, store_id="other")
    assert names(spool.offers()) == ["run-2/a"]
    await spool.close()


async def test_what_nobody_wanted_for_a_week_is_dropped_and_its_cost_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    old = START_US - 7 * DAY_US
    leave(tmp_path, offer(1, made_at=old - 1), offer(2, made_at=old - DAY_US), name="old.1.spool")
    path = leave(tmp_path, offer(3, made_at=old))
    spool = open_spool(tmp_path)
    assert names(spool.offers()) == ["run-3/a"]
    assert files(tmp_path) == [path]
    [message] = caplog.messages
    assert "2 results" in message
    assert "0.5000 USD" in message
    await spool.close()


async def test_offers_of_a_run_come_oldest_first(tmp_path: Path) -> None:
    leave(tmp_path, offer(1, step="new", made_at=START_US), name="a.1.spool")
    leave(tmp_path, offer(1, step="old", made_at=START_US - 1), name="b.1.spool")
    spool = open_spool(tmp_path)
    assert [each.step for each in spool.offers()["run-1"]] == ["old", "new"]
    await spool.close()


# --- processes ---

LIFE = """
import asyncio, sys
from pathlib import Path
from llm_orchestrator.clock import RealClock
from llm_orchestrator.model import Draft
from llm_orchestrator.store.journal import encode
from llm_orchestrator.store.spool import Spool
from llm_orchestrator.store.writer import GroupWriter, Head

class Away:
    async def commit(self, batch):
        print("asked", flush=True)
        await asyncio.Event().wait()

async def main(folder):
    spool = Spool.open(folder, "node-child", store_id="5e1f", clock=RealClock())
    writer = GroupWriter(Away(), RealClock(), sinks=(spool,))
    writer.start()
    draft = Draft("step_finished", "s", 2, encode({"result": 42, "usage": {"cost_usd": 1.5}}))
    await writer.append(Head("run", 9, seq=4, digest=bytes(32)), (draft,), is_paid=True)

asyncio.run(main(Path(sys.argv[1])))
"""


@contextmanager
def life(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has spooled a result, and waits for its store for ever."""
    with subprocess.Popen(
        [sys.executable, "-c", LIFE, str(folder)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "asked\n"
            yield process
        finally:
            process.kill()


async def test_what_a_killed_process_paid_for_is_offered_to_the_next_life(tmp_path: Path) -> None:
    with life(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
    spool = open_spool(tmp_path)
    [found] = spool.offers()["run"]
    assert (found.step, found.attempt, found.epoch, found.head_seq) == ("s", 2, 9, 4)
    assert found.payload == encode({"result": 42, "usage": {"cost_usd": 1.5}})
    assert found.cost_usd == 1.5
    await spool.close()
    spool = open_spool(tmp_path)
    assert names(spool.offers()) == ["run/s"], "until somebody has said what became of it"
    spool.forget("run", "s")
    await spool.close()
    spool = open_spool(tmp_path)
    assert spool.offers() == {}
    await spool.close()


async def test_a_folder_has_one_living_process(tmp_path: Path) -> None:
    with life(tmp_path) as process:
        with pytest.raises(ConfigError) as caught:
            open_spool(tmp_path)
        assert str(tmp_path) in caught.value.message
        assert f"node node-child, process {process.pid} on" in caught.value.message
        assert caught.value.hint == "--data DIR or LLM_ORCHESTRATOR_DATA"
        process.kill()
        process.wait(10)
        spool = open_spool(tmp_path)
        await spool.close()


async def test_only_this_user_can_read_what_is_spooled(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "spool"
    leave(tmp_path / "unused")
    spool = open_spool(folder, node_id="../an odd/name")
    disk = Disk(folder)
    disk.gate.clear()
    async with writing(spool, disk) as writer:
        paid(writer, Head("one"))
        await disk.asked.wait()
        [path] = files(folder)
        assert path.stat().st_mode & 0o777 == 0o600
        assert folder.stat().st_mode & 0o777 == 0o700

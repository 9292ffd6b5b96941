"""The spool on a disk that tears, flips, fills up, goes away or falls silent."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest

from llm_orchestrator.errors import Fenced
from llm_orchestrator.store.base import Outcome, Receipt
from llm_orchestrator.store.spool_file import SpoolFile, parse
from llm_orchestrator.store.writer import Head
from tests.unit.store.support import (
    Disk,
    files,
    leave,
    names,
    offer,
    on_disk,
    open_spool,
    paid,
    tidied,
    writing,
)


@contextmanager
def errors(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    caplog.clear()
    yield lambda: [each.getMessage() for each in caplog.records if each.levelno == logging.ERROR]


def test_a_tail_torn_at_any_byte_costs_the_last_record_only(tmp_path: Path) -> None:
    offers = [offer(number, step="s\ud800 ü\n") for number in range(3)]
    ends = []
    for count in range(1, 4):
        path = leave(tmp_path, *offers[:count], name=f"{count}.spool")
        ends.append(path.stat().st_size - 1)  # without the newline it is whole, too
    content = path.read_bytes()
    for cut in range(len(content) + 1):
        whole = sum(end <= cut for end in ends)
        found, bad, is_torn = parse(content[:cut])
        assert (list(found.values()), bad) == (offers[:whole], 0), cut
        between = {0, 1, *ends, *(end + 1 for end in ends), *(end + 2 for end in ends)}
        assert is_torn == (cut not in between), cut


@pytest.mark.parametrize("mask", [0x01, 0x20, 0x80, 0xFF])
def test_a_flipped_byte_anywhere_costs_one_record_at_most_and_invents_none(
    tmp_path: Path, mask: int
) -> None:
    offers = [offer(number) for number in range(3)]
    content = leave(tmp_path, *offers).read_bytes()
    for place in range(len(content)):
        for byte in {content[place] ^ mask, ord("\n")}:
            damaged = content[:place] + bytes([byte]) + content[place + 1 :]
            found, _, _ = parse(damaged)
            assert len(found) >= 2, place
            assert all(offers[number] == each for number, each in found.items()), place


async def test_damage_is_reported_and_the_rest_is_offered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    path = leave(tmp_path, *(offer(number) for number in range(3)))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content[:-10])
    leave(tmp_path, name="empty.1.spool")
    (tmp_path / "folder.spool").mkdir()
    spool = open_spool(tmp_path)
    assert names(spool.offers()) == ["run-0/a"]
    assert any("1 damaged" in message for message in caplog.messages)
    assert any("cut off" in message for message in caplog.messages)
    assert any("folder.spool cannot be read" in message for message in caplog.messages)
    assert files(tmp_path) == [tmp_path / "folder.spool", path]
    await spool.close()


def test_an_append_that_failed_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = SpoolFile(tmp_path / "node.1.spool")
    file.append({1: offer(1)})
    with file.path.open("ab") as other:
        other.write(b"\n0123 a part of a mark, then the disk was full")
    file.append({2: offer(2), 3: offer(3)})
    file.mark([2])

    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="output"):
        file.append({4: offer(4), 5: offer(5)})
    file.close()
    assert parse(file.path.read_bytes()) == ({1: offer(1), 3: offer(3)}, 1, False)


def test_a_record_of_a_form_that_we_do_not_know_is_left_out(tmp_path: Path) -> None:
    from llm_orchestrator.store.spool_file import _digest

    body = json.dumps({"form": 2}).encode()
    assert parse(_digest(body) + b" " + body + b"\n") == ({}, 1, False)


# --- a disk that does not serve ---


async def test_a_folder_that_cannot_be_made_is_reported_and_the_engine_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with errors(caplog) as said:
        spool = open_spool(tmp_path / "file" / "spool")
        disk = Disk(tmp_path)
        async with writing(spool, disk) as writer:
            await paid(writer, Head("one"))
            disk.answers = [Receipt({"two": Outcome.FENCED})]
            with pytest.raises(Fenced):
                await paid(writer, Head("two"))
            assert names(spool.offers()) == ["two/a"], "in memory at least"
            spool.forget("two", "a")
        assert len(said()) == 1


async def test_nothing_is_written_into_a_folder_that_we_cannot_own(tmp_path: Path) -> None:
    (tmp_path / "spool.lock").mkdir()
    async with writing(open_spool(tmp_path), Disk(tmp_path)) as writer:
        await paid(writer, Head("one"))
        assert files(tmp_path) == []


async def test_a_folder_that_goes_away_is_reported_once_and_used_again_when_it_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "spool"
    spool, disk = open_spool(folder), Disk(folder)
    with errors(caplog) as said:
        async with writing(spool, disk) as writer:
            shutil.rmtree(folder)
            await paid(writer, Head("one"))
            await paid(writer, Head("two"))
            assert len(said()) == 1
            folder.mkdir()
            await paid(writer, Head("three"))
            assert disk.seen == [[], [], ["three/a"]]
            shutil.rmtree(folder)
            spool._current = None
            await paid(writer, Head("four"))
            assert len(said()) == 2


FULL = """
import asyncio, json, resource, sys
from pathlib import Path
from llm_orchestrator.clock import RealClock
from llm_orchestrator.model import Draft
from llm_orchestrator.store.base import Outcome, Receipt
from llm_orchestrator.store.spool import Spool
from llm_orchestrator.store.writer import GroupWriter, Head

class Store:
    async def commit(self, batch):
        return Receipt({"kept": Outcome.FENCED})

async def main(folder):
    spool = Spool.open(folder, "node", store_id="s", clock=RealClock())
    writer = GroupWriter(Store(), RealClock(), sinks=(spool,))
    writer.start()

    async def paid(name, size):
        draft = Draft("step_finished", "a", 1, b"{" + b" " * size + b"}")
        await asyncio.gather(writer.append(Head(name), (draft,), is_paid=True),
                             return_exceptions=True)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    await paid("kept", 100)
    await paid("large", 9000)
    await paid("small", 100)
    is_failing = spool._is_failing
    await paid("larger", 9000)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    await paid("after", 9000)
    await writer.close()
    await spool.close()
    print(json.dumps([writer.entries, is_failing, spool._is_failing]))

asyncio.run(main(Path(sys.argv[1])))
"""


def test_a_write_that_finds_no_room_costs_the_copy_not_the_commit(tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk: the kernel writes a part, then refuses."""
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout) == [5, False, False], done.stderr
    assert done.stderr.count("cannot be kept") == 2
    assert on_disk(tmp_path) == ["kept/a"]


async def test_a_disk_that_is_silent_holds_the_commit_up_for_a_moment_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool, disk = open_spool(tmp_path, stall_s=0.05), Disk(tmp_path)
    answers = threading.Event()
    with errors(caplog) as said:
        async with writing(spool, disk) as writer:
            spool._submit(lambda: cast("None", answers.wait(10)))
            await paid(writer, Head("one"))
            await paid(writer, Head("two"))
            disk.answers = [Receipt({"three": Outcome.FENCED})]
            with pytest.raises(Fenced):
                await paid(writer, Head("three"))
            assert disk.seen == [[], [], []]
            assert len(said()) == 1
            spool._stall_s = 60.0  # from here on the disk may be slow
            answers.set()
            await paid(writer, Head("four"))
            await tidied(spool)
            assert not spool._is_failing
            assert on_disk(tmp_path) == ["three/a"], "the others have landed"
            spool.forget("three", "a")
            await tidied(spool)
            answers.clear()
            spool._submit(lambda: cast("None", answers.wait(10)))
            five = paid(writer, Head("five"))
            for _ in range(100):
                await asyncio.sleep(0)
            assert len(disk.seen) == 4, "it is waited for again"
            answers.set()
            await five
            assert disk.seen[-1] == ["five/a"]


async def test_closing_does_not_wait_for_a_silent_disk(tmp_path: Path) -> None:
    spool, answers = open_spool(tmp_path, stall_s=0.05), threading.Event()
    blocked = spool._submit(lambda: cast("None", answers.wait(60)))
    async with asyncio.timeout(10), writing(spool, Disk(tmp_path)) as writer:
        await paid(writer, Head("one"))
    open_again = open_spool(tmp_path)
    await open_again.close()
    answers.set()
    await blocked

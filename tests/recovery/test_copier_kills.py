"""A process that copies is killed before each of its acts in turn: the store is old or new, whole.

The acts are what changes something outside: statements and programs on PostgreSQL; opened files,
syncs and renames on SQLite. A child is killed by itself before its n-th act of one phase.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg  # type: ignore[import-untyped]
import pytest

from llm_orchestrator.clock import RealClock
from llm_orchestrator.engine.audit import verify_store
from llm_orchestrator.store import postgres_copy, sqlite_copy
from llm_orchestrator.store.copying import Copier, Identity
from llm_orchestrator.store.postgres_copy import PostgresCopier
from llm_orchestrator.store.sqlite_copy import SQLiteCopier
from llm_orchestrator.wire import is_postgres, store_path
from tests.recovery.test_carry import opened
from tests.recovery.test_copier import NEW, Site, put, site, value_of

__all__ = ["site"]
ROOT = Path(__file__).resolve().parents[2]
LATER = Identity("later" * 6, 8)
ACTS_MAX = 60


@pytest.mark.parametrize("phase", ["dump", "load", "take_over"])
async def test_killed_before_any_act_the_store_is_whole(
    site: Site, tmp_path: Path, phase: str
) -> None:
    async with opened(site.url) as store:
        await put(store, 1)
        dump, _ = await site.copier.dump(tmp_path)
        await put(store, 2)
    before = await site.copier.identity()
    assert before is not None
    ends = set()
    for number in range(1, ACTS_MAX):
        is_done = await child(site.url, tmp_path, phase, number)
        identity = await site.copier.identity()
        assert identity in (before, NEW)
        ends.add(identity)
        assert await value_of(site.url) == (2 if identity == before else 1)
        async with opened(site.url) as store:
            assert await verify_store(store) == []
        kept = await site.copier.kept()
        if identity == NEW:
            assert await value_of(site.old(kept[-1])) == 2
        await (await site.copier.load(dump)).discard()
        assert await site.copier.leftovers() == []
        if is_done or identity == NEW:
            break
    assert number > 2
    assert is_done or phase == "take_over"
    assert NEW in ends if phase == "take_over" else ends == {before}
    assert await (await site.copier.load(dump)).take_over(LATER)
    assert await value_of(site.url) == 1
    assert await site.copier.identity() == LATER


async def child(url: str, folder: Path, phase: str, number: int) -> bool:
    """True when the phase had no such act any more, and so came to its end."""
    script = "import asyncio, sys; from tests.recovery.test_copier_kills import in_child; "
    script += "asyncio.run(in_child(*sys.argv[1:]))"
    words = [url, str(folder), phase, str(number)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, *words, cwd=ROOT, stderr=asyncio.subprocess.PIPE
    )
    _, said = await process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), said.decode()
    return process.returncode == 0


async def in_child(url: str, folder: str, phase: str, number: str) -> None:
    """One phase, in a process of its own, that may do only so many acts."""
    copier: Copier = (
        PostgresCopier(url, RealClock())
        if is_postgres(url)
        else SQLiteCopier(store_path(url), RealClock())
    )
    dump = Path(folder) / (postgres_copy.DUMP if is_postgres(url) else sqlite_copy.DUMP)
    if phase == "take_over":
        aside = await copier.load(dump)
        die_before(int(number))
        await aside.take_over(NEW)
        return
    die_before(int(number))
    if phase == "load":
        await (await copier.load(dump)).discard()
    else:
        (elsewhere := Path(folder) / f"again-{number}").mkdir()
        await copier.dump(elsewhere)


def die_before(number: int) -> None:
    """Count the acts of this process, and die before the last one that it may begin."""
    left = number

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return call

    for module, name in (
        (asyncpg.Connection, "execute"),
        (postgres_copy, "pour"),
        (postgres_copy, "run"),
        (sqlite_copy, "connect"),
        (sqlite_copy, "_plain"),
        (sqlite_copy, "_pour"),
        (sqlite_copy, "_sync"),
        (sqlite_copy, "_remove"),
        (Path, "rename"),
        (Path, "replace"),
    ):
        setattr(module, name, counted(getattr(module, name)))

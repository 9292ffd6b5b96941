"""Faults of the supervised node that the kernel or a newer release makes: without a load."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest

from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill.deadman import run_commands
from llm_orchestrator.drill.memory_group import MemoryGroup
from llm_orchestrator.drill.scenario import Fault, System
from llm_orchestrator.drill.single import SingleTarget
from llm_orchestrator.drill.target import Broken

pytestmark = [pytest.mark.serial, pytest.mark.timeout(180)]
needs_group = pytest.mark.skipif(
    not MemoryGroup.is_possible(), reason="needs root and a control group of version 1 for memory"
)
Does = Callable[[SingleTarget], Coroutine[None, None, None]]
_POLL_S = 0.1
_UNGUARDED = """\
import llm_orchestrator.engine.memory as it
it.Memory._groups = lambda self: []
"""
_HALF = """\
import sqlite3
import llm_orchestrator.store.sqlite_file as it

def migrate(database):
    for statement in ("CREATE TABLE of_newer (number INTEGER PRIMARY KEY)", "SELECT 1"):
        database.execute(statement)
    if it.SCHEMA_VERSION > 3:
        raise sqlite3.OperationalError("table of_newer has no column named nothing")

it._migrate = migrate if it.SCHEMA_VERSION > 3 else it._migrate
"""


def with_target(folder: Path, system: System, does: Does) -> None:
    async def body() -> None:
        target = SingleTarget(folder, RealClock(), system)
        try:
            await target.start()
            await does(target)
        finally:
            await target.stop()
        assert target.group is None or not target.group.folder.exists()

    asyncio.run(body())


def system(**parts: object) -> System:
    return System.model_validate(parts)


def fault(kind: str, **options: object) -> Fault:
    return Fault.model_validate({"kind": kind, "options": options})


def sabotaged(folder: Path, text: str) -> str:
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(text)
    return str(folder)


async def is_back(target: SingleTarget) -> None:
    await target.undo()
    await target.until_answers(f"{target.endpoints[0]}/health/ready")


@needs_group
def test_the_kernel_kills_the_node_alone_and_it_is_started_again(tmp_path: Path) -> None:
    async def does(target: SingleTarget) -> None:
        assert target.group is not None
        assert os.getpid() not in target.group.pids
        injected = await target.inject(fault("memory_at_once"))
        assert "oom_kill rose by 1" in injected.evidence
        await is_back(target)
        assert target.node.codes == [-signal.SIGKILL]

    with_target(tmp_path / "target", system(memory_mb=400), does)


@needs_group
def test_a_run_that_takes_all_memory_each_time_is_quarantined(tmp_path: Path) -> None:
    async def does(target: SingleTarget) -> None:
        await target.inject(fault("memory_at_once", kills=3))
        await is_back(target)
        assert target.http is not None
        url = f"{target.endpoints[0]}/api/v1/runs?workflow=drill_misbehave"
        run = {"state": "running"}
        while run["state"] != "paused":
            async with target.http.get(url) as response:
                (run,) = (await response.json())["items"]
            await target.clock.sleep(_POLL_S)
        assert run["reason"] == "quarantine"
        assert len(target.node.codes) == 3

    with_target(tmp_path / "target", system(memory_mb=400), does)


@needs_group
@pytest.mark.parametrize("is_guarded", [True, False])
def test_the_guard_stops_before_the_kernel_does(tmp_path: Path, *, is_guarded: bool) -> None:
    sabotage = "" if is_guarded else sabotaged(tmp_path / "sabotage", _UNGUARDED)

    async def does(target: SingleTarget) -> None:
        assert target.group is not None
        await target.inject(fault("memory_step_by_step"))
        assert (target.group.kills == 0) is is_guarded
        await is_back(target)
        assert (target.node.codes == []) is is_guarded

    with_target(tmp_path / "target", system(memory_mb=400, sabotage=sabotage), does)


@needs_group
def test_who_comes_after_a_killed_drill_takes_its_group_away(tmp_path: Path) -> None:
    async def does(target: SingleTarget) -> None:
        assert target.group is not None
        target.node.hold()
        assert not run_commands(target.undo_commands())
        assert not target.group.folder.exists()

    with_target(tmp_path / "target", system(memory_mb=400), does)


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_migration_that_fails_leaves_nothing(tmp_path: Path, *, is_whole: bool) -> None:
    sabotage = "" if is_whole else sabotaged(tmp_path / "sabotage", _HALF)

    async def does(target: SingleTarget) -> None:
        if is_whole:
            injected = await target.inject(fault("migration_fails"))
            assert "has schema 3 and nothing new" in injected.evidence
            await is_back(target)
        else:
            with pytest.raises(Broken, match="of_newer"):
                await target.inject(fault("migration_fails"))

    with_target(tmp_path / "target", system(sabotage=sabotage), does)

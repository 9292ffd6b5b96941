"""Large results: a blob beside the journal, and beyond that a step that fails for good."""

from __future__ import annotations

import random
import sqlite3
from collections import Counter
from pathlib import Path

import pytest

from llm_orchestrator import Context, Orchestrator, step, workflow
from llm_orchestrator.errors import RunFailed

TEXT = random.Random(5).randbytes(1 << 20).hex()
made: Counter[str] = Counter()


@step
async def two_mebibytes() -> str:
    made["two"] += 1
    return TEXT


@step
async def too_much() -> str:
    made["too much"] += 1
    return "x" * (65 << 20)


@workflow
async def big(ctx: Context) -> str:
    text = await ctx.step(two_mebibytes)
    await ctx.wait_signal("go")
    return text[::-1]


@workflow
async def bigger(ctx: Context) -> str:
    return await ctx.step(too_much)


@workflow
async def big_output(ctx: Context) -> str:
    return "x" * (65 << 20)


async def test_a_result_of_two_mebibytes_survives_a_restart_in_a_blob(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    made.clear()
    async with Orchestrator(f"sqlite:///{path}") as engine:
        run_id = await engine.start(big)
    with sqlite3.connect(path) as database:
        query = "SELECT LENGTH(payload) FROM journal WHERE kind = 'step_finished'"
        assert database.execute(query).fetchall() == [(33,)]
        [length] = database.execute("SELECT LENGTH(content) FROM blobs").fetchone()
        assert length > 1 << 20
    database.close()
    async with Orchestrator(f"sqlite:///{path}", workflows=[big]) as engine:
        await engine.operator.signal(run_id, "go")
        assert await engine.result(run_id) == TEXT[::-1]
    assert made["two"] == 1


async def test_a_result_that_no_journal_holds_fails_its_step_and_is_not_tried_again(
    tmp_path: Path,
) -> None:
    made.clear()
    async with Orchestrator(f"sqlite:///{tmp_path}/runs.db") as engine:
        with pytest.raises(RunFailed) as caught:
            await engine.run(bigger)
    assert made["too much"] == 1
    assert isinstance(caught.value.error, dict)
    assert "67108864 at most" in caught.value.error["message"]


async def test_an_output_that_no_journal_holds_fails_its_run(tmp_path: Path) -> None:
    async with Orchestrator(f"sqlite:///{tmp_path}/runs.db") as engine:
        with pytest.raises(RunFailed) as caught:
            await engine.run(big_output)
        assert isinstance(caught.value.error, dict)
        assert caught.value.error["kind"] == "too_large"

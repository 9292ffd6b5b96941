"""The parts fit together: an engine that opens, loads files with their children, and goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from llm_orchestrator import Context, Orchestrator, step, workflow
from llm_orchestrator.config import Config
from llm_orchestrator.errors import ConfigError, DefinitionError, Refused, RunFailed, StoreLocked
from llm_orchestrator.model import RunState
from llm_orchestrator.store.base import RunFilter
from llm_orchestrator.wire import store_path
from llm_orchestrator.wire.tools import load_workflow

CHILD = """
name: child
version: "3"
inputs: {n: integer}
steps:
  - {id: twice, type: transform, expression: "inputs.n * 2"}
outputs: {value: "{{ steps.twice.result }}"}
"""
PARENT = """
name: parent
steps:
  - id: each
    type: map
    items: "[1, 2, 3]"
    steps:
      - {id: call, type: workflow, file: parts/child.yaml, inputs: {n: "{{ item }}"}}
outputs: {values: "{{ steps.each.results }}"}
"""


def url(folder: Path) -> str:
    return f"sqlite:///{folder / 'runs.db'}"


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


async def test_a_file_brings_the_files_that_it_calls(tmp_path: Path) -> None:
    write(tmp_path, "parts/child.yaml", CHILD)
    parent = write(tmp_path, "parent.yaml", PARENT)
    async with Orchestrator(url(tmp_path)) as orchestrator:
        result = await orchestrator.run(parent)
        children = [run for run in await orchestrator.store.look.runs(_all()) if run.parent_run_id]
    assert result == {"values": [{"value": 2}, {"value": 4}, {"value": 6}]}
    assert {(run.workflow, run.version) for run in children} == {("child", "3")}


def test_files_that_call_each_other_are_refused_with_the_way_round(tmp_path: Path) -> None:
    text = "name: {}\nsteps:\n  - {{id: call, type: workflow, file: {}}}\n"
    one = write(tmp_path, "one.yaml", text.format("one", "two.yaml"))
    write(tmp_path, "two.yaml", text.format("two", "one.yaml"))
    with pytest.raises(DefinitionError, match=r"one\.yaml -> two\.yaml -> one\.yaml"):
        load_workflow(one, Config())


async def test_a_second_engine_on_the_same_file_is_refused_and_told_who_has_it(
    tmp_path: Path,
) -> None:
    async with Orchestrator(url(tmp_path)) as first:
        second = Orchestrator(url(tmp_path))
        with pytest.raises(StoreLocked, match=first.store.node_id):
            await second.store.open_as_engine()


@step
async def double(n: int) -> int:
    return 2 * n


@workflow
async def doubled(ctx: Context, n: int) -> int:
    await ctx.wait_signal("go")
    return await ctx.step(double, n)


async def test_a_run_waits_for_its_code_and_goes_on_when_it_comes(tmp_path: Path) -> None:
    async with Orchestrator(url(tmp_path)) as orchestrator:
        run_id = await orchestrator.start(doubled, {"n": 21})
    async with Orchestrator(url(tmp_path)) as orchestrator:
        await orchestrator.operator.signal(run_id, "go")
        row = await orchestrator.store.look.run(run_id)
        assert row is not None
        assert not row.state.is_final
        orchestrator.node.add_code(doubled)
        assert await orchestrator.result(run_id) == 42


async def test_the_same_key_is_the_same_run_and_another_input_is_refused(tmp_path: Path) -> None:
    @workflow
    async def echo(ctx: Context, n: int) -> int:
        return n

    async with Orchestrator(url(tmp_path)) as orchestrator:
        first, second = await asyncio.gather(
            *(orchestrator.start(echo, {"n": 1}, idempotency_key="k") for _ in range(2))
        )
        assert first == second
        assert await orchestrator.result(first) == 1
        with pytest.raises(Refused, match="another input"):
            await orchestrator.start(echo, {"n": 2}, idempotency_key="k")


async def test_a_run_that_outlives_its_limit_fails_with_the_limit(tmp_path: Path) -> None:
    @workflow(timeout_s=0.2)
    async def slow(ctx: Context) -> None:
        await ctx.wait_signal("never")

    async with Orchestrator(url(tmp_path)) as orchestrator:
        with pytest.raises(RunFailed, match=r"0\.2 s") as caught:
            await orchestrator.run(slow)
    assert caught.value.state == RunState.FAILED


@workflow
async def asks(ctx: Context, topic: str) -> list[object]:
    answer = await ctx.use("llm", provider="echo", model="m", prompt=f"about {topic}")
    await ctx.wait_signal("go")
    vector = await ctx.use("embed", provider="echo", model="m", input=answer["text"])
    return [answer["text"], len(vector["vector"])]


async def test_python_uses_built_in_steps_and_their_results_are_kept(tmp_path: Path) -> None:
    async with Orchestrator(url(tmp_path), workflows=[asks]) as orchestrator:
        run_id = await orchestrator.start(asks, {"topic": "whales"})
    async with Orchestrator(url(tmp_path), workflows=[asks]) as orchestrator:
        await orchestrator.operator.signal(run_id, "go")
        assert await orchestrator.result(run_id) == ["echo: about whales", 64]
        state = await orchestrator.operator.state(run_id)
    assert (state.finished["llm"].attempt, state.attempts, state.repeats) == (1, 2, 0)


async def test_python_hears_what_does_not_fit_a_built_in_step(tmp_path: Path) -> None:
    @workflow
    async def wrong(ctx: Context) -> None:
        await ctx.use("llm", provider="echo", modl="m", prompt="x")

    async with Orchestrator(url(tmp_path)) as orchestrator:
        with pytest.raises(RunFailed, match=r"missing key `model`.*`modl`"):
            await orchestrator.run(wrong)


def test_run_sync_needs_no_event_loop(tmp_path: Path) -> None:
    @workflow
    async def hello(ctx: Context, name: str) -> str:
        return f"hello {name}"

    assert Orchestrator(url(tmp_path)).run_sync(hello, {"name": "you"}) == "hello you"


@pytest.mark.parametrize("address", ["runs.db", "mysql://host/db", "sqlite://host/runs.db"])
def test_an_address_that_is_no_store_is_refused_with_an_example(address: str) -> None:
    with pytest.raises(ConfigError) as caught:
        store_path(address)
    assert "sqlite:///" in (caught.value.hint or "")


def _all() -> RunFilter:
    return RunFilter(limit=1000)

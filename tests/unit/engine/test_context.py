"""Python workflows: replay asks for the same steps, and code that does not is told so."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from llm_orchestrator import Context, step, workflow
from llm_orchestrator.errors import RunFailed, RunPaused
from tests.unit.engine.support import Engine, VirtualClock, virtually

Body = Callable[[Context], Awaitable[Any]]


@step
async def first() -> str:
    return "first"


@step
async def second() -> str:
    return "second"


@step
async def third() -> str:
    return "third"


def before_and_after(folder: Path, old: Body, new: Body) -> Any:
    """Run `old` until it waits for a signal, then go on with `new` under the same version."""

    async def main() -> Any:
        was = workflow(name="changing")(old)
        async with Engine(folder / "runs.db") as engine:
            run_id = await engine.start(was)
            await engine.happens("waiting")  # it has parked
        now = workflow(name="changing")(new)
        async with Engine(folder / "runs.db", workflows=(now,), clock=VirtualClock(2)) as engine:
            await engine.operator.signal(run_id, "go")
            return await engine.result(run_id)

    return virtually(main())


async def straight(ctx: Context) -> Any:
    one = await ctx.step(first)
    two = await ctx.step(second)
    await ctx.wait_signal("go")
    return [one, two]


def test_unchanged_code_goes_on(tmp_path: Path) -> None:
    assert before_and_after(tmp_path, straight, straight) == ["first", "second"]


def test_code_that_only_adds_at_its_end_goes_on(tmp_path: Path) -> None:
    async def longer(ctx: Context) -> Any:
        return [*await straight(ctx), await ctx.step(third)]

    assert before_and_after(tmp_path, straight, longer) == ["first", "second", "third"]


async def _other_name(ctx: Context) -> Any:
    await ctx.step(first)
    await ctx.step(third)
    await ctx.wait_signal("go")


async def _missing_call(ctx: Context) -> Any:
    await ctx.step(second)
    await ctx.wait_signal("go")


async def _extra_call(ctx: Context) -> Any:
    await ctx.step(first)
    await ctx.step(third)
    await ctx.step(second)
    await ctx.wait_signal("go")


async def _other_order(ctx: Context) -> Any:
    await ctx.step(second)
    await ctx.step(first)
    await ctx.wait_signal("go")


@pytest.mark.parametrize(
    ("new", "asked", "recorded"),
    [
        (_other_name, "third", "second"),
        (_missing_call, "second", "first"),
        (_extra_call, "third", "second"),
        (_other_order, "second", "first"),
    ],
)
def test_code_that_left_its_journals_path_pauses_and_shows_both_sides(
    tmp_path: Path, new: Body, asked: str, recorded: str
) -> None:
    with pytest.raises(RunPaused) as paused:
        before_and_after(tmp_path, straight, new)
    assert paused.value.reason == "nondeterminism"
    assert f"the code asks for step '{asked}'" in str(paused.value)
    assert f"the journal records '{recorded}'" in str(paused.value)


def test_code_that_ends_too_early_pauses_and_names_what_it_left_out(tmp_path: Path) -> None:
    async def shorter(ctx: Context) -> Any:
        return await ctx.step(first)

    with pytest.raises(RunPaused, match="'second', which the code no longer asks for"):
        before_and_after(tmp_path, straight, shorter)


async def _branches(ctx: Context) -> Any:
    async def branch(what: Any) -> Any:
        one = await ctx.step(what)
        await ctx.step(second)
        return one

    both = await ctx.gather(branch(first), branch(third))
    await ctx.wait_signal("go")
    return both


def test_divergence_inside_a_branch_names_the_branch(tmp_path: Path) -> None:
    async def changed(ctx: Context) -> Any:
        async def branch(what: Any) -> Any:
            return await ctx.step(what)

        await ctx.gather(branch(first), branch(first))
        await ctx.wait_signal("go")

    with pytest.raises(RunPaused, match=r"in gather/1: .*'gather/1/first'.*'gather/1/third'"):
        before_and_after(tmp_path, _branches, changed)


def test_branches_replay_whatever_order_they_ended_in(tmp_path: Path) -> None:
    assert before_and_after(tmp_path, _branches, _branches) == ["first", "third"]


def test_time_chance_and_ids_are_the_same_at_each_replay(tmp_path: Path) -> None:
    seen = []

    async def free(ctx: Context) -> Any:
        values = [ctx.now().isoformat(), ctx.random(), ctx.uuid()]
        seen.append(values)
        await ctx.wait_signal("go")
        return values

    assert before_and_after(tmp_path, free, free) == seen[0]
    assert seen[0] == seen[1]


def test_the_first_failure_of_a_gather_ends_the_others(tmp_path: Path) -> None:
    ended = []

    @step
    async def slow() -> None:
        try:
            await VirtualClock().sleep(100)
        except BaseException:
            ended.append("cancelled")
            raise

    @workflow
    async def both(ctx: Context) -> None:
        async def fail() -> None:
            await ctx.step(first)
            raise ValueError("this branch")

        await ctx.gather(ctx.step(slow), fail())

    async def main() -> None:
        async with Engine(tmp_path / "runs.db") as engine:
            with pytest.raises(RunFailed, match="this branch"):
                await engine.run(both)

    virtually(main())
    assert ended == ["cancelled"]


def test_a_map_keeps_order_and_its_limit(tmp_path: Path) -> None:
    running: list[int] = []
    most = []

    @step
    async def work(number: int) -> int:
        running.append(number)
        most.append(len(running))
        await VirtualClock().sleep(10 - number)
        running.remove(number)
        return number * 2

    @workflow
    async def mapping(ctx: Context) -> list[int]:
        return await ctx.map(lambda item: ctx.step(work, item), range(6), max_concurrency=2)

    async def main() -> None:
        async with Engine(tmp_path / "runs.db") as engine:
            assert await engine.run(mapping) == [0, 2, 4, 6, 8, 10]

    virtually(main())
    assert max(most) == 2


def test_children_give_their_output_and_their_failure(tmp_path: Path) -> None:
    @workflow
    async def child(ctx: Context, number: int) -> int:
        if number < 0:
            raise ValueError("too small")
        return number + 1

    @workflow
    async def parent(ctx: Context) -> list[Any]:
        good = await ctx.run(child, number=1)
        try:
            await ctx.run(child, number=-1)
        except RunFailed as error:
            return [good, error.state]
        return []

    async def main() -> None:
        async with Engine(tmp_path / "runs.db") as engine:
            assert await engine.run(parent) == [2, "failed"]

    virtually(main())

"""W1 to W5 and W7 on LangGraph with its SQLite or its PostgreSQL saver, durability `sync`.

A graph whose one node follows itself is its chain; nothing in it starts again by itself, so W5 is
timed as if somebody had kept all thread ids and invoked each again at once.
"""

from __future__ import annotations

import asyncio
import operator
from itertools import count
from typing import Annotated, Any, TypedDict

from langgraph.graph import END, START, StateGraph
from langgraph.types import Send

from bench.measure import (
    CRASH_RUNS,
    FAN,
    SEQUENCE,
    STEPS,
    Meter,
    arguments,
    drive,
    finish,
    in_flight,
    payload,
    say,
    size_of,
    until,
)

CHOSEN = arguments()
RESULT = payload(size_of(CHOSEN.work))
POOL = 20
counts = {"in_five": 0, "past_six": 0}
numbers = count()


class State(TypedDict, total=False):
    done: int
    steps: int
    value: dict[str, Any]
    results: Annotated[list[Any], operator.add]


async def step(state: State) -> Any:
    if CHOSEN.work.startswith("W5") and state["done"] == 4:
        counts["in_five"] += 1
        if CHOSEN.work == "W5-before":
            await asyncio.sleep(3600)
    if state["done"] == 6:
        counts["past_six"] += 1
    return {"done": state["done"] + 1, "value": RESULT}


async def one_of_many(state: State) -> Any:
    return {"results": [RESULT]}


def make_chain(saver: Any) -> Any:
    graph = StateGraph(State)
    graph.add_node("step", step)
    graph.add_edge(START, "step")
    graph.add_conditional_edges(
        "step", lambda state: "step" if state["done"] < state["steps"] else END
    )
    return graph.compile(checkpointer=saver)


def make_fan(saver: Any) -> Any:
    graph = StateGraph(State)
    graph.add_node("work", one_of_many)
    graph.add_node("join", lambda state: {"steps": len(state["results"])})
    graph.add_conditional_edges(
        START, lambda state: [Send("work", {}) for _ in range(state["steps"])], ["work"]
    )
    graph.add_edge("work", "join")
    graph.add_edge("join", END)
    return graph.compile(checkpointer=saver)


async def make_saver() -> Any:
    """Loads one driver only: W7 times the import."""
    if CHOSEN.store:
        from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver  # noqa: PLC0415
        from psycopg.rows import dict_row  # noqa: PLC0415
        from psycopg_pool import AsyncConnectionPool  # noqa: PLC0415

        settings = {"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row}
        pool: Any = AsyncConnectionPool(
            CHOSEN.store, min_size=POOL, max_size=POOL, open=False, kwargs=settings
        )
        await pool.open()
        saver: Any = AsyncPostgresSaver(pool)
    else:
        import aiosqlite  # noqa: PLC0415
        from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver  # noqa: PLC0415

        saver = AsyncSqliteSaver(await aiosqlite.connect(CHOSEN.folder / "langgraph.sqlite"))
    await saver.setup()
    return saver


async def run(graph: Any, steps: int, *, is_new: bool = True) -> None:
    config = {"configurable": {"thread_id": f"run-{next(numbers)}"}, "recursion_limit": 10_000}
    start = {"done": 0, "steps": steps} if is_new else None
    await graph.ainvoke(start, config, durability="sync")


async def crash(chain: Any) -> None:
    is_new = CHOSEN.work == "W5-before"
    tasks = [asyncio.create_task(run(chain, 10, is_new=is_new)) for _ in range(CRASH_RUNS)]
    name = "in_five" if is_new else "past_six"
    await until(lambda: counts[name] >= CRASH_RUNS)
    say("READY" if is_new else "ADVANCED")
    if is_new:
        await asyncio.gather(*tasks)
    finish()


async def main() -> None:
    work = CHOSEN.work
    saver = await make_saver()
    chain = make_chain(saver)
    if work.startswith("W5"):
        await crash(chain)
    if work == "W7":
        await run(chain, 1)
        say("HELLO")
        finish()
    await run(chain, 5)
    meter = Meter()
    if work in ("W1", "W1.500", "W4"):
        await drive(lambda: run(chain, STEPS), CHOSEN.runs, in_flight(work))
        finish(**meter.per_step(CHOSEN.runs * STEPS))
    if work == "W2":
        await run(chain, SEQUENCE)
        finish(**meter.per_step(SEQUENCE))
    await run(make_fan(saver), FAN)
    finish(**meter.per_step(FAN))


if __name__ == "__main__":
    asyncio.run(main())

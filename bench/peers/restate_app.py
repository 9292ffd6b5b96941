"""What Restate's server calls: its handlers, and beside them /stat, the counters of W5."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import restate

from bench.measure import payload

RESULTS = {size: payload(size) for size in (200, 20_000)}
counts = {"in_five": 0, "past_six": 0}
service = restate.Service("bench")


@service.handler()
async def chain(context: restate.Context, given: dict[str, int]) -> int:
    result = RESULTS[given["size"]]

    async def no_op() -> Any:
        return result

    for number in range(given["steps"]):
        await context.run_typed(f"s{number}", no_op)
    return given["steps"]


@service.handler()
async def fan(context: restate.Context, given: dict[str, int]) -> int:
    async def no_op() -> Any:
        return RESULTS[200]

    steps = [context.run_typed(f"s{number}", no_op) for number in range(given["steps"])]
    await restate.gather(*steps)
    return len(steps)


@service.handler()
async def crash(context: restate.Context, given: dict[str, int]) -> None:
    async def no_op() -> Any:
        return RESULTS[200]

    async def five() -> Any:
        counts["in_five"] += 1
        if os.environ.get("BENCH_IS_STUCK"):
            await asyncio.sleep(3600)
        return RESULTS[200]

    for number in range(4):
        await context.run_typed(f"s{number}", no_op)
    await context.run_typed("five", five)
    await context.run_typed("six", no_op)
    counts["past_six"] += 1
    for number in range(4):
        await context.run_typed(f"t{number}", no_op)


_handlers = restate.app(services=[service])


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http" and scope["path"] == "/stat":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        body = f"{counts['in_five']} {counts['past_six']} {os.getpid()}".encode()
        await send({"type": "http.response.body", "body": body})
        return
    await _handlers(scope, receive, send)

"""A workflow in Python that waits: for time, for a signal, for another workflow.

Shows: `ctx.sleep`, `ctx.wait_signal` with a time limit, `ctx.run` (a child with a journal of its
own), an effect that must not happen twice (`effect="once"`), `ctx.uuid`, which is the same at each
replay. Kill the program while it waits and start it again: it goes on waiting.

    python examples/python_order.py
"""

import asyncio
import sys
from pathlib import Path

from llm_orchestrator import Context, Orchestrator, step, workflow


@step(effect="once", on_unknown="ask")
async def charge(order: str, amount: int, key: str) -> dict[str, object]:
    """Its intent is recorded before it is issued; after a crash in between a person is asked."""
    print(f"charging {amount} for {order}", file=sys.stderr)
    return {"order": order, "charged": amount, "key": key}


@step
async def pack(item: str) -> str:
    return f"packed {item}"


@workflow
async def parcel(ctx: Context, items: list[str]) -> list[str]:
    return await ctx.map(lambda item: ctx.step(pack, item), items)


@workflow(version="2")
async def order(ctx: Context, name: str, items: list[str]) -> dict[str, object]:
    receipt = await ctx.step(charge, name, 10 * len(items), ctx.uuid())
    await ctx.sleep(0.05)  # days in real life; the run leaves memory meanwhile
    try:
        address = await ctx.wait_signal("address", timeout_s=3600)
    except TimeoutError:
        return {"receipt": receipt, "sent": False}
    packed = await ctx.run(parcel, items=items)
    return {"receipt": receipt, "sent": True, "to": address["street"], "packed": packed}


async def main(store: str) -> dict[str, object]:
    async with Orchestrator(store, workflows=[order, parcel]) as orchestrator:
        run_id = await orchestrator.start(order, {"name": "order-7", "items": ["lamp", "shade"]})
        # Anybody may send it, also another process: llmo runs signal RUN address '{"street": ...}'
        await orchestrator.operator.signal(run_id, "address", {"street": "Quay 3"})
        return await orchestrator.result(run_id)


if __name__ == "__main__":
    place = sys.argv[1] if len(sys.argv) > 1 else "sqlite:///" + str(Path("order.db"))
    print(asyncio.run(main(place)))

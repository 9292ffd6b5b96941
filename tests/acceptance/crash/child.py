"""What runs in a child: an engine that is stopped at a point, or a plain one that goes on.

Both do what a client would: ask for the run under its idempotency key, send its signals (with a
sender's key), decide what nobody knows. The plain one also reports how the journal stood when it
came, and how it stands at the end.
"""

from __future__ import annotations

import asyncio
import json
import traceback
from pathlib import Path
from typing import Any, cast

from llm_orchestrator.clock import RealClock
from llm_orchestrator.config import Config
from llm_orchestrator.engine import gate
from llm_orchestrator.engine.control import Choice
from llm_orchestrator.engine.replay import fold
from llm_orchestrator.errors import RunFailed, RunPaused
from llm_orchestrator.language.load import load_text
from llm_orchestrator.model import Entry, Usage, Workflow
from llm_orchestrator.providers.prices import PriceBook
from llm_orchestrator.store.base import Batch, Register
from llm_orchestrator.store.journal import decode
from llm_orchestrator.store.sqlite import SQLiteStore
from llm_orchestrator.wire import Orchestrator
from llm_orchestrator.wire.tools import make_tools
from tests.acceptance.crash.flows import FLOWS, Flow, inner, text_of
from tests.acceptance.crash.points import (
    Points,
    StoppingOrchestrator,
    StoppingStore,
    stop_requests,
)
from tests.acceptance.crash.witness import WITNESS

Json = Any
SECONDS_MAX = 60
RESULTS: dict[str, Json] = {
    "post": {"body": None, "status": 200, "headers": {}},
    "hook": {"body": None, "status": 200, "headers": {}},
}
"""What a person says that a step returned, who found out that it was done."""


def warm_up() -> None:
    """Import whatever an engine imports late, before anything forks."""
    for name, flow in FLOWS.items():
        if flow.code is None:
            load_text(text_of(name), name)
    store = SQLiteStore(Path("none.db"), node_id="none", clock=RealClock())
    tools = make_tools(Config(), store, RealClock())
    for kind in tools.step_types.names():
        if not tools.step_types.is_control(kind):
            tools.step_types.leaf(kind)
        else:
            tools.step_types.control(kind)
    for provider in ("openai", "anthropic"):
        tools.providers.llm(provider)
        PriceBook().price(provider, "fake", used=Usage(1, 1))  # loads the table of prices
    tools.providers.embedding("openai")
    import numpy  # noqa: F401

    from llm_orchestrator.steps import action_file, action_http, action_log  # noqa: F401


def say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def main(order: dict[str, Any]) -> None:
    """Do what an order says: {flow, folder, url, stop_at} (stop_at None: plain)."""
    gate.PARK_S = 0.1  # so that short waits leave memory too
    folder = Path(order["folder"])
    WITNESS.path, WITNESS.url = folder / "witness", order["url"]
    try:
        asyncio.run(_bounded(order, folder))
    except BaseException:  # noqa: BLE001 (told to the parent, whatever it is)
        say({"error": traceback.format_exc()})


async def _bounded(order: dict[str, Any], folder: Path) -> None:
    async with asyncio.timeout(SECONDS_MAX):
        if order["stop_at"] is None:
            await _go_on(order, folder)
        else:
            await _run_to_point(order, folder)


def _config(order: dict[str, Any], folder: Path) -> Config:
    return Config(
        data_dir=folder,
        outgoing_allow=["127.0.0.1"],
        secrets={
            "OPENAI_API_KEY": "key",
            "OPENAI_BASE_URL": order["url"] + "/v1",
            "ANTHROPIC_API_KEY": "key",
            "ANTHROPIC_BASE_URL": order["url"] + "/v1",
        },
    )


async def _run_to_point(order: dict[str, Any], folder: Path) -> None:
    points = Points(order["stop_at"], say)
    WITNESS.points = points
    stop_requests(points)
    store = StoppingStore(folder / "runs.db", node_id="stopping", clock=RealClock())
    store.points = points
    parked = asyncio.Event()
    engine = StoppingOrchestrator(
        config=_config(order, folder), store=store, publish=_watch(parked), workflows=_code(order)
    )
    engine.points = points
    async with engine:
        state, output = await _carry(engine, order, parked)
    say({"end": {"state": state, "output": output, "points": points.count}})


def _watch(parked: asyncio.Event) -> Any:
    def publish(run_id: str, what: str, key: str, attempt: int, data: dict[str, Json]) -> None:
        if what == "waiting" and not key:
            parked.set()

    return publish


async def _go_on(order: dict[str, Any], folder: Path) -> None:
    """A plain process: nothing wrapped, nothing counted."""
    before = await _look(folder)
    parked = asyncio.Event()
    if before:
        parked.set()
    engine = Orchestrator(
        f"sqlite:///{folder / 'runs.db'}",
        config=_config(order, folder),
        publish=_watch(parked),
        workflows=_code(order),
    )
    async with engine:
        state, output = await _carry(engine, order, parked)
    after = await _look(folder)
    say({"end": {"state": state, "output": output, "before": before, "after": after}})


def _code(order: dict[str, Any]) -> list[Any]:
    flow = FLOWS[order["flow"]]
    return [] if flow.code is None else [flow.code, inner]


async def _carry(
    engine: Orchestrator, order: dict[str, Any], parked: asyncio.Event
) -> tuple[str, Json]:
    """Ask for the run, do a person's part, and wait for the end."""
    flow = FLOWS[order["flow"]]
    if flow.child:
        await engine.store.commit(Batch(changes=(Register(_stored(flow.child)),)))
    folder = Path(order["folder"])
    wanted: Any = flow.code
    if wanted is None:
        wanted = folder / "flow.yaml"
        await asyncio.to_thread(wanted.write_text, text_of(order["flow"]))
    inputs = {"url": order["url"], "folder": str(folder)}
    run_id = await engine.start(wanted, inputs, idempotency_key="the one")
    sender = asyncio.create_task(_send(engine, run_id, flow, parked))
    try:
        return await _end(engine, run_id, flow)
    finally:
        sender.cancel()
        await asyncio.gather(sender, return_exceptions=True)


def _stored(text: str) -> Workflow:
    made = load_text(text)
    return Workflow(made.name, made.version, made.digest, made.canonical())


async def _send(engine: Orchestrator, run_id: str, flow: Flow, parked: asyncio.Event) -> None:
    await parked.wait()
    for number, (name, payload) in enumerate(flow.signals):
        await engine.operator.signal(run_id, name, payload, sender_key=f"sender-{number}")


async def _end(engine: Orchestrator, run_id: str, flow: Flow) -> tuple[str, Json]:
    while True:
        try:
            return "completed", await engine.result(run_id)
        except RunFailed as error:
            return error.state, None
        except RunPaused as error:
            if error.reason != "unknown_outcome" or not flow.choose:
                raise
            [step] = flow.once
            found = RESULTS.get(step, {"result": {"bytes": 22}})
            say({"decided": flow.choose, "step": step})
            choose = cast("Choice", flow.choose)
            await engine.operator.decide(run_id, step, choose, result=found)


async def _look(folder: Path) -> list[dict[str, Any]]:
    """Every run of the store, its journal and its row, and whatever is wrong with them."""
    if not (folder / "runs.db").exists():
        return []
    store = SQLiteStore(folder / "runs.db", node_id="looking", clock=RealClock())
    await store.open_as_client()
    try:
        ids = await store.look.run_ids()
        journals = await store.look.load(ids)
        return [await _judge(store, run_id, journals[run_id].entries, journals) for run_id in ids]
    finally:
        await store.close()


async def _judge(
    store: SQLiteStore, run_id: str, entries: list[Entry] | Any, journals: Any
) -> dict[str, Any]:
    wrong = [flaw.what for flaw in journals[run_id].flaws]
    if [entry.seq for entry in entries] != list(range(1, len(entries) + 1)):
        wrong.append("seq is not dense")
    epochs = [entry.epoch for entry in entries]
    if epochs != sorted(epochs):
        wrong.append("the epoch fell")
    state = fold(run_id, entries)
    row = await store.look.run(run_id)
    if row is None:
        return {"run": run_id, "wrong": [*wrong, "no row"], "entries": []}
    kept_row = await store.look.row(run_id)
    assert kept_row is not None
    stored = [_value(kept_row.change.output), _value(kept_row.change.error)]
    for name, own, kept in (
        ("state", state.state, row.state),
        ("reason", state.reason, row.reason),
        ("owner", state.owner, row.owner),
        ("epoch", state.epoch, row.epoch),
        ("result", [state.output, state.error], stored),
        ("workflow", state.accepted["workflow"], row.workflow),
    ):
        if own != kept:
            wrong.append(f"the row's {name} is {kept!r}, the fold's {own!r}")
    return {
        "run": run_id,
        "wrong": wrong,
        "state": state.state,
        "usage": state.usage.to_json(),
        "repeats": state.repeats,
        "free": [done.result for key, done in state.finished.items() if key in _FREE],
        "entries": [[entry.kind, entry.step, entry.attempt] for entry in entries],
    }


_FREE = ("now", "random", "uuid")


def _value(column: bytes | None) -> Json:
    return None if column is None else decode(column).get("value")

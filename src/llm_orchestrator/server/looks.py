"""What a journal tells, as answers: entries, checkpoints, steps, and why a run does not move."""

from __future__ import annotations

import json

from llm_orchestrator.engine.control import read_journal
from llm_orchestrator.engine.explain import Surroundings, explain
from llm_orchestrator.engine.flows import is_code
from llm_orchestrator.engine.forks import plan
from llm_orchestrator.engine.replay import Fold, checkpoints, fold, hidden
from llm_orchestrator.engine.steps_view import steps_of
from llm_orchestrator.errors import NotFound, StoreDamaged
from llm_orchestrator.model import Entry, Json, RunState, Workflow, stamp
from llm_orchestrator.server import acts, shapes
from llm_orchestrator.server.surface import Surface
from llm_orchestrator.store.base import RunFilter

Page = dict[str, Json]


def page_of(rows: list[dict[str, Json]], cursor: str | None, limit: int) -> Page:
    """`limit` rows behind a cursor; `seq` orders them."""
    after = int(cursor or 0)
    left = [row for row in rows if row["seq"] > after]
    following = str(left[limit - 1]["seq"]) if len(left) > limit else None
    return {"items": left[:limit], "next": following}


async def journal_page(surface: Surface, run_id: str, cursor: str | None, *, limit: int) -> Page:
    """models.JournalPage. A damaged journal's rows are shown as they are stored."""
    journal = (await surface.store.look.load([run_id])).get(run_id)
    if journal is None:
        raise NotFound(f"there is no run {run_id}", hint="llmo runs list")
    entries: list[Entry] = list(journal.entries)
    if journal.flaws:
        entries = await surface.store.look.stored(run_id)
    flaws = [
        {"seq": flaw.seq, "what": flaw.what, "is_mendable": flaw.is_mendable}
        for flaw in journal.flaws
    ]
    places = page_of([{"seq": entry.seq} for entry in entries], cursor, limit)
    wanted = {place["seq"] for place in places["items"]}
    items = [shapes.entry_facts(entry) for entry in entries if entry.seq in wanted]
    return {"items": items, "flaws": flaws, "next": places["next"]}


async def all_checkpoints(surface: Surface, run_id: str) -> list[dict[str, Json]]:
    """models.CheckpointFacts of the beginning and of every finished step."""
    entries = (await read_journal(surface.store, run_id)).entries
    taken_back = hidden(entries)
    points = [*entries[:1], *checkpoints(entries)]
    return [
        {
            "checkpoint": f"{run_id}:{entry.seq}",
            "seq": entry.seq,
            "step": entry.step,
            "recorded_at": stamp(entry.recorded_at),
            "is_hidden": entry.seq in taken_back,
        }
        for entry in points
    ]


async def newest_checkpoint(surface: Surface, run_id: str) -> dict[str, Json]:
    """The one that a restore would go back to now."""
    found = await all_checkpoints(surface, run_id)
    return [point for point in found if not point["is_hidden"]][-1]


async def steps(surface: Surface, run_id: str) -> dict[str, Json]:
    """models.StepsView."""
    entries = (await read_journal(surface.store, run_id)).entries
    state = fold(run_id, entries)
    rows = [row.to_json() for row in steps_of(entries)]
    heard = {row["step"] for row in rows}
    planned = [] if state.state.is_final else await _planned(surface, state)
    return {"items": rows, "planned": [name for name in planned if name not in heard]}


async def _definition(surface: Surface, state: Fold) -> Workflow | None:
    """What the run runs; None when it is not there any more, or damaged."""
    names = [state.accepted[key] for key in ("workflow", "version", "digest")]
    try:
        return await surface.store.shelf.workflow(*names)
    except StoreDamaged:
        return None


async def _planned(surface: Surface, state: Fold) -> list[str]:
    """The top-level steps of a definition, in file order; none for a Python workflow."""
    stored = await _definition(surface, state)
    found = json.loads(stored.definition).get("steps", []) if stored is not None else []
    return [str(step["id"]) for step in found]


async def explained(surface: Surface, run_id: str) -> dict[str, Json]:
    """models.Explained."""
    row, state = await acts.run_and_state(surface, run_id)
    stored = await _definition(surface, state)
    node, running, limit = surface.node, 0, None
    if node is not None and (bound := node.driver.options.queues.get(row.queue)) is not None:
        limit = bound.concurrency or None
    if limit is not None:
        busy = RunFilter(states=(RunState.RUNNING,), queue=row.queue, limit=10_000)
        running = len(await surface.store.look.runs(busy))
    around = Surroundings(
        is_engine_alive=await surface.store.is_served(),
        is_python=stored is not None and is_code(stored),
        queue_running=running,
        queue_max=limit,
    )
    found = explain(state, row, surface.clock.now_us(), around=around)
    return {
        "run_id": run_id,
        "state": state.state.value,
        "reason": state.reason,
        "sentence": found.sentence,
        "command": found.command,
    }


async def fork_plan(surface: Surface, run_id: str, step: str | None) -> dict[str, Json]:
    """What a fork from `step` keeps and does again, as models.Forked has it."""
    entries = (await read_journal(surface.store, run_id)).entries
    state = fold(run_id, entries)
    found = plan(entries, state, step)
    redone = [row.to_json() for row in found.redone]
    begun = {row["step"] for row in redone} | set(found.kept)
    planned = [name for name in await _planned(surface, state) if name not in begun]
    usage = found.usage.to_json()
    return {
        "run_id": None,
        "fork_of": run_id,
        "step": step,
        "version": state.accepted["version"],
        "kept": list(found.kept),
        "redone": redone,
        "never_done": planned,
        **{key: usage[key] for key in ("cost_usd", "input_tokens", "output_tokens")},
    }

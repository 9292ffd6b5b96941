"""The verbs of `llmo runs` that look and change nothing. They work with and without an engine.

What decides or pays is read through the checked journal: a damaged result is never printed, the
exit code is 8 and the hint says which command mends it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from llm_orchestrator.cli.given import read_ids, read_pairs
from llm_orchestrator.cli.options import Format, Output, RunId, RunIds
from llm_orchestrator.cli.output import (
    dollars,
    duration,
    emit,
    print_object,
    print_rows,
    print_table,
    to_json,
)
from llm_orchestrator.cli.report import report
from llm_orchestrator.cli.run_result import ResultFormat, print_result
from llm_orchestrator.cli.session import Session, session_of
from llm_orchestrator.errors import NotFound, OrchestratorError, StoreDamaged
from llm_orchestrator.model import Entry, Json, Run, RunState, stamp

if TYPE_CHECKING:
    from llm_orchestrator.engine.replay import Fold
    from llm_orchestrator.store.base import Database, Store

LIST_COLUMNS = ("run_id", "workflow", "version", "state", "reason", "created_at", "time")
STEP_COLUMNS = ("step", "state", "attempts", "tokens", "cost", "time", "seq", "note")
PARTIAL = 3
ENTRY_COLUMNS = ("seq", "epoch", "kind", "step", "attempt", "size", "digest", "recorded_at")


class EntryFormat(StrEnum):
    """How `watch` prints what happens."""

    TEXT = "text"
    JSONL = "jsonl"


def list_runs(
    context: typer.Context,
    *,
    states: Annotated[
        list[RunState] | None, typer.Option("--state", help="Only these states.")
    ] = None,
    workflow: Annotated[str | None, typer.Option(help="Only runs of this workflow.")] = None,
    label: Annotated[
        str | None, typer.Option(metavar="NAME=VALUE", help="Only runs with this label.")
    ] = None,
    queue: Annotated[str | None, typer.Option(help="Only runs of this queue.")] = None,
    parent: Annotated[str | None, typer.Option(metavar="RUN", help="Only its children.")] = None,
    before: Annotated[
        str | None, typer.Option(metavar="RUN", help="Only older runs: the next page.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
    output: Output = Format.TABLE,
) -> None:
    """List runs, the newest first."""
    from llm_orchestrator.store.base import RunFilter

    session = session_of(context)
    pairs = read_pairs([label], "--label") if label else {}
    wanted = RunFilter(
        states=tuple(states or ()),
        workflow=workflow,
        parent_run_id=parent,
        queue=queue,
        label=next(iter(pairs.items()), None),
        before=before,
        limit=limit,
    )

    async def work() -> tuple[list[Run], int]:
        async with session.client() as store:
            return await store.look.runs(wanted), store.clock.now_us()

    found, now = session.run(work())
    rows = [facts_of(run) | _time(run, now) for run in found]
    print_rows(rows, output, columns=LIST_COLUMNS)
    if not rows:
        session.note("no runs")
    elif len(rows) == limit:
        session.note(f"hint: more with --before {rows[-1]['run_id']}")


def facts_of(run: Run) -> dict[str, Json]:
    """A row of `runs` for printing."""
    return {
        "run_id": run.run_id,
        "workflow": run.workflow,
        "version": run.version,
        "digest": run.digest,
        "state": str(run.state),
        "reason": run.reason,
        "queue": run.queue,
        "priority": run.priority,
        "labels": dict(run.labels),
        "owner": run.owner,
        "epoch": run.epoch,
        "idempotency_key": run.idempotency_key,
        "parent_run_id": run.parent_run_id,
        "wake_at": stamp(run.wake_at) if run.wake_at < 1 << 60 else None,
        "created_at": stamp(run.created_at),
        "started_at": stamp(run.started_at),
        "finished_at": stamp(run.finished_at),
    }


def _time(run: Run, now: int) -> dict[str, Json]:
    if run.started_at is None:
        return {"time": None}
    return {"time": duration(((run.finished_at or now) - run.started_at) / 1000)}


class Seen(NamedTuple):
    """What is known of one run. `code`: the exit code if it is the only one."""

    facts: dict[str, Json] | None
    code: int = 0
    error: OrchestratorError | None = None


LookAt = Callable[["Session", "Database", str], Awaitable[Seen]]


def _each(
    session: Session,
    given: list[str],
    look_at: LookAt,
    *,
    write: Callable[[dict[str, Json]], None],
    output: Format,
) -> int:
    """Print each run. One that is named is printed as one thing, several (or `-`) as a list."""
    ids = read_ids(given)

    async def work() -> list[Seen]:
        async with session.client() as store:
            return [await _see(session, store, run_id, look_at=look_at) for run_id in ids]

    seen = session.run(work())
    rows = [each.facts for each in seen if each.facts is not None]
    if output is Format.TABLE:
        for number, facts in enumerate(rows):
            if number:
                emit("")
            write(facts)
    elif given == ids and len(ids) == 1 and output in (Format.JSON, Format.YAML):
        for facts in rows:
            print_object(facts, output)
    else:
        print_rows(rows, output, columns=())
    for each in seen:
        if each.error is not None:
            report(each.error, is_debug=session.flags.is_debug)
    codes = [each.code for each in seen if each.code]
    return 0 if not codes else codes[0] if len(codes) == len(seen) else PARTIAL


async def _see(session: Session, store: Database, run_id: str, *, look_at: LookAt) -> Seen:
    try:
        return await look_at(session, store, run_id)
    except NotFound as error:
        return Seen(None, error.exit_code, error)


def show(context: typer.Context, run_ids: RunIds, *, output: Output = Format.TABLE) -> int:
    """Show runs and their steps: attempts, tokens, cost, time, waits."""
    return _each(session_of(context), run_ids, _show, write=_print_run, output=output)


async def _show(session: Session, store: Database, run_id: str) -> Seen:
    from llm_orchestrator.cli.follow import read_journal
    from llm_orchestrator.engine.replay import fold
    from llm_orchestrator.engine.steps_view import steps_of

    row = await store.look.run(run_id)
    try:
        journal = await read_journal(store, run_id)
    except StoreDamaged as error:
        facts = None if row is None else {**facts_of(row), "steps": []}
        return Seen(facts, error.exit_code, error)
    state = fold(run_id, journal.entries)
    steps = [step.to_json() for step in steps_of(journal.entries)]
    heard = {step["step"] for step in steps}
    steps += [
        {"step": name, "state": "pending"}
        for name in await _planned(store, state)
        if name not in heard and not state.state.is_final
    ]
    return Seen({**_merged(run_id, row, state), "steps": steps})


def _merged(run_id: str, row: Run | None, state: Fold) -> dict[str, Json]:
    """The row of `runs`, corrected and completed by the journal, which is the truth."""
    facts: dict[str, Json] = facts_of(row) if row is not None else {"run_id": run_id}
    return facts | {
        "workflow": state.accepted.get("workflow"),
        "version": state.accepted.get("version"),
        "state": str(state.state),
        "reason": state.reason,
        "input": state.accepted.get("input"),
        "output": state.output,
        "error": state.error,
        **state.usage.to_json(),
        "attempts": state.attempts,
        "repeats": state.repeats,
        "rewinds": state.rewinds,
        "entries": state.seq,
    }


async def _planned(store: Store, state: Fold) -> list[str]:
    """The top-level steps of a definition, in file order; none for a Python workflow."""
    import json

    accepted = state.accepted
    try:
        stored = await store.shelf.workflow(
            accepted["workflow"], accepted["version"], accepted["digest"]
        )
    except StoreDamaged:
        return []
    steps = json.loads(stored.definition).get("steps", []) if stored is not None else []
    return [str(step["id"]) for step in steps]


def _print_run(facts: dict[str, Json]) -> None:
    steps: list[dict[str, Json]] = facts["steps"]
    tokens = f"{facts.get('input_tokens', 0)}+{facts.get('output_tokens', 0)}"
    shown = {
        "run": facts["run_id"],
        "workflow": f"{facts.get('workflow')} {facts.get('version')}",
        "state": f"{facts['state']} ({facts['reason']})" if facts["reason"] else facts["state"],
        "created": facts.get("created_at"),
        "finished": facts.get("finished_at"),
        "parent": facts.get("parent_run_id"),
        "labels": to_json(facts["labels"], indent=None) if facts.get("labels") else None,
        "tokens": tokens if tokens != "0+0" else None,
        "cost": dollars(float(facts.get("cost_usd", 0.0))) if facts.get("cost_usd") else None,
        "repeats": facts.get("repeats") or None,
        "rewinds": facts.get("rewinds") or None,
        "error": facts["error"].get("message") if isinstance(facts.get("error"), dict) else None,
    }
    for name, value in shown.items():
        if value not in (None, ""):
            emit(f"{name + ':':<10}{value}")
    if steps:
        emit("")
        print_table([_step_row(step) for step in steps], STEP_COLUMNS)


def _step_row(step: dict[str, Json]) -> dict[str, Json]:
    tokens = f"{step.get('input_tokens', 0)}+{step.get('output_tokens', 0)}"
    notes = [str(step["wait"])] if step.get("wait") else []
    if step.get("error"):
        notes.append(str(step["error"]))
    if step.get("repeats"):
        notes.append(f"{step['repeats']} repeated after a crash")
    if step.get("is_copy"):
        notes.append("copied by a fork")
    return {
        **step,
        "tokens": tokens if tokens != "0+0" else None,
        "cost": dollars(float(step.get("cost_usd", 0.0))),
        "time": duration(step.get("ms")),
        "note": "; ".join(notes),
    }


def explain(context: typer.Context, run_ids: RunIds, *, output: Output = Format.TABLE) -> int:
    """Say in one sentence why a run is not moving, and which command moves it."""
    return _each(session_of(context), run_ids, _explain, write=_print_reason, output=output)


def _print_reason(facts: dict[str, Json]) -> None:
    emit(f"run {facts['run_id']} is {facts['state']}: {facts['sentence']}")
    emit(str(facts["command"]))


async def _explain(session: Session, store: Database, run_id: str) -> Seen:
    from llm_orchestrator.cli.follow import read_fold
    from llm_orchestrator.engine.explain import Surroundings
    from llm_orchestrator.engine.explain import explain as reason_of
    from llm_orchestrator.engine.flows import is_code
    from llm_orchestrator.store.base import RunFilter
    from llm_orchestrator.wire import node_options

    try:
        row = await store.look.run(run_id)
        state = await read_fold(store, run_id)
    except StoreDamaged as error:
        command = error.hint or f"llmo journal repair {run_id} --dry-run"
        facts = {"run_id": run_id, "state": "damaged", "sentence": error.message}
        return Seen(facts | {"command": command}, error.exit_code)
    accepted = state.accepted
    stored = await store.shelf.workflow(
        accepted["workflow"], accepted["version"], accepted["digest"]
    )
    queue = str(accepted.get("queue", "default"))
    limits = node_options(session.config).queues.get(queue)
    limit = limits.concurrency or None if limits is not None else None
    running = RunFilter(states=(RunState.RUNNING,), queue=queue, limit=10_000)
    around = Surroundings(
        is_engine_alive=await store.is_served(),
        is_python=stored is not None and is_code(stored),
        queue_running=len(await store.look.runs(running)) if limit is not None else 0,
        queue_max=limit,
    )
    found = reason_of(state, row, store.clock.now_us(), around=around)
    return Seen(
        {
            "run_id": run_id,
            "state": str(state.state),
            "reason": state.reason,
            "sentence": found.sentence,
            "command": found.command,
        }
    )


def result(
    context: typer.Context,
    run_id: RunId,
    *,
    output: Annotated[
        ResultFormat, typer.Option("--output", "-o", help="How to print.")
    ] = ResultFormat.JSON,
) -> int:
    """Print the result of a run that has ended."""
    from llm_orchestrator.cli.follow import end_of, read_fold
    from llm_orchestrator.errors import Refused
    from llm_orchestrator.wire import output_of

    session = session_of(context)

    async def work() -> Fold:
        async with session.client() as store:
            return await read_fold(store, run_id)

    state = session.run(work())
    if not state.state.is_final and state.state is not RunState.PAUSED:
        raise Refused(
            f"run {run_id} is {state.state} and has no result yet", hint=f"llmo runs watch {run_id}"
        )
    print_result(output_of(end_of(state)), output)
    return 0


def journal(
    context: typer.Context,
    run_id: RunId,
    *,
    has_payload: Annotated[bool, typer.Option("--payload", help="Print what they hold.")] = False,
    output: Output = Format.TABLE,
) -> int:
    """Print the entries of a run's journal, damaged ones included."""
    session = session_of(context)

    async def work() -> tuple[list[Entry], StoreDamaged | None]:
        async with session.client() as store:
            stored = await store.look.stored(run_id)
            checked = (await store.look.load([run_id])).get(run_id)
            if checked is None:
                raise NotFound(f"there is no run {run_id}", hint="llmo runs list")
            if not checked.flaws:
                return list(checked.entries), None
            what = "; ".join(f"entry {flaw.seq}: {flaw.what}" for flaw in checked.flaws[:5])
            hint = f"llmo journal repair {run_id} --dry-run"
            return stored, StoreDamaged(f"run {run_id} is damaged: {what}", hint=hint)

    entries, damage = session.run(work())
    rows = [entry_facts(entry, has_payload=has_payload) for entry in entries]
    columns = (*ENTRY_COLUMNS, "payload") if has_payload else ENTRY_COLUMNS
    if output is Format.TABLE and not has_payload:
        rows = [{**row, "digest": str(row["digest"])[:12]} for row in rows]
    print_rows(rows, output, columns=columns, key="id")
    return report(damage, is_debug=session.flags.is_debug) if damage is not None else 0


def entry_facts(entry: Entry, *, has_payload: bool) -> dict[str, Json]:
    """An entry for printing. Columns that damage has changed are shown as they are."""
    from llm_orchestrator.store.journal import decode

    digest: Json = entry.digest
    payload: Json = entry.payload
    facts: dict[str, Json] = {
        "id": f"{entry.run_id}:{entry.seq}",
        "seq": entry.seq,
        "epoch": entry.epoch,
        "kind": str(entry.kind),
        "step": entry.step,
        "attempt": entry.attempt,
        "size": len(payload) if isinstance(payload, bytes) else None,
        "digest": digest.hex() if isinstance(digest, bytes) else repr(digest),
        "recorded_at": stamp(entry.recorded_at),
    }
    if has_payload:
        try:
            facts["payload"] = decode(payload)
        except (StoreDamaged, TypeError, AttributeError) as error:
            facts["payload"] = f"unreadable: {error}"
    return facts


def watch(
    context: typer.Context,
    run_id: RunId,
    *,
    is_streaming: Annotated[
        bool, typer.Option("--stream", help="Show answers as they come, on stderr.")
    ] = False,
    timeout_s: Annotated[
        float | None, typer.Option("--timeout", min=0.0, help="Stop watching after SECONDS.")
    ] = None,
    output: Annotated[
        EntryFormat, typer.Option("--output", "-o", help="Lines, or entries as JSON lines.")
    ] = EntryFormat.TEXT,
) -> int:
    """Follow a run until it ends or pauses; the exit code says how it ended."""
    from llm_orchestrator.cli.runs_watch import watch_run

    session = session_of(context)
    return session.run(
        watch_run(
            session,
            run_id,
            is_streaming=is_streaming,
            timeout_s=timeout_s,
            is_jsonl=output is EntryFormat.JSONL,
        )
    )

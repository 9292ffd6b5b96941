"""`llmo run`: accept a run, execute it here (or follow the engine that does), print its result.

One process serves a store. If there is one already the run is handed to it and followed, so that
this command always does what it says: it ends when the run ends. It must never lose a run:
Ctrl-C, --timeout and a closed terminal leave it in the store, and a line says how it goes on.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from llm_orchestrator.cli import target as targets
from llm_orchestrator.cli.given import merge_inputs, read_pairs
from llm_orchestrator.cli.options import DryRun, make_app
from llm_orchestrator.cli.output import count, dollars, duration, emit, print_object
from llm_orchestrator.cli.report import say
from llm_orchestrator.cli.run_result import Ask, ResultFormat, print_result
from llm_orchestrator.cli.session import Session, session_of
from llm_orchestrator.errors import StoreLocked

if TYPE_CHECKING:
    from llm_orchestrator.cli.progress import Progress
    from llm_orchestrator.engine.replay import Fold
    from llm_orchestrator.model import NewRun
    from llm_orchestrator.store.base import Database

TIMED_OUT = 124
GRACE_S = 5.0

app = make_app("Run a workflow and wait for its result.")


@app.command()
def run(
    context: typer.Context,
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A workflow file, a registered name, or Python: module:name, file.py:name.",
        ),
    ],
    *,
    inputs: Annotated[
        str | None, typer.Option("-i", "--inputs", metavar="JSON|@FILE|-", help="All inputs.")
    ] = None,
    pairs: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="NAME=VALUE", help="One input; wins over -i."),
    ] = None,
    is_waiting: Annotated[bool, typer.Option("--wait", help="Wait (the default).")] = False,
    is_detached: Annotated[
        bool, typer.Option("--detach", help="Print the id and return; an engine runs it.")
    ] = False,
    is_streaming: Annotated[
        bool,
        typer.Option(
            "--stream", help="Show answers as they come: on stdout with -o text, else on stderr."
        ),
    ] = False,
    steps_max: Annotated[
        int | None, typer.Option("--max-concurrency", min=1, help="Steps at a time, here.")
    ] = None,
    key: Annotated[
        str | None, typer.Option("--idempotency-key", help="The same key gives the same run.")
    ] = None,
    labels: Annotated[
        list[str] | None, typer.Option("--label", metavar="NAME=VALUE", help="Mark the run.")
    ] = None,
    priority: Annotated[int | None, typer.Option("--priority", help="Higher is first.")] = None,
    timeout_s: Annotated[
        float | None, typer.Option("--timeout", min=0.0, help="Stop waiting after SECONDS.")
    ] = None,
    output: Annotated[
        ResultFormat,
        typer.Option("--output", "-o", help="text: texts as they are, and chunks with --stream."),
    ] = ResultFormat.JSON,
    is_dry: DryRun = False,
) -> int:
    """Run a workflow and print its result as JSON.

    Executes here, unless an engine serves the store: then it hands the run over and follows it.
    """
    session = session_of(context)
    if is_waiting and is_detached:
        raise typer.BadParameter("--wait and --detach contradict each other")
    ask = Ask(
        file,
        output,
        whole=inputs,
        pairs=tuple(pairs or ()),
        is_detached=is_detached,
        is_streaming=is_streaming,
        steps_max=steps_max,
        key=key,
        labels=read_pairs(labels or (), "--label"),
        priority=priority,
        timeout_s=timeout_s,
        is_dry=is_dry,
    )
    return session.run(_run(session, ask))


async def _run(session: Session, ask: Ask) -> int:
    target = await _find(session, ask)
    checked = target.check(merge_inputs(ask.whole, ask.pairs, target.kinds))
    new = target.new_run(
        _new_id(session),
        checked,
        idempotency_key=ask.key,
        labels=dict(ask.labels),
        priority=ask.priority,
    )
    if ask.is_dry:
        session.note("nothing was accepted; this is what would be:")
        print_object({**_facts(new), "store": session.store_url}, "json")
        return 0
    store = session.make_store()
    if ask.is_detached:
        return await _detach(session, ask, target=target, new=new)
    if not await store.is_served():
        try:
            return await _execute(session, ask, target=target, new=new)
        except StoreLocked:
            if not await store.is_served():
                raise
    return await _submit(session, ask, target=target, new=new)


async def _find(session: Session, ask: Ask) -> targets.Target:
    if targets.is_python(ask.file):
        return targets.of_python(ask.file)
    if targets.is_file(ask.file):
        found = targets.of_file(ask.file, session.config)
        for warning in found.definition.warnings if found.definition else ():
            session.note(
                f"{warning.path}:{warning.line}:{warning.column}: warning: {warning.message}"
            )
        return found
    async with session.client() as store:
        return await targets.of_name(ask.file, store.shelf)


def _new_id(session: Session) -> str:
    from llm_orchestrator.clock import new_run_id

    return new_run_id(session.clock)


def _facts(new: NewRun) -> dict[str, object]:
    return {
        "workflow": new.workflow,
        "version": new.version,
        "digest": new.digest,
        "input": new.input,
        "labels": dict(new.labels),
        "priority": new.priority,
        "queue": new.queue,
        "idempotency_key": new.idempotency_key,
    }


async def _accept(session: Session, store: Database, target: targets.Target, *, new: NewRun) -> str:
    """Its journal says that it was to begin; the audit log says afterwards who began it."""
    async with session.audited(
        store,
        "runs.start",
        target=new.run_id,
        detail={"workflow": new.workflow, "version": new.version},
        is_announced=False,
    ) as told:
        run_id = await target.accept(store, store.clock, new)
        told["target"] = run_id
    return run_id


# -- somebody else executes -----------------------------------------------------------------------


async def _detach(session: Session, ask: Ask, *, target: targets.Target, new: NewRun) -> int:
    async with session.client(may_create=True) as store:
        run_id = await _accept(session, store, target, new=new)
        emit(run_id)
        if not await store.is_served():
            session.note("accepted; no engine serves the store now\nhint: llmo serve")
        elif target.code is not None:
            session.note(_needs_code(ask))
    return 0


async def _submit(session: Session, ask: Ask, *, target: targets.Target, new: NewRun) -> int:
    from llm_orchestrator.cli.follow import Follower

    async with session.client() as store:
        run_id = await _accept(session, store, target, new=new)
        session.note(f"run {run_id} accepted; the engine that serves the store executes it")
        if target.code is not None:
            session.note(_needs_code(ask))
        if ask.steps_max is not None:
            session.warn("--max-concurrency is the engine's own: llmo serve --max-concurrency N")
        progress = _make_progress(session, ask)
        progress.run_id = run_id
        follower = Follower(store, session.clock, progress=progress, is_streaming=ask.is_streaming)
        following = asyncio.create_task(follower.follow(run_id))
        left = await _wait(session, following, ask, run_id=run_id)
        progress.close()
        if left is not None:
            session.note(f"the run goes on in the engine\nhint: llmo runs watch {run_id}")
            return left
        return await _finish(session, store, run_id, ask=ask, progress=progress)


def _needs_code(ask: Ask) -> str:
    place = ask.file.rpartition(":")[0] or ask.file
    return (
        "this is a Python workflow: the engine must have its code\n"
        f"hint: llmo serve --import {place}"
    )


# -- executed here --------------------------------------------------------------------------------


async def _execute(session: Session, ask: Ask, *, target: targets.Target, new: NewRun) -> int:
    from llm_orchestrator.cli.closing import close_engine
    from llm_orchestrator.wire import Orchestrator, node_options

    config = session.config
    options = node_options(config, steps_max=ask.steps_max)
    progress = _make_progress(session, ask)
    orchestrator = Orchestrator(
        workflows=[target.code] if target.code is not None else [],
        config=config,
        options=options,
        publish=progress.publish,
        clock=session.clock,
    )
    grace_s = GRACE_S
    await orchestrator.__aenter__()
    try:
        progress.run_id = new.run_id
        run_id = await _accept(session, orchestrator.store, target, new=new)
        progress.run_id = run_id
        session.note(f"run {run_id} accepted ({new.workflow} {new.version})")
        ending = asyncio.create_task(_ended(orchestrator, run_id))
        left = await _wait(session, ending, ask, run_id=run_id, is_here=True)
        progress.close()
        if left is None:
            grace_s = 0.0
            return await _finish(session, orchestrator.store, run_id, ask=ask, progress=progress)
    finally:
        progress.close()
        await close_engine(orchestrator, grace_s=grace_s)
    session.note(f"run {run_id} is released and goes on with the next engine\nhint: llmo serve")
    return left


async def _ended(orchestrator: object, run_id: str) -> None:
    """Until the run is final or paused, whichever way; the journal then says how."""
    from llm_orchestrator.errors import RunFailed, RunPaused
    from llm_orchestrator.wire import Orchestrator

    assert isinstance(orchestrator, Orchestrator)
    try:
        await orchestrator.result(run_id)
    except (RunFailed, RunPaused):
        return


async def _wait(
    session: Session, work: asyncio.Task[object], ask: Ask, *, run_id: str, is_here: bool = False
) -> int | None:
    """None when the work is done; the exit code when we stop waiting for it."""
    from llm_orchestrator.cli.signals import Stop

    what = "stopping: steps in flight may end" if is_here else "not waiting any longer"
    stop = Stop(lambda: session.note(f"{what} (again to stop at once)"))
    stopped = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait(
            {work, stopped}, timeout=ask.timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        if work in done:
            await work
            return None
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        if stopped in done:
            return stop.exit_code
        say(f"error: run {run_id} did not end within {ask.timeout_s:g} s")
        return TIMED_OUT
    finally:
        stopped.cancel()
        if not is_here or not stop.number:
            stop.close()


async def _finish(
    session: Session, store: Database, run_id: str, *, ask: Ask, progress: Progress
) -> int:
    """Print how the run ended, as its checked journal says."""
    from llm_orchestrator.cli.follow import end_of, read_fold
    from llm_orchestrator.wire import output_of

    state = await read_fold(store, run_id)
    session.note(_summary(state, store.clock.now_us()))
    result = output_of(end_of(state))
    if not (progress.has_streamed and ask.output is ResultFormat.TEXT):
        print_result(result, ask.output)
    return 0


def _summary(state: Fold, now: int) -> str:
    used = state.usage
    facts = [count(len(state.finished), "step"), duration((now - state.created_at) / 1000)]
    if used.input_tokens or used.output_tokens:
        facts.append(f"{used.input_tokens}+{used.output_tokens} tokens")
    if used.cost_usd:
        facts.append(dollars(used.cost_usd))
    if state.repeats:
        facts.append(f"{state.repeats} repeated after crashes")
    return f"run {state.run_id} {state.state}: {', '.join(facts)}"


def _make_progress(session: Session, ask: Ask) -> Progress:
    from llm_orchestrator.cli.progress import Progress

    chunks: TextIO | None = None
    if ask.is_streaming:
        chunks = sys.stdout if ask.output is ResultFormat.TEXT else sys.stderr
    return Progress(is_quiet=session.flags.is_quiet, chunks_to=chunks)

"""`llmo runs watch`: what happens to a run that another process drives, until it ends."""

from __future__ import annotations

import asyncio
import sys

from llm_orchestrator.cli.follow import Follower, end_of
from llm_orchestrator.cli.output import emit, to_json
from llm_orchestrator.cli.progress import Progress
from llm_orchestrator.cli.report import report, say
from llm_orchestrator.cli.runs_look import entry_facts
from llm_orchestrator.cli.session import Session
from llm_orchestrator.errors import OrchestratorError
from llm_orchestrator.model import Entry
from llm_orchestrator.wire import output_of

TIMED_OUT = 124


async def watch_run(
    session: Session, run_id: str, *, is_streaming: bool, timeout_s: float | None, is_jsonl: bool
) -> int:
    """0 completed, 9 failed or cancelled, 3 paused, 124 when `timeout_s` is over."""

    def print_entry(entry: Entry) -> None:
        emit(to_json(entry_facts(entry, has_payload=True), indent=None))
        sys.stdout.flush()

    progress = Progress(
        is_quiet=is_jsonl,
        chunks_to=sys.stderr if is_streaming else None,
        lines_to_stdout=not is_jsonl,
    )
    progress.run_id = run_id
    async with session.client() as store:
        follower = Follower(
            store,
            session.clock,
            progress=None if is_jsonl else progress,
            on_entry=print_entry if is_jsonl else None,
            is_streaming=is_streaming,
        )
        if not await store.is_served():
            row = await store.look.run(run_id)
            if row is not None and not row.state.is_final:
                session.note("no engine serves the store now\nhint: llmo serve")
        try:
            async with asyncio.timeout(timeout_s):
                state = await follower.follow(run_id)
        except TimeoutError:
            say(f"error: run {run_id} did not end within {timeout_s:g} s")
            return TIMED_OUT
        finally:
            progress.close()
    try:
        output_of(end_of(state))
    except OrchestratorError as error:
        return report(error, is_debug=session.flags.is_debug)
    if not is_jsonl:
        emit(f"run {run_id} {state.state}")
    return 0

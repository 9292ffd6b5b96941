"""`llmo serve`: the engine of a store, until it is told to stop.

It takes over what an engine before it left, runs whatever is due, and takes requests of other
processes through the store's local socket. The first SIGTERM or SIGINT lets steps in flight end and
releases every run; the second ends the process at once, which loses nothing either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_orchestrator.cli.options import make_app
from llm_orchestrator.cli.output import count
from llm_orchestrator.cli.session import Session, session_of

if TYPE_CHECKING:
    from llm_orchestrator.language.code import CodeWorkflow

app = make_app("Execute the runs of a store until told to stop.")
_ENDS = frozenset({"completed", "failed", "cancelled", "paused"})


@app.command()
def serve(
    context: typer.Context,
    *,
    steps_max: Annotated[
        int | None, typer.Option("--max-concurrency", min=1, help="Steps at a time.")
    ] = None,
    runs_max: Annotated[
        int | None, typer.Option("--max-runs", min=1, help="Runs in memory at a time.")
    ] = None,
    modules: Annotated[
        list[str] | None,
        typer.Option("--import", metavar="MODULE|FILE.py", help="Python workflows to execute."),
    ] = None,
    grace_s: Annotated[
        float, typer.Option("--grace", min=0.0, help="Seconds that steps in flight get at the end.")
    ] = 10.0,
) -> int:
    """Execute the runs of a store until SIGTERM or SIGINT."""
    session = session_of(context)
    workflows = _workflows(modules or [])
    return session.run(
        _serve(session, workflows, grace_s=grace_s, steps_max=steps_max, runs_max=runs_max)
    )


def _workflows(modules: list[str]) -> list[CodeWorkflow[Any]]:
    from llm_orchestrator.cli.target import load_module, workflows_of
    from llm_orchestrator.errors import NotFound

    found: dict[str, CodeWorkflow[Any]] = {}
    for module in modules:
        here = workflows_of(load_module(module))
        if not here:
            raise NotFound(f"{module} has no workflow", hint="decorate a function with @workflow")
        found.update({workflow.digest: workflow for workflow in here})
    return list(found.values())


async def _serve(
    session: Session,
    workflows: list[CodeWorkflow[Any]],
    *,
    grace_s: float,
    steps_max: int | None,
    runs_max: int | None,
) -> int:
    from llm_orchestrator.cli.closing import close_engine
    from llm_orchestrator.cli.signals import Stop
    from llm_orchestrator.engine.node import registration
    from llm_orchestrator.wire import Orchestrator, node_options

    config = session.config
    options = node_options(config, runs_max=runs_max, steps_max=steps_max)
    stop = Stop(lambda: session.note("stopping: steps in flight may end (again to stop at once)"))
    orchestrator = Orchestrator(
        workflows=workflows,
        config=config,
        options=options,
        publish=_teller(session),
        clock=session.clock,
    )
    await orchestrator.__aenter__()
    try:
        for workflow in workflows:
            await orchestrator.operator.register(registration(workflow))
        left = len(list(orchestrator.node.driver.driven))
        session.note(
            f"ready: {session.store_url} is served by {orchestrator.node.node_id}"
            + (f", {count(left, 'run')} taken over" if left else "")
        )
        await stop.wait()
        left = len(list(orchestrator.node.driver.driven))
    finally:
        await close_engine(orchestrator, grace_s=grace_s)
    session.note(f"stopped: {count(left, 'run')} released for the next engine")
    return stop.exit_code


def _teller(session: Session) -> Any:
    """One line for each run that ends."""

    def publish(*told: Any) -> None:
        run_id, what, step, _, _ = told
        if not step and what in _ENDS:
            session.note(f"run {run_id} {what}")

    return publish

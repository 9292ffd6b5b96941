"""`llmo serve`: the API and the engine of a store, until it is told to stop.

It takes over what an engine before it left, runs whatever is due, answers requests over HTTP, and
takes those of other processes through the store's local socket. The first SIGTERM or SIGINT lets
steps in flight end and releases every run; the second ends the process at once, which loses nothing
either. SIGHUP reads the settings again.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_orchestrator.cli.options import make_app
from llm_orchestrator.cli.output import count
from llm_orchestrator.cli.session import Session, session_of
from llm_orchestrator.cli.signals import on_hangup
from llm_orchestrator.errors import OrchestratorError

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_orchestrator.cli.signals import Stop
    from llm_orchestrator.config import Config
    from llm_orchestrator.language.code import CodeWorkflow
    from llm_orchestrator.wire.serving import ServeOptions, Serving

app = make_app("Serve the API and execute the runs of a store until told to stop.")
_ENDS = frozenset({"completed", "failed", "cancelled", "paused"})


@app.command()
def serve(
    context: typer.Context,
    *,
    host: Annotated[str | None, typer.Option(help="Where to listen (127.0.0.1).")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port (8080); 0 takes a free one.")
    ] = None,
    region: Annotated[str | None, typer.Option(help="Where this node lives (local).")] = None,
    serving: Annotated[
        str, typer.Option("--serve", metavar="api,worker", help="What this process does.")
    ] = "api,worker",
    is_insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow other machines without a token.")
    ] = False,
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
        float | None,
        typer.Option("--grace", min=0.0, help="Seconds that steps in flight get at the end."),
    ] = None,
) -> int:
    """Serve the API and execute runs until SIGTERM or SIGINT."""
    from llm_orchestrator.wire import node_options
    from llm_orchestrator.wire.serving import ServeOptions

    session = session_of(context)
    given = {"host": host, "port": port, "region": region, "drain_timeout_s": grace_s}
    config = session.config_with(given)
    options = ServeOptions(
        parts=_parts(serving),
        workflows=_workflows(modules or []),
        node=node_options(config, runs_max=runs_max, steps_max=steps_max),
        publish=_teller(session),
        is_insecure=is_insecure,
    )
    process = _Process(session, config, lambda: session.config_with(given))
    return session.run(process.serve(options), serving=config)


def _parts(text: str) -> frozenset[str]:
    from llm_orchestrator.wire.serving import PARTS

    parts = frozenset(part.strip() for part in text.split(",") if part.strip())
    if not parts or parts - PARTS:
        raise typer.BadParameter(f"--serve takes api, worker or api,worker; not {text!r}")
    return parts


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


class _Process:
    """One life of `llmo serve`: what its signals do. `read` reads the settings again."""

    def __init__(self, session: Session, config: Config, read: Callable[[], Config]) -> None:
        from llm_orchestrator.cli.notify import Notifier
        from llm_orchestrator.config import supervisor

        self._session = session
        self._config = config
        self._read = read
        self._notifier = Notifier(supervisor(), session.clock)

    async def serve(self, options: ServeOptions) -> int:
        """Until a signal; the exit code."""
        from llm_orchestrator.cli.signals import Stop
        from llm_orchestrator.wire.serving import Serving

        session = self._session
        stop = Stop(self._stopping)
        on_hangup(lambda: None)  # too early: the settings are only just being put into force
        async with Serving(self._config, session.clock, options) as serving:
            for workflow in options.workflows:
                await serving.register(workflow)
            session.log_facts["node"] = serving.name
            on_hangup(lambda: self._reload(serving))
            session.note(f"ready: {session.store_url} is served by {serving.name} on {serving.url}")
            if serving.driven:
                session.note(f"{count(serving.driven, 'run')} taken over")
            self._notifier.ready(f"{serving.name} on {serving.url}")
            await self._until(stop, serving)
            left = serving.driven
            is_whole = await serving.drain(self._config.drain_timeout_s)
        if not is_whole:
            session.warn("the store does not take the last entries; what it lacks runs again")
        session.note(f"stopped: {count(left, 'run')} released for the next engine")
        return 0 if stop.number else 1

    async def _until(self, stop: Stop, serving: Serving) -> None:
        """Until a signal, or until the server breaks; the watchdog is fed meanwhile."""
        watching = asyncio.create_task(self._notifier.watch(serving.is_alive))
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait([stopped, serving.answering], return_when=asyncio.FIRST_COMPLETED)
        for task in (watching, stopped):
            task.cancel()
        await asyncio.gather(watching, stopped, return_exceptions=True)

    def _stopping(self) -> None:
        self._notifier.stopping("steps in flight may end")
        self._session.note("stopping: steps in flight may end (again to stop at once)")

    def _reload(self, serving: Serving) -> None:
        """Settings that make no sense change nothing: what was in force goes on."""
        self._notifier.reloading()
        try:
            self._config = serving.reload(self._read())
        except OrchestratorError as error:
            self._session.warn(f"settings stay as they were: {error.message}")
        self._notifier.ready()


def _teller(session: Session) -> Any:
    """One line for each run that ends."""

    def publish(*told: Any) -> None:
        run_id, what, step, _, _ = told
        if not step and what in _ENDS:
            session.note(f"run {run_id} {what}")

    return publish

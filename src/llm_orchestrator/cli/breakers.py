"""`llmo breakers`: which providers are not asked at the moment, and how to ask them again now.

A breaker opens when a provider fails again and again, and comes back by itself in growing waves of
probes. A reset is for the operator who knows better; it is written to the log.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from llm_orchestrator.cli.options import Format, Output, make_app
from llm_orchestrator.cli.output import count, print_rows
from llm_orchestrator.cli.session import session_of, whoami

if TYPE_CHECKING:
    from llm_orchestrator.engine.breakers import BreakerView

app = make_app(
    "List the providers' circuit breakers, and close them by hand. Without a verb: list."
)
COLUMNS = ("name", "state", "retry_in_s", "openings", "wave", "succeeded")


@app.command("list")
def list_all(context: typer.Context, *, output: Output = Format.TABLE) -> None:
    """List every breaker that was ever open, as all nodes see it."""
    session = session_of(context)

    async def work() -> list[BreakerView]:
        from llm_orchestrator.engine.breakers import list_breakers

        async with session.client() as store:
            return await list_breakers(store.shelf, store.clock.now_us())

    rows = [each.to_json() for each in session.run(work())]
    print_rows(rows, output, columns=COLUMNS, key="name")
    if not rows:
        session.note("no breaker was ever open")


@app.command()
def reset(
    context: typer.Context,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="PROVIDER/MODEL, as listed.")
    ] = None,
    *,
    is_all: Annotated[
        bool, typer.Option("--all", help="Every breaker that is not closed.")
    ] = False,
    by: Annotated[str | None, typer.Option("--by", help="Who says so (you).")] = None,
) -> None:
    """Close breakers at once, on every node: calls pass again, runs that wait go on."""
    session = session_of(context)
    if bool(names) == is_all:
        raise typer.BadParameter("name the breakers, or --all")

    async def work() -> list[tuple[str, int]]:
        from llm_orchestrator.engine.breakers import list_breakers, reset_breaker, wake_parked

        async with session.client() as store:
            chosen = names or [
                each.name for each in await list_breakers(store.shelf, store.clock.now_us())
            ]
            closed = []
            for name in chosen:
                async with session.audited(store, "breakers.reset", target=name, detail={"by": by}):
                    was_open = await reset_breaker(store, name, by=by or whoami())
                    woken = await wake_parked(store, name, store.clock)
                if was_open or woken:
                    closed.append((name, woken))
            return closed

    closed = session.run(work())
    for name, woken in closed:
        session.note(f"breaker {name} is closed; {count(woken, 'run')} that waited for it go on")
    if not closed:
        session.note("nothing to do: closed already")

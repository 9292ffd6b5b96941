"""`llmo recovery reconcile`: runs that a restore has held, and what is decided about each.

A run is held when it had paid, or acted, after the point to which the store was put back. `accept`:
that stands, its results are taken and nothing is done again. `rerun`: it goes on from the restored
point, and does it again. `llmo runs journal RUN` shows all of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from llm_orchestrator.cli.given import read_ids
from llm_orchestrator.cli.options import DryRun, Format, Output, make_app
from llm_orchestrator.cli.output import count, dollars, emit, print_rows
from llm_orchestrator.cli.session import Session, session_of, whoami
from llm_orchestrator.errors import NotFound
from llm_orchestrator.model import Json

if TYPE_CHECKING:
    from llm_orchestrator.recovery.reconcile import Held
    from llm_orchestrator.store.base import Database

app = make_app("After a restore: decide about runs that would pay, or act, a second time.")
reconcile = make_app("List the runs that a restore has held, accept what they did, or do it again.")
app.add_typer(reconcile, name="reconcile")
COLUMNS = ("run_id", "workflow", "effects", "unknown", "usd", "why")
HeldRuns = Annotated[
    list[str] | None,
    typer.Argument(metavar="[RUN...]", help="Held runs; `-` reads ids from stdin."),
]
EveryRun = Annotated[bool, typer.Option("--all", help="Every run that is held.")]


@app.callback()
def recovery() -> None:
    """After a restore: decide about runs that would pay, or act, a second time."""


@reconcile.command("list")
def list_held(context: typer.Context, *, output: Output = Format.TABLE) -> None:
    """List held runs, with what each did after the restored point."""
    session = session_of(context)
    rows = [_row(each) for each in session.run(_held(session))]
    print_rows(rows, output, columns=COLUMNS, key="run_id")
    if not rows:
        session.note("no run is held by a restore")


@reconcile.command()
def accept(
    context: typer.Context,
    runs: HeldRuns = None,
    *,
    is_all: EveryRun = False,
    is_dry: DryRun = False,
) -> None:
    """It did happen: take the results as they are, and go on behind them."""
    _decide(session_of(context), runs, is_all=is_all, is_dry=is_dry, is_accepted=True)


@reconcile.command()
def rerun(
    context: typer.Context,
    runs: HeldRuns = None,
    *,
    is_all: EveryRun = False,
    is_dry: DryRun = False,
) -> None:
    """Go on from the restored point: what it did is done, and paid for, again."""
    _decide(session_of(context), runs, is_all=is_all, is_dry=is_dry, is_accepted=False)


# -- how ------------------------------------------------------------------------------------------


async def _held(session: Session) -> list[Held]:
    from llm_orchestrator.recovery.reconcile import held_runs

    async with session.client() as store:
        return await held_runs(store)


def _row(held: Held) -> dict[str, Json]:
    return {
        "run_id": held.run_id,
        "workflow": held.workflow,
        "effects": ", ".join(effect.step for effect in held.effects if effect.is_done),
        "unknown": ", ".join(effect.step for effect in held.effects if not effect.is_done),
        "usd": held.usage.cost_usd,
        "why": held.why,
    }


def _decide(
    session: Session, runs: list[str] | None, *, is_all: bool, is_dry: bool, is_accepted: bool
) -> None:
    if bool(runs) == is_all:
        raise typer.BadParameter("name the runs, or --all")
    wanted = None if is_all else set(read_ids(runs or []))
    session.run(_decided(session, wanted, is_dry=is_dry, is_accepted=is_accepted))


async def _decided(
    session: Session, wanted: set[str] | None, *, is_dry: bool, is_accepted: bool
) -> None:
    from llm_orchestrator.recovery.reconcile import held_runs

    async with session.client() as store:
        held = {each.run_id: each for each in await held_runs(store)}
        unknown = sorted((wanted or set()) - set(held))
        if unknown:
            raise NotFound(
                f"run {unknown[0]} is not held by a restore", hint="llmo recovery reconcile list"
            )
        chosen = [each for run_id, each in held.items() if wanted is None or run_id in wanted]
        for each in chosen:
            if is_dry:
                emit(f"{each.run_id}: {_would(each, is_accepted=is_accepted)}")
            else:
                await _do(session, store, each, is_accepted=is_accepted)
        if not is_dry:
            session.note(f"{count(len(chosen), 'run')} may go on")


def _would(held: Held, *, is_accepted: bool) -> str:
    done = [effect.step for effect in held.effects if effect.is_done]
    if is_accepted:
        return f"would take {', '.join(done) or 'nothing'} as done"
    return f"would do {', '.join(done) or 'nothing'} again, {dollars(held.usage.cost_usd)}"


async def _do(session: Session, store: Database, held: Held, *, is_accepted: bool) -> None:
    from llm_orchestrator.recovery.reconcile import accept as accept_run
    from llm_orchestrator.recovery.reconcile import rerun as rerun_run

    word = "accept" if is_accepted else "rerun"
    detail: dict[str, Json] = {"effects": len(held.effects), "usd": held.usage.cost_usd}
    async with session.audited(store, f"recovery.{word}", target=held.run_id, detail=detail):
        if is_accepted:
            taken = await accept_run(store, session.clock, held.run_id, by=whoami())
            emit(f"{held.run_id}: {count(taken, 'step')} taken as done")
        else:
            await rerun_run(store, session.clock, held.run_id, by=whoami())
            emit(f"{held.run_id}: goes on from the restored point")

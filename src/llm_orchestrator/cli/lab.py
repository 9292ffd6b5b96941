"""`llmo lab`: a cluster of real servers on this machine, made by one command, gone by another."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_orchestrator.cli.options import ObjectFormat, make_app
from llm_orchestrator.cli.output import emit, print_object, print_table
from llm_orchestrator.cli.session import session_of

if TYPE_CHECKING:
    from llm_orchestrator.drill.lab import LabSpec

app = make_app("A cluster of real servers on this machine, to try things out and to break them.")
_COLUMNS = ("name", "address", "region", "pid", "restarts", "note")


class Version(StrEnum):
    """Major versions of PostgreSQL that the lab is tested with."""

    V15 = "15"
    V18 = "18"


Folder = Annotated[
    Path | None,
    typer.Option("--folder", help="Where the lab lives: a new or empty one. (One lab a user.)"),
]


@app.command()
def up(
    context: typer.Context,
    *,
    regions: Annotated[int, typer.Option(min=1, max=3, help="Regions: 1, 2 or 3.")] = 1,
    postgres: Annotated[
        Version | None, typer.Option(help="PostgreSQL's major version. (The newest installed.)")
    ] = None,
    is_single: Annotated[
        bool, typer.Option("--single", help="One node on SQLite; no database servers, no root.")
    ] = False,
    is_loopback: Annotated[
        bool,
        typer.Option(
            "--loopback",
            help="Hosts are loopback addresses, as without root; then no network can be cut.",
        ),
    ] = False,
    has_barman: Annotated[
        bool, typer.Option("--barman/--no-barman", help="Barman keeps the cluster's log.")
    ] = True,
    folder: Folder = None,
) -> None:
    """Make a lab and wait until it is ready; prints where its nodes answer."""
    from llm_orchestrator.drill.lab import up as make

    session = session_of(context)
    lab = make(
        _spec(
            regions,
            postgres,
            is_single=is_single,
            is_loopback=is_loopback,
            has_barman=has_barman and not is_single,
        ),
        folder,
        tell=session.note,
    )
    took_s = lab.steps[-1][0]
    session.note(f"ready in {took_s:.0f} s: {lab.plan.spec.shown}; until: llmo lab down")
    for url in lab.endpoints:
        emit(url)


def _spec(
    regions: int,
    postgres: Version | None,
    *,
    is_single: bool,
    is_loopback: bool,
    has_barman: bool = False,
) -> LabSpec:
    import os

    from llm_orchestrator.drill.lab import LabSpec

    if is_single and (regions > 1 or postgres is not None):
        raise typer.BadParameter("--single is one node on SQLite: no --regions, no --postgres")
    has_network = not (is_single or is_loopback) and os.getuid() == 0
    version = int(postgres.value) if postgres else 0
    return LabSpec(
        regions, version, is_single=is_single, has_network=has_network, has_barman=has_barman
    )


@app.command()
def status(
    context: typer.Context,
    *,
    folder: Folder = None,
    output: Annotated[
        ObjectFormat, typer.Option("--output", "-o", help="How to print.")
    ] = ObjectFormat.TABLE,
) -> int:
    """Show a lab's processes and addresses; exit code 1 when it is not ready, 4 without one."""
    from llm_orchestrator.drill.lab import status as look

    session = session_of(context)
    found = session.run(look(folder))
    is_ready = found["state"] == "ready"
    if output is ObjectFormat.TABLE:
        print_table(found.pop("processes"), _COLUMNS)
        for name, value in filter(lambda item: item[1], found.items()):
            session.note(f"{name}: {_shown(value)}")
    else:
        print_object(found, output)
    return 0 if is_ready else 1


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(value)
    if isinstance(value, dict):
        return " ".join(f"{name}={text}" for name, text in value.items())
    return str(value)


@app.command()
def calm(context: typer.Context, *, folder: Folder = None) -> None:
    """Undo every fault: nothing is cut, frozen, held dead or full any more."""
    from llm_orchestrator.drill.lab import Lab

    session = session_of(context)
    session.run(Lab.load(folder).calm())
    session.note("every fault is undone")


@app.command()
def down(context: typer.Context, *, folder: Folder = None) -> None:
    """Kill everything that belongs to a lab and remove what it made, also after a crash of it."""
    from llm_orchestrator.drill.lab import down as clear

    session = session_of(context)
    session.note("the lab is gone" if clear(folder) else "there is no lab")

"""`llmo workflows`: the definitions that a store keeps.

A definition is known by name, version and digest and never changes; registering another content
under a version that exists is allowed (runs keep theirs) and warned about.
"""

from __future__ import annotations

import difflib
import json
from typing import Annotated

import typer

from llm_orchestrator.cli import target as targets
from llm_orchestrator.cli.options import DryRun, Format, Output, make_app
from llm_orchestrator.cli.output import emit, print_object, print_rows, to_yaml
from llm_orchestrator.cli.session import Session, session_of
from llm_orchestrator.errors import NotFound
from llm_orchestrator.model import Json, Workflow, stamp
from llm_orchestrator.store.base import Shelf

app = make_app("List, show, register and compare definitions. Without a verb: list.")
COLUMNS = ("name", "version", "kind", "digest", "created_at")
Name = Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="A registered workflow.")]
Side = Annotated[
    str, typer.Argument(metavar="FILE|NAME[@VERSION]", help="A file or a registered workflow.")
]


@app.command("list")
def list_workflows(
    context: typer.Context,
    *,
    name: Annotated[str | None, typer.Option(help="Only this one.")] = None,
    output: Output = Format.TABLE,
) -> None:
    """List registered definitions."""
    session = session_of(context)

    async def work() -> list[Workflow]:
        async with session.client() as store:
            return await store.shelf.workflows()

    rows = [_facts(item) for item in session.run(work()) if name in (None, item.name)]
    print_rows(rows, output, columns=COLUMNS, key="id")
    if not rows:
        session.note("no workflows are registered\nhint: llmo workflows register FILE")


@app.command()
def show(
    context: typer.Context,
    name: Name,
    *,
    is_json: Annotated[bool, typer.Option("--json", help="As JSON instead of YAML.")] = False,
) -> None:
    """Print a registered definition, as it runs."""
    session = session_of(context)

    async def work() -> Json:
        async with session.client() as store:
            return await _content(session, name, store.shelf)

    print_object(session.run(work()), "json" if is_json else "yaml")


@app.command()
def register(
    context: typer.Context,
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Workflow files, or module:name.")
    ],
    *,
    is_dry: DryRun = False,
    output: Output = Format.TABLE,
) -> None:
    """Keep definitions in the store, so that runs and other workflows can call them by name."""
    session = session_of(context)
    found = [
        targets.of_python(file)
        if targets.is_python(file)
        else targets.of_file(file, session.config)
        for file in files
    ]
    for target in found:
        for warning in target.definition.warnings if target.definition else ():
            session.note(
                f"{warning.path}:{warning.line}:{warning.column}: warning: {warning.message}"
            )
    rows = session.run(_register(session, found, is_dry=is_dry))
    print_rows(rows, output, columns=(*COLUMNS[:-1], "what"), key="id")
    if is_dry:
        session.note("nothing was registered")


async def _register(
    session: Session, found: list[targets.Target], *, is_dry: bool
) -> list[dict[str, Json]]:
    from llm_orchestrator.engine.control import Operator
    from llm_orchestrator.errors import StoreAbsent

    rows = []
    wanted = {item.digest: item for target in found for item in _family(target)}
    try:
        async with session.client(may_create=not is_dry) as store:
            known = await store.shelf.workflows()
            for item in wanted.values():
                same = [
                    old for old in known if (old.name, old.version) == (item.name, item.version)
                ]
                is_there = any(old.digest == item.digest for old in same)
                if same and not is_there:
                    session.warn(
                        f"{item.name} {item.version} is registered with another content; new runs "
                        "take the new one. Better: raise its version"
                    )
                if not is_dry:
                    async with session.audited(
                        store,
                        "workflows.register",
                        target=f"{item.name}@{item.version}",
                        detail={"digest": item.digest},
                    ):
                        await Operator(store, store.clock).register(item)
                what = "unchanged" if is_there else "would be new" if is_dry else "registered"
                rows.append({**_facts(item), "what": what})
    except StoreAbsent:
        if not is_dry:
            raise
        rows = [{**_facts(item), "what": "would be new"} for item in wanted.values()]
    return rows


def _family(target: targets.Target) -> list[Workflow]:
    return [*target.children, target.workflow]


@app.command()
def diff(
    context: typer.Context,
    old: Side,
    new: Side,
    *,
    has_exit_code: Annotated[
        bool, typer.Option("--exit-code", help="End with 1 when they differ.")
    ] = False,
) -> int:
    """Compare two definitions, as they run, line by line."""
    session = session_of(context)

    async def work() -> tuple[Json, Json]:
        if targets.is_file(old) and targets.is_file(new):
            return await _content(session, old, None), await _content(session, new, None)
        async with session.client() as store:
            return (
                await _content(session, old, store.shelf),
                await _content(session, new, store.shelf),
            )

    left, right = (to_yaml(side).splitlines() for side in session.run(work()))
    lines = list(difflib.unified_diff(left, right, old, new, lineterm=""))
    for line in lines:
        emit(line)
    if not lines:
        session.note("they do not differ")
    return 1 if lines and has_exit_code else 0


async def _content(session: Session, name: str, shelf: Shelf | None) -> Json:
    if targets.is_file(name):
        return json.loads(targets.of_file(name, session.config).workflow.definition)
    if shelf is None:
        raise NotFound(f"there is no file {name}")
    return json.loads((await targets.of_name(name, shelf)).workflow.definition)


def _facts(item: Workflow) -> dict[str, Json]:
    is_python = json.loads(item.definition).get("kind") == "python"
    return {
        "id": f"{item.name}@{item.version}",
        "name": item.name,
        "version": item.version,
        "kind": "python" if is_python else "definition",
        "digest": item.digest,
        "created_at": stamp(item.created_at),
    }

"""`llmo journal`: is what is recorded still what was written, and if not, what can be done.

`verify` reads and never writes. `repair` shows its plan with --dry-run and carries it out without;
nothing is deleted. Both end with exit code 8 when they find damage that is still there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from llm_orchestrator.cli.given import read_ids
from llm_orchestrator.cli.options import DryRun, Format, Output, RunId, make_app
from llm_orchestrator.cli.output import count, emit, print_rows
from llm_orchestrator.cli.session import Session, session_of
from llm_orchestrator.errors import NotFound, StoreDamaged
from llm_orchestrator.model import Json

if TYPE_CHECKING:
    from llm_orchestrator.store.base import Database, Store

app = make_app("Verify what is recorded, repair what is damaged.")
COLUMNS = ("run_id", "seq", "what", "is_mendable")
DAMAGED = StoreDamaged.exit_code
CHUNK = 200
LOOKS = 3


@app.command()
def verify(
    context: typer.Context,
    run_ids: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN...]", help="`-` reads ids from stdin.")
    ] = None,
    *,
    is_all: Annotated[bool, typer.Option("--all", help="Every run, and the file itself.")] = False,
    output: Output = Format.TABLE,
) -> int:
    """Check the chain of each journal; exit code 8 when something does not fit."""
    if bool(run_ids) == is_all:
        raise typer.BadParameter("give run ids, or --all")
    session = session_of(context)
    ids = None if is_all else read_ids(run_ids or [])
    flaws, runs, entries = session.run(_verify(session, ids))
    print_rows(flaws, output, columns=COLUMNS)
    damaged = len({str(flaw["run_id"]) for flaw in flaws})
    session.note(f"checked {count(runs, 'run')}, {entries} entries: {damaged or 'none'} damaged")
    if flaws:
        first = next((str(flaw["run_id"]) for flaw in flaws if flaw["run_id"] != "-"), None)
        if first:
            session.note(f"hint: llmo journal repair {first} --dry-run")
    return DAMAGED if flaws else 0


async def _verify(
    session: Session, wanted: list[str] | None
) -> tuple[list[dict[str, Json]], int, int]:
    """Flaws, and how many runs and entries were checked."""
    flaws: list[dict[str, Json]] = []
    runs = entries = 0
    async with session.client() as store:
        if wanted is None:
            flaws += [
                _flaw("-", None, f"database: {what}") for what in await store.look.structure()
            ]
        ids = wanted if wanted is not None else await store.look.run_ids()
        for start in range(0, len(ids), CHUNK):
            chunk = ids[start : start + CHUNK]
            journals = await store.look.load(chunk)
            for run_id in chunk:
                runs += 1
                if run_id in journals:
                    found = journals[run_id]
                    entries += len(found.entries)
                    flaws += [
                        _flaw(run_id, flaw.seq or None, flaw.what, is_mendable=flaw.is_mendable)
                        for flaw in found.flaws
                    ]
                    if not found.flaws:
                        flaws += await _row_flaws(store, run_id)
                elif wanted is not None and await _is_unknown(store, run_id):
                    raise NotFound(f"there is no run {run_id}", hint="llmo runs list")
                else:
                    flaws.append(_flaw(run_id, 1, "no entry of its journal is left"))
    return flaws, runs, entries


async def _is_unknown(store: Store, run_id: str) -> bool:
    try:
        return await store.look.run(run_id) is None
    except StoreDamaged:
        return False


async def _row_flaws(store: Store, run_id: str) -> list[dict[str, Json]]:
    """Where the row of `runs` contradicts the journal. A run may move between two reads."""
    wrong = ""
    for _ in range(LOOKS):
        try:
            wrong = await _contradiction(store, run_id)
        except StoreDamaged as error:
            return [_flaw(run_id, None, error.message)]
        if not wrong:
            return []
    return [_flaw(run_id, None, f"its row of `runs`: {wrong}", is_mendable=True)]


async def _contradiction(store: Store, run_id: str) -> str:
    from llm_orchestrator.cli.follow import read_journal
    from llm_orchestrator.engine.replay import fold
    from llm_orchestrator.engine.rows import contradiction

    journal = await read_journal(store, run_id)
    row = await store.look.row(run_id)
    return contradiction(row, fold(run_id, journal.entries), journal.entries)


def _flaw(run_id: str, seq: int | None, what: str, *, is_mendable: bool = False) -> dict[str, Json]:
    return {"run_id": run_id, "seq": seq, "what": what, "is_mendable": is_mendable}


@app.command()
def repair(context: typer.Context, run_id: RunId, *, is_dry: DryRun = False) -> int:
    """Mend a damaged run as far as what is left allows; --dry-run shows the plan."""
    session = session_of(context)
    return session.run(_repair(session, run_id, is_dry=is_dry))


async def _repair(session: Session, run_id: str, *, is_dry: bool) -> int:
    from llm_orchestrator.engine.mend import Mender
    from llm_orchestrator.store.writer import GroupWriter
    from llm_orchestrator.wire.backups import BackupCopy, Backups
    from llm_orchestrator.wire.orchestrator import second_copies

    async with session.client() as store:
        journal = (await store.look.load([run_id])).get(run_id)
        if journal is None:
            raise NotFound(f"there is no run {run_id}", hint="llmo runs list")
        if not any(flaw.seq for flaw in journal.flaws):
            return await _repair_row(session, store, run_id, is_dry=is_dry)
        writer = GroupWriter(store, store.clock)
        backups = BackupCopy(Backups(session.config, store.clock), store)
        copies = [*second_copies(session.config, store), backups]
        mender = Mender(store, writer, copies=copies)
        plan = await mender.plan(journal)
        emit(f"run {run_id}: {plan.summary()}")
        if is_dry:
            return _not_changed(session, run_id)
        writer.start()
        try:
            async with session.audited(
                store, "journal.repair", target=run_id, detail={"plan": plan.summary()}
            ):
                mended = await mender.mend(plan)
        finally:
            await writer.close()
        session.note(f"run {run_id} is mended: {len(mended.entries)} entries stand")
        if plan.needs_person:
            session.note(f"hint: llmo runs explain {run_id}")
    return 0


async def _repair_row(session: Session, store: Database, run_id: str, *, is_dry: bool) -> int:
    """The journal is whole; its summary in `runs` may not be."""
    from llm_orchestrator.engine.mend import Mender
    from llm_orchestrator.store.writer import GroupWriter

    flaws = await _row_flaws(store, run_id)
    if not flaws:
        session.note(f"run {run_id} is whole")
        return 0
    emit(f"run {run_id}: {flaws[0]['what']}; it would be rebuilt from the journal")
    if is_dry:
        return _not_changed(session, run_id)
    async with session.audited(store, "journal.repair", target=run_id):
        wrong = await Mender(store, GroupWriter(store, store.clock)).set_row(run_id)
    session.note(f"run {run_id} is mended" if wrong else f"run {run_id} moved meanwhile")
    return 0


def _not_changed(session: Session, run_id: str) -> int:
    session.note(f"nothing was changed\nhint: llmo journal repair {run_id}")
    return DAMAGED

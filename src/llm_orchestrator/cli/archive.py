"""`llmo archive`: the stream archive, to which every committed batch goes as well.

status    whose streams the place holds, how much, and how far it is
verify    read every segment: chains, gaps, seals; exit code 8 on damage
compact   let go of segments that the oldest kept backup holds (a proof does it by itself)
stop      this store is archived no more; a later archive begins anew and needs a backup
"""

from __future__ import annotations

from typing import Annotated

import typer

from llm_orchestrator.cli.backup import maybe_store
from llm_orchestrator.cli.backup_given import backups_of, size
from llm_orchestrator.cli.options import AsJson, DryRun, make_app
from llm_orchestrator.cli.output import count, emit, print_object, print_rows
from llm_orchestrator.cli.session import Session, session_of
from llm_orchestrator.errors import ConfigError, NotFound, StoreDamaged, StoreLocked
from llm_orchestrator.model import Json, stamp

app = make_app("The stream archive, to which every committed batch goes as well.")
COLUMNS = ("incarnation", "generation", "began_at", "alone", "streams", "size", "now")
FINDINGS = ("finding", "what")


@app.callback()
def archive() -> None:
    """The stream archive, to which every committed batch goes as well."""


@app.command()
def status(context: typer.Context, *, is_json: AsJson = False) -> None:
    """What the archive holds: a line for each life of the store, the newest first."""
    session = session_of(context)
    rows, notes = session.run(_status(session))
    print_rows(rows, "json" if is_json else "table", columns=COLUMNS)
    for note in notes:
        session.note(note)


@app.command()
def verify(context: typer.Context, *, is_json: AsJson = False) -> int:
    """Read every segment; whatever is missing, changed or exchanged is named."""
    session = session_of(context)
    facts, damage, torn = session.run(_verify(session))
    if is_json:
        print_object({**facts, "damage": damage, "torn": torn}, "json")
    else:
        found = [{"finding": "damage", "what": what} for what in damage]
        found += [{"finding": "torn end", "what": what} for what in torn]
        if found:
            print_rows(found, "table", columns=FINDINGS)
        emit(
            f"{count(facts['streams'], 'stream')}, {count(facts['batches'], 'batch')}, "
            f"{size(facts['size_bytes'])}: " + ("damaged" if damage else "whole")
        )
    return StoreDamaged.exit_code if damage else 0


@app.command()
def compact(context: typer.Context, *, is_dry: DryRun = False) -> None:
    """Let go of segments that the oldest kept backup holds."""
    session = session_of(context)

    async def work() -> None:
        backups = backups_of(session, {})
        async with session.client() as store:
            catalogue = await backups.catalogue(store)
            gone = await backups.compact(catalogue, store, is_dry=is_dry)
        verb = "would let go of" if is_dry else "let go of"
        emit(f"{verb} {count(gone.segments, 'segment')}, {size(gone.size_bytes)}")

    session.run(work())


@app.command()
def stop(
    context: typer.Context,
    *,
    is_sure: Annotated[
        bool, typer.Option("--yes", "-y", help="Go on although nodes live.")
    ] = False,
) -> None:
    """From now on this store is not archived. First stop its nodes and unset archive_place."""
    session = session_of(context)

    async def work() -> None:
        from llm_orchestrator.recovery.stream_store import stop_archive

        if session.config.archive_place:
            raise ConfigError("archive_place is set: the next commit would begin a new archive")
        async with session.client() as store:
            if not is_sure and await store.is_served():
                raise StoreLocked("a node serves this store", hint="stop it first, or --yes")
            if not await stop_archive(store):
                raise NotFound("this store is not archived")
            async with session.audited(store, "archive.stop"):
                pass

    session.run(work())


async def _status(session: Session) -> tuple[list[dict[str, Json]], list[str]]:
    from llm_orchestrator.recovery.archive_read import read_incarnations
    from llm_orchestrator.recovery.readiness import archive_exposure
    from llm_orchestrator.wire.archive import archive_place

    place = archive_place(session.config, session.clock)
    notes: list[str] = []
    current = ""
    async with maybe_store(session) as store:
        if store is not None:
            current = store.incarnation
            exposure = await archive_exposure(store, store.clock.now_us())
            behind = "not known" if exposure.seconds is None else f"{exposure.seconds:.1f} s"
            notes.append(f"behind the store: {behind} ({exposure.detail})")
    if trouble := await place.check():
        notes.append(f"the place is not fit now: {trouble}")
    rows: list[dict[str, Json]] = [
        {
            "incarnation": one.name,
            "generation": one.generation,
            "began_at": stamp(one.began_at),
            "alone": one.is_whole and not one.floor_us,
            "streams": len(one.streams),
            "size": size(one.size_bytes),
            "now": one.name == current,
        }
        for one in await read_incarnations(place)
    ]
    return rows, notes


async def _verify(session: Session) -> tuple[dict[str, int], list[str], list[str]]:
    from llm_orchestrator.recovery.archive_read import Merged, read_incarnations
    from llm_orchestrator.recovery.stream_read import Findings
    from llm_orchestrator.wire.archive import archive_place

    place = archive_place(session.config, session.clock)
    keys = backups_of(session, {}).keys
    findings = Findings()
    facts = {"streams": 0, "batches": 0, "size_bytes": 0}
    for one in await read_incarnations(place):
        facts["streams"] += len(one.streams)
        facts["size_bytes"] += one.size_bytes
        findings.damage += one.damage
        merged = Merged(place, one, positions={}, keys=keys, findings=findings)
        async for _ in merged.items():
            facts["batches"] += 1
        if not one.floor_us:
            merged.check_ends()
    return facts, findings.damage, findings.torn

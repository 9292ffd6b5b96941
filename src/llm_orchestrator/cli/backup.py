"""`llmo backup`: make backup files, look at them, check them, prove them, let old ones go.

What dangerous verbs would do is said by --dry-run. Exit codes: 3 made but not copied to the second
place, 8 damaged, 11 another one is at it, 12 no key opens it.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from llm_orchestrator.cli.backup_bar import bar
from llm_orchestrator.cli.backup_barman import BaseKind, check_barman, make_base
from llm_orchestrator.cli.backup_given import (
    AtFolder,
    AtPlace,
    KeepDays,
    backups_of,
    keep_days_of,
    size,
)
from llm_orchestrator.cli.backup_schedule import schedule
from llm_orchestrator.cli.options import (
    AsJson,
    DryRun,
    Format,
    ObjectFormat,
    ObjectOutput,
    Output,
    make_app,
)
from llm_orchestrator.cli.output import count, duration, emit, print_object, print_rows
from llm_orchestrator.cli.session import Session, session_of
from llm_orchestrator.errors import NotFound, NotUploaded, StoreDamaged, StoreError
from llm_orchestrator.model import Json

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from llm_orchestrator.recovery.catalogue import Catalogue, Finding, Item
    from llm_orchestrator.recovery.create import Made
    from llm_orchestrator.recovery.prove import Proof
    from llm_orchestrator.recovery.prune import Removed
    from llm_orchestrator.recovery.verify import Verified
    from llm_orchestrator.store.base import Database
    from llm_orchestrator.wire.backups import Backups

app = make_app("Make, check, prove, list and prune backup files.")
app.command("schedule")(schedule)
COLUMNS = ("backup_id", "made_at", "size", "is_proved", "is_verified", "is_remote", "file")
FINDINGS = ("check", "state", "finding")
VERDICTS = ("backup_id", "verdict", "why")
DAMAGED = StoreDamaged.exit_code
PARTIAL = NotUploaded.exit_code
Wanted = Annotated[
    str,
    typer.Argument(
        metavar="[BACKUP]", help="An id, a file, s3://BUCKET/NAME, or `latest` (the default)."
    ),
]


@app.callback()
def backup() -> None:
    """Make, check, prove, list and prune backup files."""


@asynccontextmanager
async def maybe_store(session: Session) -> AsyncIterator[Database | None]:
    """The store, or None where it is gone: its backups are wanted most then."""
    store = session.make_store()
    try:
        try:
            await store.open_as_client()
        except StoreError as error:
            session.warn(f"nothing is known of proofs: {error.message}")
            yield None
        else:
            yield store
    finally:
        await store.close()


# -- making ---------------------------------------------------------------------------------------


@app.command()
def create(
    context: typer.Context,
    *,
    folder: AtFolder = None,
    place: AtPlace = None,
    encrypt_to: Annotated[
        list[str] | None,
        typer.Option(
            "--encrypt-to", metavar="KEY|FILE", help="Who can open it: age keys; two or more."
        ),
    ] = None,
    compression: Annotated[
        str | None, typer.Option(metavar="gzip|zstd", help="How to pack it.")
    ] = None,
    bytes_per_s: Annotated[
        int | None, typer.Option(min=0, help="Read no faster than this (0: no bound).")
    ] = None,
    is_pruned: Annotated[
        bool, typer.Option("--prune", help="Afterwards, let old ones go (`backup prune`).")
    ] = False,
    keep_days: KeepDays = None,
    is_proved: Annotated[
        bool, typer.Option("--prove", help="Afterwards, restore it aside and try it.")
    ] = False,
    kind: Annotated[
        BaseKind | None,
        typer.Option("--type", help="Not a file, but a base backup of the server, by Barman."),
    ] = None,
    output: ObjectOutput = ObjectFormat.TABLE,
    is_json: AsJson = False,
) -> int:
    """Back the store up while it is used; prints the file. Exit code 3: made, not copied."""
    session = session_of(context)
    if kind is not None:
        base = session.run(make_base(session, kind))
        is_plain = not is_json and output is ObjectFormat.TABLE
        print_object(base, "json") if not is_plain else emit(str(base["backup_id"]))
        return 0
    given = {
        "backup_dir": folder,
        "backup_place": place,
        "backup_recipients": encrypt_to,
        "backup_compression": compression,
        "backup_bytes_per_s": bytes_per_s,
        **keep_days_of(keep_days),
    }
    making = _Making(session, backups_of(session, given))
    code = session.run(making.make(is_pruned=is_pruned, is_proved=is_proved))
    if is_json or output is not ObjectFormat.TABLE:
        print_object(making.facts, "yaml" if output is ObjectFormat.YAML else "json")
    else:
        emit(str(making.facts["file"]))
    return code


class _Making:
    """One `backup create`: the file, and what is to follow."""

    def __init__(self, session: Session, backups: Backups) -> None:
        self._session = session
        self._backups = backups
        self.facts: dict[str, Json] = {}

    async def make(self, *, is_pruned: bool, is_proved: bool) -> int:
        """The exit code. Raises StoreError when there is no file."""
        session, failure = self._session, None
        async with session.client() as store:
            try:
                with bar(session) as shown:
                    self._made(await self._backups.create(store, shown.watch))
            except NotUploaded as error:  # the file is there: what is to follow follows
                session.warn(error.message)
                session.note(f"hint: {error.hint}")
                failure = error
            catalogue = await self._backups.catalogue(store)
            if failure is not None:  # what the place lacks, it need not be asked for
                catalogue = replace(catalogue, place=None)
            item = await catalogue.find("latest")
            if failure is not None:
                self.facts = {**item.to_json(), "place": ""}
            code = PARTIAL if failure else 0
            if is_proved:
                with bar(session) as shown:
                    proof = await self._backups.prove(
                        catalogue, item, store=store, advance=shown.of("verify")
                    )
                _tell_proof(session, proof)
                self.facts["proof"] = proof.to_json()
                code = code if proof.is_good else DAMAGED
            if is_pruned:
                removed = await _prune(self._backups, catalogue, store, is_dry=False)
                _tell_removed(session, removed, is_dry=False)
                code = code or (PARTIAL if removed.trouble else 0)
        return code

    def _made(self, made: Made) -> None:
        session, manifest = self._session, made.manifest
        for warning in made.warnings:
            session.warn(warning)
        self.facts = {
            "backup_id": manifest.backup_id,
            "file": str(made.file),
            "size_bytes": made.size_bytes,
            "sha256": made.sha256,
            "place": made.place,
            "encryption": manifest.encryption,
            "runs": manifest.counts.get("runs", 0),
            "entries": manifest.counts.get("journal", 0),
            "duration_s": manifest.duration_s,
        }
        where = f", also in {made.place}" if made.place else ""
        session.note(
            f"{manifest.backup_id}: {size(made.size_bytes)} in {manifest.duration_s:.1f} s, "
            f"{count(manifest.counts.get('runs', 0), 'run')}, "
            f"encryption {manifest.encryption}{where}"
        )


# -- looking --------------------------------------------------------------------------------------


@app.command("list")
def list_backups(
    context: typer.Context,
    *,
    folder: AtFolder = None,
    place: AtPlace = None,
    is_local: Annotated[bool, typer.Option("--local", help="Do not ask the second place.")] = False,
    output: Output = Format.TABLE,
    is_json: AsJson = False,
) -> None:
    """List the backups, the newest first. Works without the store."""
    session = session_of(context)
    backups = backups_of(session, {"backup_dir": folder, "backup_place": place})

    async def work() -> list[Item]:
        async with maybe_store(session) as store:
            return await (await backups.catalogue(store)).items(is_local_only=is_local)

    items = session.run(work())
    rows = [{**item.to_json(), "size": size(item.size_bytes)} for item in items]
    kind = Format.JSON if is_json else output
    print_rows(rows, kind, columns=COLUMNS, key="backup_id")
    if not items:
        session.note("there is no backup")
        session.note("hint: llmo backup create")


@app.command()
def show(
    context: typer.Context,
    wanted: Wanted = "latest",
    *,
    folder: AtFolder = None,
    place: AtPlace = None,
    output: ObjectOutput = ObjectFormat.YAML,
    is_json: AsJson = False,
) -> None:
    """Show what a backup says of itself. Not verified: `backup verify` reads all of it."""
    session = session_of(context)
    backups = backups_of(session, {"backup_dir": folder, "backup_place": place})

    async def work() -> dict[str, Json]:
        async with maybe_store(session) as store:
            catalogue = await backups.catalogue(store)
            item = await catalogue.find(wanted)
            manifest = await catalogue.show(item, backups.keys)
            shown: dict[str, Json] = manifest.model_dump(mode="json", exclude={"heads"})
            shown["store_bytes"] = shown.pop("size_bytes")
            return {**item.to_json(), **shown, "unfinished_runs": len(manifest.heads)}

    kind = "json" if is_json or output is ObjectFormat.JSON else "yaml"
    print_object(session.run(work()), kind)


@app.command()
def latest(
    context: typer.Context,
    *,
    folder: AtFolder = None,
    place: AtPlace = None,
    is_json: AsJson = False,
) -> None:
    """Print the newest backup's file (its address, if only the second place has it)."""
    session = session_of(context)
    backups = backups_of(session, {"backup_dir": folder, "backup_place": place})

    async def work() -> Item:
        async with maybe_store(session) as store:
            items = await (await backups.catalogue(store)).items()
            if not items:
                raise NotFound("there is no backup", hint="llmo backup create")
            return items[0]

    item = session.run(work())
    if is_json:
        print_object(item.to_json(), "json")
        return
    shown = backups.place.shown if backups.place is not None else ""
    emit(str(item.file) if item.file is not None else f"{shown}/{item.names[0]}")


# -- judging --------------------------------------------------------------------------------------


@app.command()
def verify(
    context: typer.Context,
    wanted: Wanted = "latest",
    *,
    folder: AtFolder = None,
    place: AtPlace = None,
    is_json: AsJson = False,
) -> None:
    """Read every byte of a backup, without restoring it. Exit code 8: damaged, 12: no key."""
    session = session_of(context)
    backups = backups_of(session, {"backup_dir": folder, "backup_place": place})

    async def work() -> Verified:
        async with maybe_store(session) as store:
            catalogue = await backups.catalogue(store)
            item = await catalogue.find(wanted)
            with bar(session) as shown:
                return await backups.verify(
                    catalogue, item, store=store, advance=shown.of("verify")
                )

    found = session.run(work())
    for note in found.notes:
        session.warn(note)
    manifest = found.manifest
    if is_json:
        facts: dict[str, Json] = {
            "backup_id": manifest.backup_id,
            "size_bytes": found.size_bytes,
            "members": list(found.members),
            "runs": manifest.counts.get("runs", 0),
            "notes": list(found.notes),
        }
        print_object(facts, "json")
    else:
        emit(
            f"{manifest.backup_id} is whole: {size(found.size_bytes)}, "
            f"{len(found.members)} members, {count(manifest.counts.get('runs', 0), 'run')}"
        )


@app.command()
def prove(
    context: typer.Context,
    wanted: Wanted = "latest",
    *,
    folder: AtFolder = None,
    place: AtPlace = None,
    is_json: AsJson = False,
) -> int:
    """Restore a backup aside, check all of it, run an engine on the copy. Exit code 8: no good."""
    session = session_of(context)
    backups = backups_of(session, {"backup_dir": folder, "backup_place": place})

    async def work() -> Proof:
        async with maybe_store(session) as store:
            catalogue = await backups.catalogue(store)
            item = await catalogue.find(wanted)
            with bar(session) as shown:
                proof = await backups.prove(
                    catalogue, item, store=store, advance=shown.of("verify")
                )
            if store is None:
                session.warn("nothing keeps this result: the store is not there")
            return proof

    proof = session.run(work())
    if is_json:
        print_object(proof.to_json(), "json")
    else:
        _tell_proof(session, proof)
        if proof.is_good:
            emit(f"{proof.backup_id} is proved")
    return 0 if proof.is_good else DAMAGED


def _tell_proof(session: Session, proof: Proof) -> None:
    if proof.is_good:
        took = duration(proof.took_s * 1_000)
        session.note(f"restored aside and tried: {count(proof.runs, 'run')}, {took}, no flaw")
        return
    for flaw in proof.to_json()["flaws"]:
        session.warn(flaw)
    session.note(f"error: {proof.backup_id} is no good: {count(len(proof.flaws), 'flaw')}")


@app.command()
def check(
    context: typer.Context,
    *,
    folder: AtFolder = None,
    place: AtPlace = None,
    age_h: Annotated[
        float,
        typer.Option("--max-age", metavar="HOURS", min=0.0, help="How old the newest may be."),
    ] = 26.0,
    proof_age_h: Annotated[
        float,
        typer.Option("--max-proof-age", metavar="HOURS", min=0.0, help="And the last proved one."),
    ] = 192.0,
    output: ObjectOutput = ObjectFormat.TABLE,
    is_json: AsJson = False,
) -> int:
    """Are there backups, young, proved, in both places, and readable? Exit code 1 when not."""
    session = session_of(context)
    backups = backups_of(session, {"backup_dir": folder, "backup_place": place})

    async def work() -> Sequence[Finding]:
        from llm_orchestrator.recovery.catalogue import Limits, check

        async with maybe_store(session) as store:
            limits = Limits(age_h * 3_600, proof_age_h * 3_600)
            return await check(
                await backups.catalogue(store),
                now_us=store.clock.now_us() if store is not None else session.clock.now_us(),
                limits=limits,
                keys=backups.keys,
                more=await check_barman(session, age_s_max=limits.age_s_max),
            )

    found = session.run(work())
    rows = [
        dict(
            zip(FINDINGS, (each.name, "ok" if each.is_good else "error", each.detail), strict=True)
        )
        for each in found
    ]
    kind = "json" if is_json else output.value
    print_rows(rows, kind, columns=FINDINGS, key="check")
    return 0 if all(each.is_good for each in found) else 1


# -- letting go -----------------------------------------------------------------------------------


@app.command()
def prune(
    context: typer.Context,
    *,
    folder: AtFolder = None,
    place: AtPlace = None,
    keep_days: KeepDays = None,
    last: Annotated[int | None, typer.Option("--keep-last", min=0, help="The newest N.")] = None,
    daily: Annotated[
        int | None, typer.Option("--keep-daily", min=0, help="The last one of each of N days,")
    ] = None,
    weekly: Annotated[int | None, typer.Option("--keep-weekly", min=0, help="of N weeks,")] = None,
    monthly: Annotated[
        int | None, typer.Option("--keep-monthly", min=0, help="of N months.")
    ] = None,
    is_dry: DryRun = False,
    output: Output = Format.TABLE,
    is_json: AsJson = False,
) -> int:
    """Let old backups go, here and in the second place. Never the last proved one.

    Exit code 3: some could not be removed.
    """
    session = session_of(context)
    given = {
        "backup_dir": folder,
        "backup_place": place,
        **keep_days_of(keep_days),
        "backup_keep_last": last,
        "backup_keep_daily": daily,
        "backup_keep_weekly": weekly,
        "backup_keep_monthly": monthly,
    }
    backups = backups_of(session, given)

    async def work() -> Removed:
        async with session.client() as store:
            catalogue = await backups.catalogue(store)
            return await _prune(backups, catalogue, store, is_dry=is_dry)

    removed = session.run(work())
    gone = "would go" if is_dry else "removed"
    rows: list[dict[str, Json]] = [
        {
            "backup_id": each.item.backup_id,
            "verdict": "kept" if each.is_kept else gone,
            "why": each.why,
        }
        for each in removed.verdicts
    ]
    print_rows(rows, Format.JSON if is_json else output, columns=VERDICTS, key="backup_id")
    _tell_removed(session, removed, is_dry=is_dry)
    return PARTIAL if removed.trouble else 0


async def _prune(
    backups: Backups, catalogue: Catalogue, store: Database, *, is_dry: bool
) -> Removed:
    from llm_orchestrator.wire.backups import policy_of

    now_us = store.clock.now_us()
    return await backups.prune(catalogue, policy_of(backups.config), now_us=now_us, is_dry=is_dry)


def _tell_removed(session: Session, removed: Removed, *, is_dry: bool) -> None:
    for trouble in removed.trouble:
        session.warn(trouble)
    gone = sum(not each.is_kept for each in removed.verdicts)
    kept = len(removed.verdicts) - gone
    session.note(f"{gone} {'would be' if is_dry else ''} removed, {kept} kept".replace("  ", " "))

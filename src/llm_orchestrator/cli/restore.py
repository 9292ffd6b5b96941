"""`llmo restore`: put the store back from a backup; what is live is touched last, and kept.

    --from-archive   with the stream archive: a backup and all that came after, or segments alone
    --to POINT     up to a moment, an entry (RUN:SEQ), a place in the log, a restore point
    --dry-run      which backup, how big, how long, and what would be taken back; changes nothing
    (nothing)      asks, naming the target; --yes does not ask
    --run RUN      only one run, beside the live ones
    --discard-old  later, when all is well: remove what restores have kept

The old store stays under another name until `--discard-old`. Any failure leaves it as it was.
Exit codes: 8 the backup or the copy is damaged, 11 an engine serves the file, 12 no key opens it.
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_orchestrator.cli.backup import maybe_store
from llm_orchestrator.cli.backup_bar import bar
from llm_orchestrator.cli.backup_given import AtFolder, AtPlace, backups_of
from llm_orchestrator.cli.given import read_moment
from llm_orchestrator.cli.options import AsJson, DryRun, make_app
from llm_orchestrator.cli.output import emit
from llm_orchestrator.cli.restore_report import report, report_run, tell
from llm_orchestrator.cli.session import Session, session_of
from llm_orchestrator.errors import (
    ConfigError,
    InputError,
    NotFound,
    OrchestratorError,
    StoreError,
    StoreLocked,
)
from llm_orchestrator.model import MICROSECONDS, Json, stamp

if TYPE_CHECKING:
    from llm_orchestrator.config import Config
    from llm_orchestrator.recovery.barman import Target
    from llm_orchestrator.recovery.catalogue import Catalogue, Item
    from llm_orchestrator.recovery.from_archive import Chosen, Wanted
    from llm_orchestrator.recovery.manifest import Manifest
    from llm_orchestrator.recovery.readiness import Exposure
    from llm_orchestrator.recovery.restore import Request, Restored
    from llm_orchestrator.store.base import Database
    from llm_orchestrator.wire.backups import Backups

app = make_app("Put the store back from a backup; the old one is kept under another name.")
_ENTRY = re.compile(r"([0-9a-f]{8}-[0-9a-f-]{27}):([1-9]\d*)")


@app.command()
def restore(
    context: typer.Context,
    file: Annotated[
        str | None, typer.Argument(metavar="[BACKUP]", help="As --backup.", show_default=False)
    ] = None,
    *,
    backup: Annotated[
        str | None,
        typer.Option("--backup", metavar="ID", help="An id, a file, s3://BUCKET/NAME (latest)."),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="POINT",
            help="A moment (2h, ISO 8601): by the stream archive or Barman, else the newest backup"
            " made before. An entry (RUN:SEQ): by the archive. A place in the log (16/B374D848) or"
            " a restore point's name: by Barman.",
        ),
    ] = None,
    is_from_archive: Annotated[
        bool,
        typer.Option("--from-archive", help="With the stream archive, up to its end or --to."),
    ] = False,
    run_id: Annotated[
        str | None, typer.Option("--run", metavar="RUN", help="Only this run, beside the others.")
    ] = None,
    to_url: Annotated[
        str | None, typer.Option("--to-url", metavar="URL", help="Into this store, of any kind.")
    ] = None,
    generation: Annotated[
        int | None, typer.Option(min=0, help="The store's last one, where nothing tells it.")
    ] = None,
    may_flaw: Annotated[
        bool, typer.Option("--despite-flaws", help="Take the copy although it is not whole.")
    ] = False,
    is_discarding: Annotated[
        bool, typer.Option("--discard-old", help="Remove the stores that restores have kept.")
    ] = False,
    folder: AtFolder = None,
    place: AtPlace = None,
    is_dry: DryRun = False,
    is_sure: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    is_json: AsJson = False,
) -> None:
    """Verify a backup, put it aside, check it, exchange it for the live store."""
    session = session_of(context)
    given_points = (file, backup) if is_from_archive else (file, backup, to)
    if sum(each is not None for each in given_points) > 1:
        raise typer.BadParameter("give a backup, --backup or --to: one of them")
    backups = backups_of(session, {"store": to_url, "backup_dir": folder, "backup_place": place})
    doing = _Restoring(session, backups, is_sure=is_sure, is_json=is_json)
    if is_discarding:
        if file or backup or to or run_id:
            raise typer.BadParameter("--discard-old stands alone: look at the restored store first")
        session.run(doing.discard(is_dry=is_dry))
        return
    chosen = file or backup or "latest"
    if run_id is not None:
        session.run(doing.one_run(chosen, to, run_id, is_dry=is_dry))
        return
    hold = backups.config.restore_hold
    options = {"generation": generation, "may_flaw": may_flaw, "hold": hold}
    source = ARCHIVE if is_from_archive else source_of(backups.config, to)
    if source == ARCHIVE:
        session.run(doing.from_archive(file or backup, to, options, is_dry=is_dry))
    elif source == BARMAN:
        session.run(doing.from_barman(to or "", options, is_dry=is_dry))
    else:
        session.run(doing.whole(chosen, to, options, is_dry=is_dry))


class _Restoring:
    """One call of `llmo restore`."""

    def __init__(self, session: Session, backups: Backups, *, is_sure: bool, is_json: bool) -> None:
        self._session = session
        self._backups = backups
        self._is_sure = is_sure
        self._is_json = is_json
        session.config = backups.config  # what is opened from now on is the target

    async def whole(
        self, wanted: str, to: str | None, options: dict[str, Any], *, is_dry: bool
    ) -> None:
        """The store, as it was."""
        from llm_orchestrator.recovery.restore import Request

        backups, session = self._backups, self._session
        async with maybe_store(session) as store:
            catalogue = await backups.catalogue(store)
            item = await self._choose(catalogue, wanted, to)
            manifest = await catalogue.show(item, backups.keys)
            plan = await self._plan(store, item, manifest)
        tell(plan, is_json=self._is_json, is_dry=is_dry)
        if is_dry:
            return
        if backups.config.archive_place:
            session.warn("the stream archive knows what came after: --from-archive takes it back")
        self._ask(f"restore {item.backup_id} into {backups.copier.shown}")
        with bar(session) as shown:
            async with backups.base(catalogue, item, advance=shown.of("verify")) as base:
                request = Request(base, why=f"backup {item.backup_id}", **options)
                done = await self._restore(request)
        await self._finish(item.backup_id, done)

    async def from_archive(
        self, base_id: str | None, to: str | None, options: dict[str, Any], *, is_dry: bool
    ) -> None:
        """The store as it was last, or at a point, out of a backup and the stream archive."""
        from llm_orchestrator.recovery.from_archive import choose_source
        from llm_orchestrator.recovery.restore import Request
        from llm_orchestrator.wire.archive import archive_place

        backups, session = self._backups, self._session
        place = archive_place(backups.config, session.clock)
        wanted = read_point(to, now_us=session.clock.now_us())
        async with maybe_store(session) as store:
            catalogue = await backups.catalogue(store)
            item = await catalogue.find(base_id) if base_id else None
            chosen = await choose_source(place, catalogue, wanted, keys=backups.keys, base=item)
            plan = await self._plan_archive(store, chosen)
        tell(plan, is_json=self._is_json, is_dry=is_dry)
        if is_dry:
            return
        why = "the stream archive" + (f" up to {stamp(chosen.until_us)}" if chosen.until_us else "")
        self._ask(f"restore {why} into {backups.copier.shown}")
        fill = chosen.fill(backups.keys, may_miss=options["may_flaw"])
        if chosen.item is None:
            done = await self._restore(Request(None, fill, why=why, **options))
        else:
            with bar(session) as shown:
                advance = shown.of("verify")
                async with backups.base(catalogue, chosen.item, advance=advance) as base:
                    done = await self._restore(Request(base, fill, why=why, **options))
        await self._finish(why, done)

    async def from_barman(self, to: str, options: dict[str, Any], *, is_dry: bool) -> None:
        """The store as it was at a point of the server's log."""
        from llm_orchestrator.recovery.restore import Request
        from llm_orchestrator.wire.barman import base_at, make_barman

        backups, session = self._backups, self._session
        barman = make_barman(backups.config, session.clock)
        target = read_target(to, now_us=session.clock.now_us())
        if trouble := await barman.sync():
            session.warn(f"the live server gives no more of its log: {trouble}")
        base = (await barman.choose(target))[0]
        lost = None
        async with maybe_store(session) as store:
            if target.at_us is not None:
                lost, _ = await self._lost(store, target.at_us)
        plan: dict[str, Json] = {
            "barman": barman.shown,
            "up_to": target.shown,
            "base": base.backup_id,
            "into": backups.copier.shown,
            "size_bytes": base.size_bytes,
            "lost": _plain(lost),
        }
        tell(plan, is_json=self._is_json, is_dry=is_dry)
        if is_dry:
            return
        why = f"{target.shown}, out of {barman.shown}"
        self._ask(f"restore {why} into {backups.copier.shown}")
        session.note("replaying the log on a scratch server")
        async with base_at(backups.config, session.clock, target) as (found, is_reached):
            if not is_reached:
                session.warn("the log ends before that moment: this is all that there is")
            done = await self._restore(Request(found, why=why, **options))
        await self._finish(why, done)

    async def _restore(self, request: Request) -> Restored:
        from llm_orchestrator.recovery.restore import restore
        from llm_orchestrator.wire.recovery import make_checks

        session, config = self._session, self._backups.config
        return await restore(
            self._backups.copier,
            request,
            checks=make_checks(config, session.clock),
            clock=session.clock,
            say=session.note,
        )

    async def _finish(self, source: str, done: Restored) -> None:
        session = self._session
        await self._record(source, done)
        report(session, source, done, is_json=self._is_json)
        if self._backups.config.archive_place:
            await self._make_base()

    async def _make_base(self) -> None:
        """The archive begins anew with a restored store, and leads nowhere without a backup."""
        session = self._session
        try:
            async with session.client() as store:
                made = await self._backups.create(store)
        except StoreLocked:
            return  # an engine is at it
        except OrchestratorError as error:
            session.warn(f"the archive needs a backup of the restored store: {error.message}")
            return
        session.note(f"made {made.manifest.backup_id}: from it the archive goes on")

    async def one_run(self, wanted: str, to: str | None, run_id: str, *, is_dry: bool) -> None:
        """One run, beside the live ones."""
        from llm_orchestrator.recovery.one_run import bring_back

        backups, session = self._backups, self._session
        async with session.client() as store:
            catalogue = await backups.catalogue(store)
            item = await self._choose(catalogue, wanted, to)
            plan = {"run_id": run_id, **item.to_json()}
            tell(plan, is_json=self._is_json, is_dry=is_dry)
            if is_dry:
                return
            self._ask(f"take run {run_id} out of {item.backup_id} into {backups.copier.shown}")
            with bar(session) as shown:
                async with backups.base(catalogue, item, advance=shown.of("verify")) as base:
                    aside = await base.copier.load(base.dump)
                    try:
                        copy = aside.store()
                        await copy.open_as_client()
                        try:
                            detail: dict[str, Json] = {"backup": item.backup_id}
                            async with session.audited(
                                store, "runs.restore", target=run_id, detail=detail
                            ):
                                found = await bring_back(
                                    copy, store, run_id, clock=session.clock, name=item.backup_id
                                )
                        finally:
                            await copy.close()
                    finally:
                        await aside.discard()
        report_run(session, found, is_json=self._is_json)

    async def discard(self, *, is_dry: bool) -> None:
        """Remove what restores have kept."""
        copier = self._backups.copier
        kept = await copier.kept()
        if not kept:
            raise NotFound(f"no restore has kept anything beside {copier.shown}")
        if is_dry:
            for name in kept:
                emit(f"would remove {name}")
            return
        self._ask(f"remove {', '.join(kept)} for good")
        for name in kept:
            await copier.drop(name)
            self._session.note(f"removed {name}")

    # -- before -------------------------------------------------------------------------------

    async def _choose(self, catalogue: Catalogue, wanted: str, to: str | None) -> Item:
        if to is None:
            return await catalogue.find(wanted)
        moment = read_moment(to, "--to", now_us=self._session.clock.now_us())
        items = await catalogue.items()
        for item in items:
            if 0 < item.made_at_us <= moment:
                self._session.warn(
                    f"this is the store of {stamp(item.made_at_us)}: "
                    f"{(moment - item.made_at_us) / MICROSECONDS:.0f} s before the moment asked for"
                )
                return item
        oldest = f"the oldest is of {stamp(items[-1].made_at_us)}" if items else "there is none"
        raise NotFound(f"no backup was made before {stamp(moment)}: {oldest}")

    async def _plan_archive(self, store: Database | None, chosen: Chosen) -> dict[str, Json]:
        """What would be done, for people and --json."""
        until, one, item = chosen.until_us, chosen.one, chosen.item
        lost, _ = await self._lost(store, until) if until else (None, None)
        return {
            "archive": chosen.place.shown,
            "up_to": stamp(until) if until else "its end",
            "backup_id": item.backup_id if item else "none: segments alone",
            "made_at": chosen.manifest.created_at if chosen.manifest else None,
            "into": self._backups.copier.shown,
            "size_bytes": item.size_bytes if item else 0,
            "segments_bytes": one.size_bytes,
            "streams": len(one.streams),
            "lost": _plain(lost) if until else {"runs": 0, "entries": 0, "usd": 0.0},
        }

    async def _lost(self, store: Database | None, since_us: int) -> tuple[Exposure | None, Json]:
        """What the live store did since, and how long the last proof took; None: not known."""
        from llm_orchestrator.recovery.readiness import done_since, read_backups

        if store is None:
            return None, None
        try:
            lost = await done_since(store, since_us, store.clock.now_us())
            return lost, (await read_backups(store)).proved.get("took_s")
        except StoreError as error:
            self._session.warn(f"what would be taken back is not known: {error.message}")
        return None, None

    async def _plan(
        self, store: Database | None, item: Item, manifest: Manifest
    ) -> dict[str, Json]:
        lost, took_s = await self._lost(store, manifest.taken_at)
        return {
            "backup_id": item.backup_id,
            "made_at": manifest.created_at,
            "of": manifest.store,
            "into": self._backups.copier.shown,
            "size_bytes": item.size_bytes,
            "store_bytes": manifest.size_bytes,
            "runs": manifest.counts.get("runs", 0),
            "entries": manifest.counts.get("journal", 0),
            "is_proved": item.is_proved,
            "estimated_s": took_s,
            "lost": _plain(lost),
        }

    def _ask(self, what: str) -> None:
        """Raises ConfigError where nobody can answer, InputError for a no."""
        if self._is_sure:
            return
        if not sys.stdin.isatty():
            raise ConfigError(f"nobody is here to say yes: {what}?", hint="--yes")
        sys.stderr.write(f"{what}? Type yes: ")
        sys.stderr.flush()
        if sys.stdin.readline().strip() != "yes":
            raise InputError("nothing was changed")

    # -- after --------------------------------------------------------------------------------

    async def _record(self, source: str, done: Restored) -> None:
        """What was rewound stands in the restored store's audit log."""
        session = self._session
        detail: dict[str, Json] = {
            "backup": source,
            "generation": done.identity.generation,
            "kept": done.old,
            "rewound": {"runs": done.carried.runs, "entries": done.carried.entries},
        }
        try:
            async with (
                session.client() as store,
                session.audited(
                    store, "store.restore", target=source, detail=detail, is_announced=False
                ),
            ):
                pass
        except StoreError as error:  # it is restored all the same
            session.warn(f"this is not in the audit log: {error.message}")


ARCHIVE, BARMAN = "archive", "barman"


def source_of(config: Config, to: str | None) -> str:
    """What reaches `--to`: the stream archive, Barman, or ("") a backup file made before."""
    if to is None:
        return ""
    if _ENTRY.fullmatch(to):
        return ARCHIVE
    if config.barman_server and not _is_moment(to):
        return BARMAN
    if config.archive_place:
        return ARCHIVE
    return BARMAN if config.barman_server else ""


def _is_moment(to: str) -> bool:
    try:
        read_moment(to, "--to", now_us=0)
    except InputError:
        return False
    return True


def read_target(to: str, *, now_us: int) -> Target:
    """`--to` for Barman: a moment, a place in the log (16/B374D848), a restore point's name."""
    from llm_orchestrator.recovery.barman import LSN, Target

    if LSN.fullmatch(to):
        return Target(lsn=to)
    if not _is_moment(to):
        return Target(name=to)
    return Target(read_moment(to, "--to", now_us=now_us))


def read_point(to: str | None, *, now_us: int) -> Wanted:
    """`--to` for the stream archive. Raises InputError."""
    from llm_orchestrator.recovery.from_archive import Wanted

    if to is None:
        return Wanted()
    if entry := _ENTRY.fullmatch(to):
        return Wanted(run_id=entry[1], seq=int(entry[2]))
    return Wanted(read_moment(to, "--to", now_us=now_us))


def _plain(lost: Exposure | None) -> Json:
    return lost and {"runs": lost.runs, "entries": lost.entries, "usd": lost.usd}

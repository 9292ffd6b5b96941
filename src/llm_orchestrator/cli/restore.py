"""`llmo restore`: put the store back from a backup; what is live is touched last, and kept.

    --dry-run      which backup, how big, how long, and what would be taken back; changes nothing
    (nothing)      asks, naming the target; --yes does not ask
    --run RUN      only one run, beside the live ones
    --discard-old  later, when all is well: remove what restores have kept

The old store stays under another name until `--discard-old`. Any failure leaves it as it was.
Exit codes: 8 the backup or the copy is damaged, 11 an engine serves the file, 12 no key opens it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_orchestrator.cli.backup import maybe_store
from llm_orchestrator.cli.backup_bar import bar
from llm_orchestrator.cli.backup_given import AtFolder, AtPlace, backups_of, size
from llm_orchestrator.cli.given import read_moment
from llm_orchestrator.cli.options import AsJson, DryRun, make_app
from llm_orchestrator.cli.output import count, dollars, duration, emit, print_object
from llm_orchestrator.cli.session import Session, session_of
from llm_orchestrator.errors import ConfigError, InputError, NotFound, StoreError
from llm_orchestrator.model import MICROSECONDS, Json, stamp

if TYPE_CHECKING:
    from llm_orchestrator.recovery.catalogue import Catalogue, Item
    from llm_orchestrator.recovery.manifest import Manifest
    from llm_orchestrator.recovery.one_run import Brought
    from llm_orchestrator.recovery.readiness import Exposure
    from llm_orchestrator.recovery.restore import Restored
    from llm_orchestrator.store.base import Database
    from llm_orchestrator.wire.backups import Backups

app = make_app("Put the store back from a backup; the old one is kept under another name.")
_HELD_SHOWN = 20


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
        typer.Option("--to", metavar="TIME", help="The newest backup made before: 2h, ISO 8601."),
    ] = None,
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
    if sum(each is not None for each in (file, backup, to)) > 1:
        raise typer.BadParameter("give a backup, --backup or --to: one of them")
    given = {"store": to_url, "backup_dir": folder, "backup_place": place}
    backups = backups_of(session, given)
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
    options = {"generation": generation, "may_flaw": may_flaw}
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
        from llm_orchestrator.recovery.restore import Request, restore
        from llm_orchestrator.wire.recovery import make_checks

        backups, session = self._backups, self._session
        async with maybe_store(session) as store:
            catalogue = await backups.catalogue(store)
            item = await self._choose(catalogue, wanted, to)
            manifest = await catalogue.show(item, backups.keys)
            plan = await self._plan(store, item, manifest)
        self._tell(plan)
        if is_dry:
            return
        self._ask(f"restore {item.backup_id} into {backups.copier.shown}")
        with bar(session) as shown:
            async with backups.base(catalogue, item, advance=shown.of("verify")) as base:
                request = Request(base, why=f"backup {item.backup_id}", **options)
                done = await restore(
                    backups.copier,
                    request,
                    checks=make_checks(backups.config, session.clock),
                    clock=session.clock,
                    say=session.note,
                )
        await self._record(item, done)
        self._report(item, done)

    async def one_run(self, wanted: str, to: str | None, run_id: str, *, is_dry: bool) -> None:
        """One run, beside the live ones."""
        from llm_orchestrator.recovery.one_run import bring_back

        backups, session = self._backups, self._session
        async with session.client() as store:
            catalogue = await backups.catalogue(store)
            item = await self._choose(catalogue, wanted, to)
            self._tell({"run_id": run_id, **item.to_json()})
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
        self._report_run(found)

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

    async def _plan(
        self, store: Database | None, item: Item, manifest: Manifest
    ) -> dict[str, Json]:
        from llm_orchestrator.recovery.readiness import done_since, read_backups

        lost: Exposure | None = None
        took_s = None
        if store is not None:
            try:
                lost = await done_since(store, manifest.taken_at, store.clock.now_us())
                proved = (await read_backups(store)).proved
                took_s = proved.get("took_s")
            except StoreError as error:
                self._session.warn(f"what would be taken back is not known: {error.message}")
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
            "lost": None
            if lost is None
            else {"runs": lost.runs, "entries": lost.entries, "usd": lost.usd},
        }

    def _tell(self, plan: dict[str, Json]) -> None:
        if self._is_json:
            print_object(plan, "json")
            return
        for name, value in plan.items():
            if name == "lost":
                shown = _loss(value)
            elif name == "estimated_s":
                shown = f"about {value:.0f} s, as its last proof" if value else "not known"
            elif name.endswith("_bytes"):
                shown = size(value)
            else:
                shown = str(value)
            emit(f"{_WORDS.get(name, name):<14}{shown}")

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

    async def _record(self, item: Item, done: Restored) -> None:
        """What was rewound stands in the restored store's audit log."""
        session = self._session
        detail: dict[str, Json] = {
            "backup": item.backup_id,
            "generation": done.identity.generation,
            "kept": done.old,
            "rewound": {"runs": done.carried.runs, "entries": done.carried.entries},
        }
        try:
            async with (
                session.client() as store,
                session.audited(
                    store, "store.restore", target=item.backup_id, detail=detail, is_announced=False
                ),
            ):
                pass
        except StoreError as error:  # it is restored all the same
            session.warn(f"this is not in the audit log: {error.message}")

    def _report(self, item: Item, done: Restored) -> None:
        session, carried = self._session, done.carried
        for flaw in (*done.flaws, *carried.trouble):
            session.warn(flaw)
        if self._is_json:
            facts: dict[str, Json] = {
                "backup_id": item.backup_id,
                "generation": done.identity.generation,
                "runs": done.runs,
                "old": done.old,
                "took_s": round(done.took_s, 3),
                "rewound": {"runs": carried.runs, "entries": carried.entries},
                "held": list(carried.held),
                "lost": list(carried.trouble),
            }
            print_object(facts, "json")
            return
        emit(
            f"restored {item.backup_id}: {count(done.runs, 'run')}, generation "
            f"{done.identity.generation}, in {duration(done.took_s * 1_000)}"
        )
        if carried.runs:
            session.note(
                f"{count(carried.runs, 'run')} had gone on since: {carried.entries} entries are "
                f"taken back, {dollars(carried.usd)} of them spent"
            )
        if carried.held:
            more = len(carried.held) - _HELD_SHOWN
            shown = ", ".join(carried.held[:_HELD_SHOWN]) + (
                f" and {more} more" if more > 0 else ""
            )
            session.note(f"held, because they would do something twice: {shown}")
            session.note("hint: llmo recovery reconcile list")
        if done.old:
            session.note(f"the old store is kept as {done.old}")
            session.note("hint: llmo restore --discard-old removes it")

    def _report_run(self, found: Brought) -> None:
        if self._is_json:
            print_object({**found._asdict(), "how": found.how.value}, "json")
            return
        emit(f"run {found.run_id} is back {found.how.value}: {count(found.entries, 'entry')}")
        if found.is_held:
            self._session.note("it is held: nobody knows what it did afterwards")
            self._session.note("hint: llmo recovery reconcile list")


_WORDS = {
    "backup_id": "backup",
    "made_at": "made at",
    "size_bytes": "file",
    "store_bytes": "store",
    "is_proved": "proved",
    "estimated_s": "takes",
    "lost": "taken back",
}


def _loss(lost: Json) -> str:
    if not isinstance(lost, dict):
        return "not known: the live store cannot be read"
    if not lost["entries"] and not lost["runs"]:
        return "nothing: no entry was made since"
    spent = f", {dollars(lost['usd'])} spent" if lost["usd"] else ""
    return f"{count(lost['runs'], 'new run')}, {lost['entries']} entries{spent}"

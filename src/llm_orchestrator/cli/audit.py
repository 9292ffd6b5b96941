"""`llmo audit`: who did what, and whether anybody has changed what stands there.

`list` and `verify` read only. What happened is listed once: an intention is left out where its
result is listed, too (--all shows both).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from llm_orchestrator.cli.given import read_json, read_moment
from llm_orchestrator.cli.options import DryRun, Format, Output, make_app
from llm_orchestrator.cli.output import count, print_object, print_rows
from llm_orchestrator.cli.session import Session, session_of, whoami
from llm_orchestrator.errors import InputError, NotFound, StoreDamaged
from llm_orchestrator.model import Json, stamp

if TYPE_CHECKING:
    from llm_orchestrator.security.audit import Head
    from llm_orchestrator.security.audit_check import Checked
    from llm_orchestrator.store.audit import AuditFilter
    from llm_orchestrator.store.base import Database

app = make_app("List who did what, verify that nobody has changed it. Without a verb: list.")
COLUMNS = ("at", "actor", "action", "target", "result", "note")
FLAWS = ("chain_id", "number", "what")
DAMAGED = StoreDamaged.exit_code
_PAGE = 200


@app.command("list")
def list_entries(
    context: typer.Context,
    *,
    actor: Annotated[str | None, typer.Option(help="Only what this one did.")] = None,
    action: Annotated[str | None, typer.Option(help="Only this, e.g. runs.cancel.")] = None,
    target: Annotated[str | None, typer.Option(help="Only to this: a run, a workflow...")] = None,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="Only since then: 2h, 7d, or ISO 8601.")
    ] = None,
    before: Annotated[
        str | None, typer.Option(metavar="ID", help="Only what came before: the next page.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
    is_all: Annotated[
        bool, typer.Option("--all", help="Also intentions whose result is there.")
    ] = False,
    output: Output = Format.TABLE,
) -> None:
    """List what was done, the newest first."""
    session = session_of(context)

    async def work() -> list[dict[str, Json]]:
        from llm_orchestrator.store.audit import AuditFilter

        async with session.client() as store:
            start = None
            if since is not None:
                start = read_moment(since, "--since", now_us=store.clock.now_us())
            wanted = AuditFilter(actor, action, target, since=start, limit=_PAGE)
            return await _rows(store, wanted, before=before, limit=limit, is_all=is_all)

    rows = session.run(work())
    print_rows(rows, output, columns=COLUMNS, key="id")
    if not rows:
        session.note("nothing was done, or nothing like this")
    elif len(rows) == limit:
        session.note(f"hint: more with --before {rows[-1]['id']}")


async def _rows(
    store: Database,
    wanted: AuditFilter,
    *,
    before: str | None,
    limit: int,
    is_all: bool,
) -> list[dict[str, Json]]:
    from llm_orchestrator.security.audit import facts_of, find_entry
    from llm_orchestrator.store.audit import place

    if before is not None:
        last = await find_entry(store.shelf, before)
        if last is None:
            raise NotFound(f"there is no entry {before}", hint="llmo audit list")
        wanted = replace(wanted, before=place(last))
    rows: list[dict[str, Json]] = []
    done: set[object] = set()
    while len(rows) < limit:
        page = await store.shelf.audit(wanted)
        for entry in page:
            facts = facts_of(entry)
            detail = facts["detail"] if isinstance(facts["detail"], dict) else {}
            if isinstance(intent := detail.get("intent"), list):
                done.add(tuple(intent))
            if is_all or entry[:2] not in done:
                rows.append(facts | {"note": _note(detail)})
        if len(page) < _PAGE:
            break
        wanted = replace(wanted, before=place(page[-1]))
    return rows[:limit]


def _note(detail: dict[str, Json]) -> str | None:
    told = {key: value for key, value in detail.items() if key not in ("intent", "heads")}
    return ", ".join(f"{key}={value}" for key, value in told.items() if value is not None) or None


@app.command()
def verify(
    context: typer.Context,
    *,
    known: Annotated[
        str | None,
        typer.Option(
            "--against", metavar="@FILE", help="What an earlier verify -o json printed, kept apart."
        ),
    ] = None,
    output: Output = Format.TABLE,
) -> int:
    """Check every chain; exit code 8 when something was changed or removed.

    `-o json` prints the chains' heads: kept where nobody else writes and given to a later --against
    they also show a log that was rewritten as a whole.
    """
    session = session_of(context)
    heads = _known(read_json(known, "--against")) if known is not None else []
    found = session.run(_verify(session, heads))
    flaws: list[dict[str, Json]] = [
        {"chain_id": flaw.chain_id, "number": flaw.number or None, "what": flaw.what}
        for flaw in found.flaws
    ]
    if output in (Format.TABLE, Format.IDS):
        print_rows(flaws, output, columns=FLAWS, key="chain_id")
    else:
        print_object(_report(found, flaws), "yaml" if output is Format.YAML else "json")
    session.note(
        f"checked {count(found.chains, 'chain')}, {found.entries} entries: "
        f"{len(flaws) or 'nothing'} wrong"
    )
    if found.heads:
        last = max(found.heads, key=lambda head: head.recorded_at)
        session.note(f"the newest head: {last.chain_id}/{last.number} {last.digest.hex()}")
    return DAMAGED if flaws else 0


@app.command()
def forget(
    context: typer.Context,
    *,
    older: Annotated[
        str, typer.Option("--before", metavar="TIME", help="365d, or ISO 8601: what is older goes.")
    ],
    is_dry: DryRun = False,
) -> None:
    """Remove chains that ended before a time; verify knows of it."""
    session = session_of(context)

    async def work() -> int:
        from llm_orchestrator.security.audit_retention import forget, old_chains

        async with session.client() as store:
            before = read_moment(older, "--before", now_us=store.clock.now_us())
            if is_dry:
                return len(await old_chains(store, before))
            log = session.audit_log(store)
            return await forget(store, log, before_us=before, actor=whoami())

    chains = count(session.run(work()), "chain")
    session.note(f"{chains} would be removed; nothing was" if is_dry else f"{chains} removed")


async def _verify(session: Session, known: list[Head]) -> Checked:
    from llm_orchestrator.security.audit_check import check_audit

    async with session.client() as store:
        return await check_audit(store, known=known)


def _report(found: Checked, flaws: list[dict[str, Json]]) -> dict[str, Json]:
    heads = [
        {
            "chain_id": head.chain_id,
            "number": head.number,
            "digest": head.digest.hex(),
            "at": head.recorded_at,
            "recorded_at": stamp(head.recorded_at),
        }
        for head in found.heads
    ]
    return {"chains": found.chains, "entries": found.entries, "flaws": flaws, "heads": heads}


def _known(value: Json) -> list[Head]:
    """Heads as `verify -o json` prints them. Raises InputError."""
    from llm_orchestrator.security.audit import head_of

    try:
        return [head_of(head["chain_id"], head) for head in value["heads"]]
    except (KeyError, TypeError, StoreDamaged) as error:
        raise InputError("--against: no heads in it", hint="llmo audit verify -o json") from error

"""`llmo maintenance`: no new runs for now, on every node, until it is switched off again.

What was accepted goes on, or is let go with --drain; reads, signals, approvals and requests to runs
work in every mode. The mode is kept in the store: it survives restarts of everything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from llm_orchestrator.cli.options import ObjectFormat, ObjectOutput, make_app
from llm_orchestrator.cli.output import print_object, print_table
from llm_orchestrator.cli.session import session_of, whoami
from llm_orchestrator.model import Json, stamp

if TYPE_CHECKING:
    from llm_orchestrator.engine.maintenance import Standing

app = make_app("Refuse new runs for a while. Without a verb: show.")
COLUMNS = ("maintenance", "mode", "by", "since", "retry_after_s", "reason")


@app.command()
def enable(
    context: typer.Context,
    *,
    reason: Annotated[
        str, typer.Option("--reason", help="Why: everybody who is refused reads it.")
    ],
    is_draining: Annotated[
        bool, typer.Option("--drain", help="Nodes also let the runs go that were accepted.")
    ] = False,
    retry_after_s: Annotated[
        float | None,
        typer.Option("--retry-after", min=1.0, help="When to come again, in seconds (30)."),
    ] = None,
    by: Annotated[str | None, typer.Option("--by", help="Who says so (you).")] = None,
) -> None:
    """Refuse new runs everywhere, at once."""
    session = session_of(context)

    async def work() -> Standing:
        from llm_orchestrator.engine.maintenance import Mode, enabled, set_standing

        mode = Mode.DRAIN if is_draining else Mode.KEEP
        async with session.client() as store:
            wanted = enabled(
                by=by or whoami(),
                reason=reason,
                since=store.clock.now_us(),
                mode=mode,
                retry_after_s=retry_after_s,
            )
            detail: dict[str, Json] = {"by": wanted.by, "reason": reason, "mode": mode.value}
            async with session.audited(store, "maintenance.enable", detail=detail):
                return await set_standing(store, wanted)

    standing = session.run(work())
    what = "is let go" if is_draining else "goes on"
    session.note(f"maintenance is on: new runs are refused, what was accepted {what}")
    session.note("hint: llmo maintenance disable")
    print_object(facts_of(standing), "json")


@app.command()
def disable(
    context: typer.Context,
    *,
    by: Annotated[str | None, typer.Option("--by", help="Who says so (you).")] = None,
) -> None:
    """Take new runs again."""
    session = session_of(context)

    async def work() -> Standing:
        from llm_orchestrator.engine.maintenance import Standing, set_standing

        async with session.client() as store:
            wanted = Standing(by=by or whoami(), since=store.clock.now_us())
            detail: dict[str, Json] = {"by": wanted.by}
            async with session.audited(store, "maintenance.disable", detail=detail):
                return await set_standing(store, wanted)

    standing = session.run(work())
    session.note("maintenance is off")
    print_object(facts_of(standing), "json")


@app.command()
def show(context: typer.Context, *, output: ObjectOutput = ObjectFormat.TABLE) -> None:
    """Say whether new runs are refused, by whom and why."""
    session = session_of(context)

    async def work() -> Standing:
        from llm_orchestrator.engine.maintenance import read_orders

        async with session.client() as store:
            return (await read_orders(store.shelf)).standing

    facts = facts_of(session.run(work()))
    if output is ObjectFormat.TABLE:
        state = "on" if facts["enabled"] else "off"
        print_table([{**facts, "maintenance": state}], COLUMNS)
    else:
        print_object(facts, output.value)


def facts_of(standing: Standing) -> dict[str, Json]:
    """The mode for printing."""
    return {
        "enabled": standing.enabled,
        "mode": standing.mode.value,
        "by": standing.by or None,
        "reason": standing.reason or None,
        "since": stamp(standing.since) if standing.since else None,
        "retry_after_s": standing.retry_after_s,
    }

"""`llmo dr status`: what would be lost if the store were gone now, and what is proved.

One line for each mechanism that keeps a second copy, the scorecard 3-2-1-1-0 (three copies, two
media, one elsewhere, one immutable, no error in the last proof), and the objectives. Exit code 6
when something is not met.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm_orchestrator.cli.backup_given import backups_of
from llm_orchestrator.cli.options import AsJson, make_app
from llm_orchestrator.cli.output import emit, print_object, print_rows
from llm_orchestrator.cli.session import Session, session_of
from llm_orchestrator.errors import OrchestratorError
from llm_orchestrator.model import Json

if TYPE_CHECKING:
    from llm_orchestrator.recovery.readiness import Exposure
    from llm_orchestrator.wire.backups import Backups

app = make_app("How ready this site is for a disaster.")
OBJECTIVE_MISSED = 6
EXPOSURES = ("mechanism", "seconds", "entries", "runs", "usd", "detail")
POINTS = ("rule", "met", "finding")
GOALS = ("class", "rto_s", "rpo_s", "last_drill")


@app.callback()
def dr() -> None:
    """How ready this site is for a disaster."""


@app.command()
def status(
    context: typer.Context,
    *,
    objectives: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="dr-objectives.yaml: CLASS: {rto_s, rpo_s}."),
    ] = None,
    is_json: AsJson = False,
) -> int:
    """What would be lost now, by each mechanism; the scorecard; the objectives."""
    session = session_of(context)
    found = session.run(_status(session, objectives))
    if is_json:
        print_object(found, "json")
    else:
        for key, columns in (("exposure", EXPOSURES), ("scorecard", POINTS), ("objectives", GOALS)):
            print_rows(found[key], "table", columns=columns)
            emit("")
        for note in found["notes"]:
            session.note(note)
    is_met = all(row["met"] for row in found["scorecard"])
    return 0 if is_met else OBJECTIVE_MISSED


def _drills(session: Session) -> Mapping[str, Mapping[str, Json]]:
    from llm_orchestrator.drill.report import read

    return read(session.config.data_dir / "drills" / "results", "").results


async def _status(session: Session, objectives: Path | None) -> dict[str, Json]:
    from llm_orchestrator.drill.objectives import standings
    from llm_orchestrator.recovery import readiness

    goals = readiness.read_objectives(objectives)
    backups = backups_of(session, {})
    notes: list[str] = []
    async with session.client() as store:
        now_us = store.clock.now_us()
        records = await readiness.read_backups(store)
        statistics = await store.counts.statistics(now_us, stalled_before=0)
        exposures = [
            readiness.replica_exposure(statistics.standbys),
            await readiness.archive_exposure(store, now_us),
            readiness.wal_exposure(statistics.standbys),
            await readiness.backup_exposure(store, records, now_us),
        ]
    config = session.config
    copies = readiness.Copies(
        standbys=len(readiness.followers(statistics.standbys)),
        log=bool(readiness.receivers(statistics.standbys)),
        backup_folder=True,
        backup_place=str(records.last.get("place") or ""),
        is_locked=bool(config.backup_place and config.s3_object_lock_days),
        archive=config.archive_place,
    )
    if config.backup_recipients:
        notes.append(_keys(backups))
    last = {each.id: each for each in standings(_drills(session), goals)}
    if not any(each.times_s for each in last.values()):
        notes.append("no disaster drill has been run here: objectives are not measured")
    return {
        "exposure": [_exposure(each) for each in exposures],
        "scorecard": [
            {"rule": point.name, "met": point.is_met, "finding": point.detail}
            for point in readiness.scorecard(copies, records)
        ],
        "objectives": [
            {
                "class": name,
                "rto_s": goal.rto_s,
                "rpo_s": goal.rpo_s,
                "last_drill": f"{last[name].status}: {last[name].shown}"
                if last[name].times_s
                else "never",
            }
            for name, goal in goals.items()
        ],
        "notes": notes,
    }


def _exposure(each: Exposure) -> dict[str, Json]:
    row: dict[str, Json] = each._asdict()
    if each.is_at_least and each.usd is not None:
        row["detail"] = f"{each.detail} (dollars: at least)"
    del row["is_at_least"]
    return row


def _keys(backups: Backups) -> str:
    """Whether the keys that open backups are here."""
    try:
        return f"backups are sealed; {len(backups.keys)} keys to open them are here"
    except OrchestratorError as error:
        return f"backups are sealed, and the key to open them is not here: {error.message}"

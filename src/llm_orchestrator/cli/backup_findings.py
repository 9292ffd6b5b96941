"""What `llmo status` and `llmo doctor` say of backups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llm_orchestrator.cli.doctor_postgres import Finding
from llm_orchestrator.errors import OrchestratorError
from llm_orchestrator.model import MICROSECONDS, Json

if TYPE_CHECKING:
    from llm_orchestrator.wire.backups import Backups

AGE_H = 26.0
PROOF_AGE_H = 192.0


def record_findings(records: Mapping[str, Json], now_us: int) -> list[Finding]:
    """How old the last backup and the last proof are; `records` are those of kind `backup`."""
    last, proved, disproved, tally = (
        found if isinstance(found := records.get(key), dict) else {}
        for key in ("last", "proved", "disproved", "tally")
    )
    if not last:
        return [Finding("backups", "warning", "there is none", "llmo backup create")]
    age_h = (now_us - int(last["taken_at"])) / MICROSECONDS / 3_600
    found = [_aged("backups", f"{last['backup_id']}, {_hours(age_h)} old", age_h, limit_h=AGE_H)]
    if int(tally.get("failed_at") or 0) > int(last["taken_at"]):
        what = f"the last one failed: {tally.get('error')}"
        found.append(Finding("backups", "warning", what, "llmo backup create"))
    proved_at = int(proved.get("at") or 0)
    if int(disproved.get("at") or 0) > proved_at:
        what = f"{disproved.get('backup_id')} is no good"
        hint = f"llmo backup prove {disproved.get('backup_id')}"
        return [*found, Finding("proof", "error", what, hint)]
    if not proved_at:
        return [*found, Finding("proof", "warning", "none was ever proved", "llmo backup prove")]
    proof_h = (now_us - proved_at) / MICROSECONDS / 3_600
    what = f"{proved.get('backup_id')} was proved {_hours(proof_h)} ago"
    return [*found, _aged("proof", what, proof_h, limit_h=PROOF_AGE_H)]


async def place_findings(backups: Backups) -> list[Finding]:
    """Whether the key opens and the second place answers. Nothing where neither is set."""
    found = []
    if backups.config.backup_recipients or backups.config.backup_identity:
        try:
            number = len(backups.keys)
        except OrchestratorError as error:
            found.append(Finding("backup key", "error", error.message, error.hint or ""))
        else:
            hint = 'backup_identity = "file:PATH", where restores are made'
            state = "ok" if number else "warning"
            what = "can be read" if number else "none is here: nothing sealed can be opened"
            found.append(Finding("backup key", state, what, "" if number else hint))
    if backups.config.backup_place:
        try:
            place = backups.place
            flaw = await place.check(is_exclusive=False) if place is not None else ""
        except OrchestratorError as error:
            flaw = error.message
        what = flaw or backups.config.backup_place
        state, hint = ("error", "llmo backup check") if flaw else ("ok", "")
        found.append(Finding("backup place", state, what, hint))
    return found


def _aged(name: str, what: str, age_h: float, *, limit_h: float) -> Finding:
    hint = "llmo backup create" if name == "backups" else "llmo backup prove"
    return Finding(name, "warning", what, hint) if age_h > limit_h else Finding(name, "ok", what)


def _hours(hours: float) -> str:
    return f"{hours * 60:.0f} min" if hours < 2 else f"{hours:.0f} h"

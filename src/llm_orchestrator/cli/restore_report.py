"""How `llmo restore` tells what it is going to do, and what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_orchestrator.cli.backup_given import size
from llm_orchestrator.cli.output import count, dollars, duration, emit, print_object
from llm_orchestrator.model import Json, stamp

if TYPE_CHECKING:
    from llm_orchestrator.cli.session import Session
    from llm_orchestrator.recovery.one_run import Brought
    from llm_orchestrator.recovery.restore import Restored

_HELD_SHOWN = 20
_WORDS = {
    "up_to": "up to",
    "segments_bytes": "segments",
    "backup_id": "backup",
    "made_at": "made at",
    "size_bytes": "file",
    "store_bytes": "store",
    "is_proved": "proved",
    "estimated_s": "takes",
    "lost": "taken back",
}


def tell(plan: dict[str, Json], *, is_json: bool, is_dry: bool) -> None:
    """What is going to be done, or (`is_dry`) would be."""
    if is_json:
        if is_dry:  # else the report is the one object
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


def report(session: Session, source: str, done: Restored, *, is_json: bool) -> None:
    """What came of a restore."""
    carried = done.carried
    for flaw in (*done.flaws, *carried.trouble):
        session.warn(flaw)
    if is_json:
        facts: dict[str, Json] = {
            "backup_id": source,
            "generation": done.identity.generation,
            "runs": done.runs,
            "old": done.old,
            "took_s": round(done.took_s, 3),
            "from_archive": done.filled.applied if done.filled else 0,
            "rewound": {"runs": carried.runs, "entries": carried.entries},
            "held": list(carried.held),
            "lost": list(carried.trouble),
        }
        print_object(facts, "json")
        return
    emit(
        f"restored {source}: {count(done.runs, 'run')}, generation "
        f"{done.identity.generation}, in {duration(done.took_s * 1_000)}"
    )
    if (filled := done.filled) is not None and filled.point_us:
        session.note(
            f"the stream archive gave {count(filled.applied, 'change')}, the last one of "
            f"{stamp(filled.point_us)}"
        )
    if carried.runs:
        session.note(
            f"{count(carried.runs, 'run')} had gone on since: {carried.entries} entries are "
            f"taken back, {dollars(carried.usd)} of them spent"
        )
    if carried.held:
        more = len(carried.held) - _HELD_SHOWN
        shown = ", ".join(carried.held[:_HELD_SHOWN]) + (f" and {more} more" if more > 0 else "")
        session.note(f"held, because they would do something twice: {shown}")
        session.note("hint: llmo recovery reconcile list")
    if done.old:
        session.note(f"the old store is kept as {done.old}")
        session.note("hint: llmo restore --discard-old removes it")


def report_run(session: Session, found: Brought, *, is_json: bool) -> None:
    """What came of one run."""
    if is_json:
        print_object({**found._asdict(), "how": found.how.value}, "json")
        return
    emit(f"run {found.run_id} is back {found.how.value}: {count(found.entries, 'entry')}")
    if found.is_held:
        session.note("it is held: nobody knows what it did afterwards")
        session.note("hint: llmo recovery reconcile list")


def _loss(lost: Json) -> str:
    if not isinstance(lost, dict):
        return "not known: the live store cannot be read"
    if not lost["entries"] and not lost["runs"]:
        return "nothing: no entry was made since"
    spent = f", {dollars(lost['usd'])} spent" if lost["usd"] else ""
    return f"{count(lost['runs'], 'new run')}, {lost['entries']} entries{spent}"

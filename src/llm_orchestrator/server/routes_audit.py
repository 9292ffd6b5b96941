"""Who did what, and whether anybody has changed what stands there."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Path, Query
from pydantic import AwareDatetime, Field, StringConstraints

from llm_orchestrator.errors import NotFound
from llm_orchestrator.model import Json
from llm_orchestrator.security.audit import facts_of, find_entry
from llm_orchestrator.security.audit_check import check_audit
from llm_orchestrator.server import models
from llm_orchestrator.server.openapi import answers
from llm_orchestrator.server.principal import Permission
from llm_orchestrator.server.replies import Reply
from llm_orchestrator.server.strict import StrictRoute
from llm_orchestrator.server.surface import Allowed, TheSurface
from llm_orchestrator.store.audit import AuditEntry, AuditFilter

router = APIRouter(prefix="/audit", tags=["audit"], route_class=StrictRoute)
READ = Depends(Allowed(Permission.AUDIT_READ))
HEADS_MAX = 1_000
NUMBER_MAX = 10**12
ChainPath = Annotated[
    str,
    Path(
        min_length=1,
        max_length=200,
        pattern=rf"^[^/{models.CONTROL}]+$",
        description="Its chain: what its id begins with.",
    ),
]
Cursor = Annotated[
    str, StringConstraints(pattern=r"^[0-9]{1,16}-[0-9]{1,12}-([0-9a-f]{2}){0,400}$")
]


class AuditQuery(models.Given):
    """Which entries."""

    actor: models.Word | None = Field(None, description="Who did it: a token's or a user's name.")
    action: models.Word | None = Field(None, description="What was done, e.g. runs.cancel.")
    target: models.Word | None = Field(None, description="To what: a run, a workflow, a node.")
    since: models.Moment | None = Field(None, description="Recorded then or later.")
    until: models.Moment | None = Field(None, description="Recorded before.")
    cursor: Cursor | None = Field(None, description="`next` of the page before.")
    limit: int = Field(100, ge=1, le=models.PAGE_MAX, description="At most so many.")


class AuditFacts(models.Told):
    """One entry."""

    id: str = Field(description="Its chain (one per process life) and its number in it.")
    at: AwareDatetime | None
    actor: str
    action: str
    target: str
    result: Literal["intended", "success", "refused", "failed"]
    detail: Json = Field(description="Facts; `intent` names the entry that announced it.")
    request_id: str = Field(description="The request's X-Request-Id, if it had one.")
    digest: str = Field(description="Over all of it and the digest of the entry before it.")


class AuditPage(models.Told):
    """Entries, the newest first."""

    items: list[AuditFacts]
    next: str | None = Field(description="The cursor of the next page; null on the last one.")


class AuditFlaw(models.Told):
    """Something that is not as it was written."""

    chain_id: str
    number: int = Field(description="0: the chain as a whole.")
    what: str


class AuditHead(models.Told):
    """The end of a chain; to be kept where nobody else writes."""

    chain_id: str
    number: int
    digest: str


class AuditChecked(models.Told):
    """What a check of every chain found."""

    is_whole: bool
    chains: int
    entries: int
    flaws: list[AuditFlaw]
    heads: list[AuditHead] = Field(description="Of the chains that moved last, at most 1,000.")


@router.get(
    "/events",
    operation_id="audit_events",
    responses=answers(_200=AuditPage),
    dependencies=[READ],
)
async def events(wanted: Annotated[AuditQuery, Query()], surface: TheSurface) -> Reply:
    """Who did what, the newest first."""
    found = await surface.store.shelf.audit(
        AuditFilter(
            wanted.actor,
            wanted.action,
            wanted.target,
            since=models.micros(wanted.since),
            until=models.micros(wanted.until),
            before=_place_in(wanted.cursor),
            limit=wanted.limit + 1,
        )
    )
    kept = found[: wanted.limit]
    following = _cursor(kept[-1]) if len(found) > wanted.limit else None
    return Reply({"items": [facts_of(entry) for entry in kept], "next": following})


@router.get(
    "/events/{chain_id}/{number}",
    operation_id="audit_event",
    responses=answers(404, _200=AuditFacts),
    dependencies=[READ],
)
async def event(
    chain_id: ChainPath,
    number: Annotated[int, Path(ge=1, le=NUMBER_MAX, description="What stands behind the slash.")],
    surface: TheSurface,
) -> Reply:
    """One entry, by its id: `/audit/events/` and the id, whose slash is the path's own."""
    wanted = f"{chain_id}/{number}"
    found = await find_entry(surface.store.shelf, wanted)
    if found is None:
        raise NotFound(f"there is no audit entry {wanted}", hint="llmo audit list")
    return Reply(facts_of(found))


@router.get(
    "/verify",
    operation_id="audit_verify",
    responses=answers(_200=AuditChecked),
    dependencies=[READ],
)
async def verify(surface: TheSurface) -> Reply:
    """Check every chain: `is_whole` is false when something was changed or removed."""
    found = await check_audit(surface.store)
    newest = sorted(found.heads, key=lambda head: head.recorded_at, reverse=True)[:HEADS_MAX]
    heads = [
        {"chain_id": head.chain_id, "number": head.number, "digest": head.digest.hex()}
        for head in newest
    ]
    return Reply(
        {
            "is_whole": not found.flaws,
            "chains": found.chains,
            "entries": found.entries,
            "flaws": [flaw._asdict() for flaw in found.flaws],
            "heads": heads,
        }
    )


def _cursor(entry: AuditEntry) -> str:
    return f"{entry.recorded_at}-{entry.number}-{entry.chain_id.encode().hex()}"


def _place_in(cursor: str | None) -> tuple[int, str, int] | None:
    """The inverse; whatever fits the pattern is a place."""
    if cursor is None:
        return None
    at, number, chain_id = cursor.split("-")
    name = bytes.fromhex(chain_id).decode(errors="replace").replace("\0", "")
    return int(at), name, int(number)

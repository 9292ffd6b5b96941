"""What `llmo backup` does with Barman, where one is configured."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm_orchestrator.cli.session import Session
    from llm_orchestrator.model import Json
    from llm_orchestrator.recovery.catalogue import Finding


class BaseKind(StrEnum):
    """Of a base backup."""

    FULL = "full"
    INCR = "incr"


async def make_base(session: Session, kind: BaseKind) -> dict[str, Json]:
    """A base backup of the whole server; point in time begins with it."""
    from llm_orchestrator.wire.barman import make_barman

    barman = make_barman(session.config, session.clock)
    made = await barman.backup(is_incremental=kind is BaseKind.INCR)
    return {
        "backup_id": made.backup_id,
        "type": made.kind,
        "size_bytes": made.size_bytes,
        "server": barman.shown,
    }


async def check_barman(session: Session, *, age_s_max: float) -> list[Finding]:
    """What Barman says of itself; nothing where none is configured."""
    if not session.config.barman_server:
        return []
    from llm_orchestrator.wire.barman import make_barman

    barman = make_barman(session.config, session.clock)
    return await barman.check(now_us=session.clock.now_us(), age_s_max=age_s_max)

"""The server itself: what is in its store, its settings, its nodes, maintenance, breakers."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

from fastapi import APIRouter, Depends, Path

from llm_orchestrator.engine import maintenance
from llm_orchestrator.engine.breakers import list_breakers, reset_breaker, wake_parked
from llm_orchestrator.engine.maintenance import Mode, Orders, Standing
from llm_orchestrator.model import MICROSECONDS, Json, stamp
from llm_orchestrator.server import models_admin as models
from llm_orchestrator.server.openapi import answers
from llm_orchestrator.server.principal import Permission, Principal
from llm_orchestrator.server.replies import Reply
from llm_orchestrator.server.strict import JsonBody, StrictRoute
from llm_orchestrator.server.surface import Allowed, TheSurface
from llm_orchestrator.store.base import Member

router = APIRouter(prefix="/admin", tags=["admin"], route_class=StrictRoute)
READ = Depends(Allowed(Permission.ADMIN_READ))
Admin = Annotated[Principal, Depends(Allowed(Permission.ADMIN_WRITE))]
NodePath = Annotated[
    str,
    Path(
        min_length=1,
        max_length=200,
        pattern=r"^[A-Za-z0-9._-]+$",
        description="A node's id, or the beginning of one.",
    ),
]
STALLED_S = 300


@router.get(
    "/stats",
    operation_id="admin_stats",
    responses=answers(_200=models.Stats),
    dependencies=[READ],
)
async def stats(surface: TheSurface) -> Reply:
    """What is in the store, and what this process does."""
    now = surface.clock.now_us()
    counts = surface.store.counts
    found = await counts.statistics(now, stalled_before=now - STALLED_S * MICROSECONDS)
    states = Counter(node.state for node in await surface.store.shelf.nodes(1_000))
    return Reply(
        {
            "runs": [
                {"state": each.state, "workflow": each.workflow, "count": each.number}
                for each in await counts.census()
            ],
            "queues": [
                {
                    "queue": queue.name,
                    "depth": queue.depth,
                    "oldest_age_s": max(0, now - queue.since) / MICROSECONDS,
                }
                for queue in found.queues
            ],
            "waiting": found.waiting,
            "stalled": found.stalled,
            "nodes": dict(states),
            "driven": surface.node.driver.count if surface.node is not None else 0,
            "epoch": surface.store.generation,
            "version": surface.version,
        }
    )


@router.get(
    "/config",
    operation_id="admin_config",
    responses=answers(_200=models.Settings),
    dependencies=[READ],
)
async def config(surface: TheSurface) -> Reply:
    """Every setting of this process and where it came from; secrets are masked."""
    return Reply({"items": [setting._asdict() for setting in surface.settings]})


@router.get(
    "/maintenance",
    operation_id="admin_maintenance",
    responses=answers(_200=models.Maintained),
    dependencies=[READ],
)
async def show_maintenance(surface: TheSurface) -> Reply:
    """Maintenance mode as it stands: who and why."""
    return Reply(_maintained(await maintenance.read_orders(surface.store.shelf)))


@router.post(
    "/maintenance/enable",
    operation_id="admin_maintenance_enable",
    responses=answers(_200=models.Maintained),
)
async def enable(
    surface: TheSurface,
    who: Admin,
    body: Annotated[models.Maintain, Depends(JsonBody(models.Maintain, is_required=False))],
) -> Reply:
    """Refuse new runs everywhere; what was accepted goes on, or waits with `drain`."""
    standing = maintenance.enabled(
        by=who.name,
        reason=body.reason,
        since=surface.clock.now_us(),
        mode=Mode(body.mode),
        retry_after_s=body.retry_after_s,
    )
    await maintenance.set_standing(surface.store, standing)
    return Reply(_maintained(await maintenance.read_orders(surface.store.shelf)))


@router.post(
    "/maintenance/disable",
    operation_id="admin_maintenance_disable",
    responses=answers(_200=models.Maintained),
    dependencies=[Depends(Allowed(Permission.ADMIN_WRITE))],
)
async def disable(surface: TheSurface) -> Reply:
    """Take new runs again."""
    await maintenance.set_standing(surface.store, Standing())
    return Reply(_maintained(await maintenance.read_orders(surface.store.shelf)))


@router.get(
    "/circuit-breakers",
    operation_id="admin_breakers",
    responses=answers(_200=models.Breakers),
    dependencies=[READ],
)
async def breakers(surface: TheSurface) -> Reply:
    """The circuit breakers of all providers, shared by all nodes."""
    found = await list_breakers(surface.store.shelf, surface.clock.now_us())
    return Reply({"items": [each.to_json() for each in found]})


@router.post(
    "/circuit-breaker/reset",
    operation_id="admin_breaker_reset",
    responses=answers(404, 409, _200=models.ResetDone),
)
async def reset(
    surface: TheSurface,
    who: Admin,
    body: Annotated[models.Reset, Depends(JsonBody(models.Reset))],
) -> Reply:
    """Close a breaker on every node; runs that are parked on it go on, in growing waves."""
    was_open = await reset_breaker(surface.store, body.name, by=who.name)
    woken = await wake_parked(surface.store, body.name, surface.clock)
    return Reply({"name": body.name, "was_open": was_open, "woken": woken})


@router.get(
    "/nodes",
    operation_id="admin_nodes",
    responses=answers(_200=models.Nodes),
    dependencies=[READ],
)
async def nodes(surface: TheSurface) -> Reply:
    """The nodes that there are and lately were."""
    orders = await maintenance.read_orders(surface.store.shelf)
    found = await surface.store.shelf.nodes(1_000)
    return Reply({"items": [_node(each, orders) for each in found]})


@router.post(
    "/nodes/{node}/drain",
    operation_id="admin_node_drain",
    responses=answers(404, 409, _200=models.Drained),
)
async def drain(
    node: NodePath,
    surface: TheSurface,
    who: Admin,
    body: Annotated[models.Why, Depends(JsonBody(models.Why, is_required=False))],
) -> Reply:
    """Let a node's runs go, and give it no new ones."""
    now = surface.clock.now_us()
    node_id = await maintenance.drain_node(
        surface.store, node, by=who.name, reason=body.reason, since=now
    )
    return Reply({"node_id": node_id, "is_drained": True})


@router.post(
    "/nodes/{node}/undrain",
    operation_id="admin_node_undrain",
    responses=answers(404, 409, _200=models.Drained),
    dependencies=[Depends(Allowed(Permission.ADMIN_WRITE))],
)
async def undrain(node: NodePath, surface: TheSurface) -> Reply:
    """Let a drained node work again."""
    node_id = await maintenance.undrain_node(surface.store, node)
    return Reply({"node_id": node_id, "is_drained": False})


def _maintained(orders: Orders) -> dict[str, Json]:
    standing = orders.standing
    return {
        "enabled": standing.enabled,
        "mode": standing.mode.value,
        "by": standing.by,
        "reason": standing.reason,
        "since": stamp(standing.since),
        "retry_after_s": standing.retry_after_s,
        "drained": sorted(orders.drained),
    }


def _node(node: Member, orders: Orders) -> dict[str, Json]:
    return {
        "node_id": node.node_id,
        "region": node.region,
        "state": str(node.state),
        "is_connected": node.is_connected,
        "is_drained": orders.drains(node.node_id),
        "beat": node.beat,
        "started_at": stamp(node.started_at),
        "heartbeat_at": stamp(node.heartbeat_at),
        "info": node.info,
    }

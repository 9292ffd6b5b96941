"""Is it alive, may it get requests, what is wrong: `/health` and its three questions.

`live` touches nothing. `ready` says whether this process should get requests and new work: the
store can be written, no maintenance, no draining, not stopping, and the lease is held. `startup` is
true once it was. None needs a token, and none tells anything secret.
"""

from __future__ import annotations

from fastapi import APIRouter

from llm_orchestrator.engine.breakers import list_breakers
from llm_orchestrator.errors import Draining, Maintenance, OrchestratorError, StoreError
from llm_orchestrator.model import MICROSECONDS, Json
from llm_orchestrator.providers.breaker import State
from llm_orchestrator.server import models_admin as models
from llm_orchestrator.server.openapi import answers
from llm_orchestrator.server.probe import Finding
from llm_orchestrator.server.replies import Reply
from llm_orchestrator.server.strict import StrictRoute
from llm_orchestrator.server.surface import Surface, TheSurface

router = APIRouter(tags=["health"], route_class=StrictRoute)
SLOW_MS = 1_000.0
LANDING_S = 2.0
"""How long a result may be on its way into the store before it is one that waits."""
_ORDER = ("healthy", "degraded", "unhealthy")
Component = dict[str, Json]


@router.get("/health/live", operation_id="health_live", responses=answers(_200=models.Life))
async def live() -> Reply:
    """The process answers."""
    return Reply({"status": "healthy"})


@router.get(
    "/health/startup",
    operation_id="health_startup",
    responses=answers(_200=models.Life, _503=models.Life),
)
async def startup(surface: TheSurface) -> Reply:
    """It has begun to work: 200, before that 503."""
    if surface.is_started():
        return Reply({"status": "healthy"})
    return Reply({"status": "unhealthy"}, 503)


@router.get(
    "/health/ready",
    operation_id="health_ready",
    responses=answers(_200=models.Readiness, _503=models.Readiness),
)
async def ready(surface: TheSurface) -> Reply:
    """Requests and new work may come here: 200, else 503 with every reason."""
    reasons = []
    if surface.is_stopping():
        reasons.append("the process stops")
    found = await surface.probe.ask()
    if found.trouble:
        reasons.append(f"the store cannot be written: {found.trouble}")
    if surface.node is not None and not surface.node.heart.holds():
        reasons.append("the node does not hold its lease")
    try:
        await surface.admission.check()
    except OrchestratorError as error:
        if not found.trouble or isinstance(error, Draining | Maintenance):
            reasons.append(error.message)
    status = "unhealthy" if reasons else "healthy"
    return Reply({"status": status, "reasons": reasons}, 503 if reasons else 200)


@router.get(
    "/health",
    operation_id="health",
    responses=answers(_200=models.Health, _503=models.Health),
)
async def health(surface: TheSurface) -> Reply:
    """Every part of it: 200 while it works, be it with trouble (degraded); 503 when it does not."""
    found = await surface.probe.ask()
    parts = {"store": _store(found), "store_breaker": _breaker(surface), "node": _node(surface)}
    if not found.trouble:
        parts["providers"] = await _providers(surface)
    parts["maintenance"] = await _maintenance(surface)
    extra = {"memory": _memory(surface), "spool": _spool(surface)}
    parts |= {name: part for name, part in extra.items() if part is not None}
    status = max((str(part["status"]) for part in parts.values()), key=_ORDER.index)
    body = {
        "status": status,
        "version": surface.version,
        "region": surface.region,
        "node": surface.node.node_id if surface.node is not None else None,
        "components": parts,
    }
    return Reply(body, 503 if status == "unhealthy" else 200)


def _part(status: str, detail: str = "", *, latency_ms: float | None = None) -> Component:
    return {"status": status, "latency_ms": latency_ms, "detail": detail}


def _store(found: Finding) -> Component:
    if found.trouble:
        return _part("unhealthy", found.trouble, latency_ms=found.read_ms)
    slowest = max(found.read_ms or 0.0, found.write_ms or 0.0)
    detail = f"read {found.read_ms} ms, commit {found.write_ms} ms"
    status = "degraded" if slowest > SLOW_MS else "healthy"
    return _part(status, detail, latency_ms=found.write_ms)


def _breaker(surface: Surface) -> Component:
    """Before the store, as requests meet it: each process has its own."""
    told = surface.gate.to_json()
    state = surface.gate.state
    if state is State.CLOSED:
        return _part("healthy", state.value)
    detail = f"{state.value}: {told['detail']}"
    if state is State.OPEN:
        return _part("unhealthy", f"{detail}; asked again in {told['retry_in_s']} s")
    return _part("degraded", detail)


def _node(surface: Surface) -> Component:
    node = surface.node
    if node is None:
        return _part("healthy", "this process serves the API only")
    if surface.is_stopping():
        return _part("degraded", "it stops")
    if not node.heart.holds():
        return _part("unhealthy", "it does not hold its lease")
    if node.upkeep.draining:
        return _part("degraded", node.upkeep.draining)
    return _part("healthy", f"{node.driver.count} runs, room for {node.driver.room}")


async def _providers(surface: Surface) -> Component:
    started = surface.clock.monotonic()
    try:
        breakers = await list_breakers(surface.store.shelf, surface.clock.now_us())
    except StoreError as error:
        return _part("degraded", error.message)
    latency_ms = round((surface.clock.monotonic() - started) * 1_000, 3)
    shut = [f"{each.name} is {each.state}" for each in breakers if each.state is not State.CLOSED]
    return _part("degraded" if shut else "healthy", "; ".join(shut), latency_ms=latency_ms)


async def _maintenance(surface: Surface) -> Component:
    try:
        await surface.admission.check()
    except (Maintenance, Draining) as error:
        return _part("degraded", error.message)
    except StoreError as error:
        return _part("degraded", error.message)
    return _part("healthy")


def _memory(surface: Surface) -> Component | None:
    told = surface.node.upkeep.info().get("memory") if surface.node is not None else None
    if not isinstance(told, dict):
        return None
    is_shedding = bool(told.get("is_shedding"))
    detail = f"{told.get('use')} of {told.get('limit')} bytes"
    return _part("degraded" if is_shedding else "healthy", detail)


def _spool(surface: Surface) -> Component | None:
    """Results that were paid for and that the store has not taken yet."""
    spool = surface.node.spool if surface.node is not None else None
    if spool is None:
        return None
    (results, size), oldest_at = spool.held, spool.oldest_at
    detail = f"{results} results are held, {size} bytes"
    if oldest_at is None:
        return _part("healthy", detail)
    age_s = max(0.0, (surface.clock.now_us() - oldest_at) / MICROSECONDS)
    status = "degraded" if age_s > LANDING_S else "healthy"
    return _part(status, f"{detail}; the oldest has waited for the store for {age_s:.1f} s")

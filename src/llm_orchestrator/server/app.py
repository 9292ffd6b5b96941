"""The application: every group of routes, the bounds on what comes in, and one shape of errors."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI

from llm_orchestrator.server import (
    openapi,
    problems,
    routes_admin,
    routes_audit,
    routes_bulk,
    routes_changes,
    routes_earlier,
    routes_execute,
    routes_health,
    routes_metrics,
    routes_model,
    routes_runs,
    routes_streams,
    routes_workflows,
)
from llm_orchestrator.server.auditing import Auditing
from llm_orchestrator.server.bounds import Bounds
from llm_orchestrator.server.measure import Measure
from llm_orchestrator.server.surface import Surface
from llm_orchestrator.server.trace import TraceContext

TITLE = "LLM Orchestrator"
API = "/api/v1"
_API: tuple[APIRouter, ...] = (
    routes_execute.router,
    routes_workflows.router,
    routes_bulk.router,
    routes_runs.router,
    routes_changes.router,
    routes_admin.router,
    routes_audit.router,
    routes_streams.router,
    routes_earlier.router,
)
"""Groups of routes under /api/v1."""


def make_app(surface: Surface, *, has_api: bool = True) -> FastAPI:
    """The ASGI application of a process; without `has_api` only health and metrics."""
    app = FastAPI(
        title=TITLE,
        version=surface.version,
        docs_url=None,
        redoc_url=None,
        separate_input_output_schemas=False,
    )
    app.state.surface = surface
    problems.install(app)
    openapi.install(app)
    app.add_middleware(Auditing, log=surface.audit)
    app.add_middleware(Bounds)
    app.add_middleware(TraceContext)
    app.add_middleware(Measure, metrics=surface.metrics, clock=surface.clock)
    app.include_router(routes_health.router)
    app.include_router(routes_metrics.router)
    for router in _API if has_api else ():
        app.include_router(router, prefix=API)
    if has_api:
        app.include_router(routes_model.router)
    return app

"""`GET /metrics`: what this process counts, and the gauges of its store, for Prometheus.

Needs no token, as health does not: it tells names of workflows, queues, models and nodes, and
numbers. It answers while the store does not.
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from llm_orchestrator.server.surface import TheSurface
from llm_orchestrator.telemetry.metrics_page import write_page

router = APIRouter(tags=["metrics"])


@router.get("/metrics", include_in_schema=False)
async def show_metrics(request: Request, surface: TheSurface) -> Response:
    """Prometheus' text, or OpenMetrics if `Accept` asks for it."""
    samples = await surface.collector.samples()
    page, content_type = write_page(
        surface.metrics, samples, request.headers.get("accept", "text/plain")
    )
    return Response(page, headers={"Content-Type": content_type, "Cache-Control": "no-store"})

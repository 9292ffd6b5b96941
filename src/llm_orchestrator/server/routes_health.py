"""Is it alive, may it get requests, what is wrong: `/health` and its three questions.

`live` touches nothing. `ready` says whether this process should get requests and new work: the
store can be written, no maintenance, no draining, not stopping. `startup` is true once it was.
"""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse

router = APIRouter(tags=["health"])


@router.get("/health/live")
async def live() -> JSONResponse:
    """The process answers."""
    return JSONResponse({"status": "healthy"})

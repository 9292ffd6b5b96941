"""Leaving an engine in order, but not for ever: a full disk must not keep a stopped process."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from llm_orchestrator.cli.report import say

if TYPE_CHECKING:
    from llm_orchestrator.wire import Orchestrator

PATIENCE_S = 5.0
"""What the store gets, beside the steps' grace, to take the last entries."""


async def close_engine(orchestrator: Orchestrator, *, grace_s: float) -> None:
    """Release the runs and free the store. What it does not take in time is done again later."""
    try:
        async with asyncio.timeout(grace_s + PATIENCE_S):
            await orchestrator.close(grace_s=grace_s)
    except TimeoutError:
        say(
            "error: the store does not take the last entries; steps whose end it does not have "
            "run again\nhint: llmo doctor"
        )

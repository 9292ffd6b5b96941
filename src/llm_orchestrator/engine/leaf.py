"""Performing one leaf step: the same for a workflow file's step and for `ctx.use` in Python."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from llm_orchestrator.engine.attempt import Attempt
from llm_orchestrator.engine.execution import Execution
from llm_orchestrator.errors import OrchestratorError
from llm_orchestrator.language.base import BaseStep
from llm_orchestrator.model import Json, Policy
from llm_orchestrator.steps.base import Leaf, Outputs


class Call(NamedTuple):
    """A leaf and its rendered configuration. `limit` bounds the run's own steps in flight."""

    leaf: Leaf
    config: BaseStep
    limit: asyncio.Semaphore | None = None


async def perform_leaf(
    execution: Execution, attempt: Attempt, call: Call, *, at: int = -1
) -> Outputs:
    """The leaf's recorded outputs, or those of doing it now, by its own policy."""
    leaf, config, limit = call
    attempt.asked = tuple(str(getattr(config, name, "")) for name in ("provider", "model"))

    async def work(number: int) -> Json:
        await attempt.begin(number)
        if limit is None:
            return await leaf.execute(attempt, config)
        async with limit:
            return await leaf.execute(attempt, config)

    policy = config.policy(leaf.effect(config), leaf.is_paid)
    return dict(await execution.perform(attempt.step, work, policy, extras=attempt, at=at))


async def fail_leaf(execution: Execution, attempt: Attempt, error: OrchestratorError) -> Outputs:
    """Record that a step cannot even be configured. Raises StepFailed."""

    async def work(number: int) -> Json:
        await attempt.begin(number)
        raise error

    return dict(await execution.perform(attempt.step, work, Policy(), extras=attempt))

"""Asking the world whether an effect of unknown outcome happened (`on_unknown: probe`)."""

from __future__ import annotations

from llm_orchestrator.errors import ProviderInvalidRequest
from llm_orchestrator.language.base import Probe
from llm_orchestrator.language.steps import ActionStep, PythonStep
from llm_orchestrator.model import Json
from llm_orchestrator.steps.base import Outputs, StepContext
from llm_orchestrator.steps.registry import StepTypes


async def ask(probe: Probe, context: StepContext, step_types: StepTypes) -> dict[str, Json] | None:
    """{"result": what the probe returned} if the effect happened, None if it did not.

    A function says so by what it returns (None, False: no). A URL by its answer: `expect` is a
    status or a piece of the body; without it any 2xx means yes and 404 means no. Other errors are
    raised: the outcome is then still unknown.
    """
    if probe.function is not None:
        call = PythonStep(id="probe", type="python", function=probe.function)
        found = (await step_types.leaf("python").execute(context, call))["result"]
        return None if found is None or found is False else {"result": {"result": found}}
    request = ActionStep.model_validate(
        {"id": "probe", "type": "action", "action": "http", "url": probe.url, "method": "GET"}
    )
    try:
        answer = await step_types.leaf("action").execute(context, request)
    except ProviderInvalidRequest as error:
        if error.status == 404:
            return None
        raise
    return {"result": dict(answer)} if _fits(probe.expect, answer) else None


def _fits(expect: Json, answer: Outputs) -> bool:
    if expect is None:
        return True
    if isinstance(expect, int):
        return bool(answer["status"] == expect)
    return str(expect) in str(answer["body"])

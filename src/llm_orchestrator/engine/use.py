"""Built-in step types out of a Python workflow (`ctx.use`). Loaded when the first one is used."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from llm_orchestrator.engine.attempt import Attempt
from llm_orchestrator.engine.execution import Execution
from llm_orchestrator.engine.leaf import Call, perform_leaf
from llm_orchestrator.errors import AuthorError
from llm_orchestrator.language.definition import registry
from llm_orchestrator.language.explain import explain
from llm_orchestrator.steps.base import Outputs


async def use(execution: Execution, key: str, config: dict[str, Any], *, at: int) -> Outputs:
    """Perform one leaf step. Raises AuthorError when `config` does not fit its type."""
    if execution.services.tools is None:
        raise AuthorError("this engine has no built-in step types")
    tools = execution.services.tools()
    leaf = tools.step_types.leaf(
        config["type"]
    )  # a control step has no place in Python: it is code
    model = registry(tools.schemas)[config["type"]]
    data = {**config, "id": "".join(c if c.isalnum() or c in "-_" else "_" for c in key)}
    try:
        step = model.model_validate(data, context={"rendered": True})
    except ValidationError as error:
        problems = "; ".join(message for _, message in explain(error, model, data))
        raise AuthorError(f"ctx.use({config['type']!r}): {problems}") from error
    attempt = Attempt(execution, key, tools.providers)
    attempt.step_type = step.type
    return await perform_leaf(execution, attempt, Call(leaf, step), at=at)

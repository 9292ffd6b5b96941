"""Step type `python`: a function of the author's own, by `module:name`.

Coroutine functions are awaited; plain functions run in a thread, so that they do not hold the
engine up (a thread cannot be stopped: a function that outlives its step's timeout runs on, and its
result is thrown away). An exception of the function leaves as it is: the engine treats it like one
out of a `@step`. The result must be JSON.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any, ClassVar

from llm_orchestrator.errors import AuthorError
from llm_orchestrator.model import Effect
from llm_orchestrator.steps.base import Outputs, StepContext
from llm_orchestrator.steps.values import plain_json


class Python:
    """Calls `function` with `args` by name; `output` binds result."""

    type: ClassVar[str] = "python"
    outputs: ClassVar[tuple[str, ...]] = ("result",)
    is_paid: ClassVar[bool] = False

    def effect(self, config: Any) -> Effect:
        """Nobody but its author knows what a function does."""
        return Effect.ONCE

    async def execute(self, context: StepContext, config: Any) -> Outputs:
        """Raises AuthorError for what cannot be called or is no JSON; else what the call raises."""
        function = await asyncio.to_thread(load, config.function)
        arguments = _arguments(config, function, context)
        if inspect.iscoroutinefunction(function):
            result = await function(**arguments)
        else:
            result = await asyncio.to_thread(function, **arguments)
            if inspect.isawaitable(result):
                result = await result
        return {"result": plain_json(result, what=f"what {config.function} returned")}


def load(name: str) -> Callable[..., Any]:
    """The function that `module:name` (or `module:Class.name`) stands for. Raises AuthorError."""
    module_name, _, attribute = name.partition(":")
    try:
        found: Any = import_module(module_name)
    except ModuleNotFoundError as error:
        raise AuthorError(
            f"there is no module {error.name!r} for {name!r}",
            hint="is it installed, or on PYTHONPATH, where the engine runs?",
        ) from error
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise AuthorError(f"module {module_name!r} has no function {attribute!r}")
    return found  # type: ignore[no-any-return]


def _arguments(config: Any, function: Callable[..., Any], context: StepContext) -> dict[str, Any]:
    """`args`, and the context where the function asks for it. Raises AuthorError for a misfit."""
    arguments = dict(config.args)
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):
        return arguments
    if "context" in signature.parameters and "context" not in arguments:
        arguments["context"] = context
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise AuthorError(f"{config.function} cannot take these args: {error}") from error
    return arguments

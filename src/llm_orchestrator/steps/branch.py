"""Step type `branch`: one of several lists of steps, chosen by a value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from llm_orchestrator.model import Json
from llm_orchestrator.steps.base import Child, Names, Outcome, Plan
from llm_orchestrator.steps.children import find_failure, result_of
from llm_orchestrator.steps.values import is_number, to_json

DEFAULT = "default"


class Branch:
    """Runs the steps under the value of `switch`, else `default`; binds result, branch."""

    type: ClassVar[str] = "branch"
    outputs: ClassVar[tuple[str, ...]] = ("result", "branch")

    def plan(
        self,
        config: Any,
        names: Names,
        children: Mapping[str, Outcome],
        *,
        waited: Json | None = None,
    ) -> Plan:
        """One child, or none when nothing matches. The choice is made once and kept by its key.

        The result is the last step's first output, null when that was skipped.
        """
        if failure := find_failure(children):
            return Plan(error=f"branch {failure}")
        for key, outcome in children.items():
            chosen = _unkey(key)
            outputs = {"result": result_of(_steps(config, chosen), outcome), "branch": chosen}
            return Plan(outputs=outputs)
        text = to_branch(names.evaluate(config.switch))
        chosen = next((name for name in (text, text.strip()) if name in config.branches), DEFAULT)
        steps = _steps(config, chosen)
        if not steps:
            is_named = chosen in config.branches
            return Plan(outputs={"result": None, "branch": chosen if is_named else None})
        return Plan(children=[Child(_key(chosen), steps, is_shared=True)])


def to_branch(value: Json) -> str:
    """A value as the name of a branch: true and false, 3 also for 3.0, null, a text as it is."""
    if isinstance(value, str):
        return value
    if is_number(value) and value == int(value):
        return str(int(value))
    return to_json(value)


def _steps(config: Any, chosen: str) -> Any:
    return config.branches.get(chosen, config.default)


def _key(chosen: str) -> str:
    """A child's key is one part of a path, so it holds no slash."""
    return chosen.replace("%", "%25").replace("/", "%2F")


def _unkey(key: str) -> str:
    return key.replace("%2F", "/").replace("%25", "%")

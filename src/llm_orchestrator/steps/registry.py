"""Every step type by name, each loaded when it is first used.

Built-in types cannot be replaced. Plug-ins (entry points `llm_orchestrator.steps`) name a class
that needs no arguments: a leaf when it has `execute`, a control step when it has `plan`.
"""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import Any, cast

from llm_orchestrator.errors import AuthorError, OperatorError
from llm_orchestrator.steps.action import Action, Actions
from llm_orchestrator.steps.base import Control, Leaf

PLUG_INS = "llm_orchestrator.steps"
_LEAVES = {
    "llm": ("llm_orchestrator.steps.llm", "LLM"),
    "embed": ("llm_orchestrator.steps.embed", "Embed"),
    "vector_search": ("llm_orchestrator.steps.vector_search", "VectorSearch"),
    "vector_upsert": ("llm_orchestrator.steps.vector_upsert", "VectorUpsert"),
    "transform": ("llm_orchestrator.steps.transform", "Transform"),
    "python": ("llm_orchestrator.steps.python", "Python"),
}
_CONTROLS = {
    "parallel": ("llm_orchestrator.steps.parallel", "Parallel"),
    "map": ("llm_orchestrator.steps.map", "Map"),
    "branch": ("llm_orchestrator.steps.branch", "Branch"),
    "loop": ("llm_orchestrator.steps.loop", "Loop"),
    "wait": ("llm_orchestrator.steps.wait", "Wait"),
    "approval": ("llm_orchestrator.steps.approval", "Approval"),
    "workflow": ("llm_orchestrator.steps.child", "ChildWorkflow"),
}
BUILT_IN = frozenset({"action", *_LEAVES, *_CONTROLS})


class StepTypes:
    """Leaves and control steps by type. `actions` and `extra` are handed in by whoever wires."""

    def __init__(
        self, actions: Actions | None = None, *, extra: tuple[Leaf | Control, ...] = ()
    ) -> None:
        for step in extra:
            if step.type in BUILT_IN:
                raise OperatorError(f"step type {step.type!r} is built in and cannot be replaced")
        self._known: dict[str, Leaf | Control] = {step.type: step for step in extra}
        self.actions = actions or Actions()
        self._known["action"] = Action(self.actions)
        self._plug_ins: dict[str, Any] | None = None

    def leaf(self, name: str) -> Leaf:
        """The leaf of that type. Raises AuthorError when there is none."""
        found = self._find(name)
        if _is_control(found):
            raise AuthorError(f"step type {name!r} plans and does not execute")
        return cast("Leaf", found)

    def control(self, name: str) -> Control:
        """The control step of that type. Raises AuthorError when there is none."""
        found = self._find(name)
        if not _is_control(found):
            raise AuthorError(f"step type {name!r} executes and does not plan")
        return cast("Control", found)

    def is_control(self, name: str) -> bool:
        """True when the type only plans. Raises AuthorError for a type that nobody knows."""
        if name in _CONTROLS:
            return True
        return name not in BUILT_IN and _is_control(self._find(name))

    def names(self) -> list[str]:
        """Every type, plug-ins included, sorted."""
        return sorted({*BUILT_IN, *self._known, *self._look_for_plug_ins()})

    def _find(self, name: str) -> Leaf | Control:
        if name not in self._known:
            self._known[name] = self._load(name)
        return self._known[name]

    def _load(self, name: str) -> Leaf | Control:
        place = _LEAVES.get(name) or _CONTROLS.get(name)
        if place is not None:
            return cast("Leaf | Control", getattr(import_module(place[0]), place[1])())
        plug_in = self._look_for_plug_ins().get(name)
        if plug_in is None:
            nearest = difflib.get_close_matches(name, self.names(), 1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else "llmo schema lists the types"
            raise AuthorError(f"there is no step type {name!r}", hint=hint)
        made = plug_in.load()()
        if not hasattr(made, "execute") and not hasattr(made, "plan"):
            raise OperatorError(
                f"the plug-in {plug_in.value} of step type {name!r} has neither execute nor plan",
                hint="mend or remove the package that brings it",
            )
        return cast("Leaf | Control", made)

    def _look_for_plug_ins(self) -> dict[str, Any]:
        if self._plug_ins is None:
            from importlib.metadata import entry_points  # noqa: PLC0415 (slow, rarely needed)

            self._plug_ins = {found.name: found for found in entry_points(group=PLUG_INS)}
        return self._plug_ins


def _is_control(step: Leaf | Control) -> bool:
    return hasattr(step, "plan")

"""Step type `approval`: a person's yes or no, with a form. Nobody's silence is a yes by default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from llm_orchestrator.model import Json
from llm_orchestrator.steps.base import Names, Outcome, Plan, Signal


class Approval:
    """Waits for an answer; `output` binds approved, form, by."""

    type: ClassVar[str] = "approval"
    outputs: ClassVar[tuple[str, ...]] = ("approved", "form", "by")

    def plan(
        self,
        config: Any,
        names: Names,
        children: Mapping[str, Outcome],
        *,
        waited: Json | None = None,
    ) -> Plan:
        """A signal named by the engine first; then the answer, or what `on_timeout` says."""
        if waited is None:
            signal = Signal(
                name="",
                timeout_s=config.timeout_seconds,
                payload_schema=answer_schema(config.form_schema()),
                is_approval=True,
            )
            return Plan(wait=signal)
        if waited.get("timed_out"):
            if config.on_timeout == "fail":
                return Plan(error=f"nobody answered within {config.timeout_seconds:g} s")
            is_approved = config.on_timeout == "approve"
            return Plan(outputs={"approved": is_approved, "form": None, "by": None})
        answer = waited["payload"]
        return Plan(
            outputs={
                "approved": answer["approved"],
                "form": answer.get("form"),
                "by": answer.get("by", waited.get("by")),
            }
        )


def answer_schema(form: Mapping[str, Json] | None) -> dict[str, Json]:
    """The schema of an answer {approved, form}: a yes needs the form filled in, a no does not."""
    schema: dict[str, Json] = {
        "type": "object",
        "properties": {"approved": {"type": "boolean"}},
        "required": ["approved"],
    }
    if form is not None:
        schema["if"] = {"properties": {"approved": {"const": True}}}
        schema["then"] = {"properties": {"form": dict(form)}, "required": ["form"]}
    return schema

"""The language as a JSON Schema, for editors: completion, hover text and squiggles.

Made from the same models that loading uses, plus the short forms and aliases that loading accepts
besides. It is a help while writing; `llmo validate` is the judge.
"""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from llm_orchestrator.language.base import BaseStep
from llm_orchestrator.language.compat import RETRY_ALIASES, STEP_ALIASES
from llm_orchestrator.language.definition import Definition, StepTypes, registry

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_REF = "#/$defs/{}"


def json_schema(step_types: StepTypes | None = None) -> dict[str, Any]:
    """The schema of a workflow file (JSON Schema draft 2020-12)."""
    types = registry(step_types)
    _, whole = models_json_schema(
        [(Definition, "validation"), *((cls, "validation") for cls in types.values())]
    )
    defs: dict[str, Any] = _point_at_step(whole["$defs"])
    for name, cls in types.items():
        _open_step(defs[cls.__name__], name)
    defs.pop("BaseStep", None)
    defs["Step"] = {"oneOf": [{"$ref": _REF.format(cls.__name__)} for cls in types.values()]}
    _open_parts(defs)
    top = defs.pop("Definition")
    return {
        "$schema": DIALECT,
        "title": "LLM Orchestrator workflow",
        "description": "A workflow file, in YAML or JSON.",
        **{key: value for key, value in top.items() if key not in {"title", "description"}},
        "$defs": defs,
    }


def _point_at_step(value: Any) -> Any:
    """Nested steps are of any type, not only of the common part."""
    if isinstance(value, dict):
        if value.get("$ref") == _REF.format(BaseStep.__name__):
            return {**value, "$ref": _REF.format("Step")}
        return {key: _point_at_step(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_point_at_step(item) for item in value]
    return value


def _open_step(schema: dict[str, Any], name: str) -> None:
    """The forms that loading accepts besides the models' own."""
    properties = schema["properties"]
    properties["type"] = {"const": name}
    required = [key for key in schema.get("required", []) if key != "type"]
    if name == "branch":
        properties["condition"] = properties.pop("switch")
        required = ["condition" if key == "switch" else key for key in required]
    if name == "transform":
        required = [key for key in required if key != "function"]
    schema["required"] = ["type", *required]
    for alias, key in STEP_ALIASES.items():
        properties.setdefault(alias, properties.get(key, {}))
    text = {"type": "string"}
    for key in ("depends_on", "output"):
        properties[key] = {"anyOf": [text, properties[key]]}
    properties["on_error"] = {
        "anyOf": [{**text, "pattern": r"^fallback \S+$"}, properties["on_error"]]
    }
    properties["run_if_skipped"] = {"type": "boolean"}
    if name == "llm":
        properties["fallback"]["items"] = {"anyOf": [text, properties["fallback"]["items"]]}


def _open_parts(defs: dict[str, Any]) -> None:
    retry = defs["RetrySpec"]["properties"]
    delay = {
        "anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^[\d.]+\s*(ms|s|m|h)?$"}]
    }
    for alias, key in RETRY_ALIASES.items():
        retry[alias] = delay if key.endswith("_ms") else retry[key]
    retry["jitter"] = {"anyOf": [{"type": "boolean"}, retry["jitter"]]}
    top = defs["Definition"]["properties"]
    top["version"] = {"anyOf": [top["version"], {"type": "number"}]}
    top["labels"]["additionalProperties"] = {"type": ["string", "number"]}
    top["schedule"] = {"anyOf": [{"type": "string"}, top["schedule"]]}
    for schema in (top["inputs"], top["outputs"]):
        _allow_short(schema, {} if schema is top["outputs"] else {"type": ["string", "null"]})
    defs["OutputSpec"]["properties"].pop("has_fallback", None)


def _allow_short(schema: dict[str, Any], short: dict[str, Any]) -> None:
    """A mapping's values may also be written in a short form."""
    for option in schema.get("anyOf", [schema]):
        for key in ("additionalProperties", "patternProperties"):
            if isinstance(option.get(key), dict):
                if key == "patternProperties":
                    option[key] = {p: {"anyOf": [v, short]} for p, v in option[key].items()}
                else:
                    option[key] = {"anyOf": [option[key], short]}

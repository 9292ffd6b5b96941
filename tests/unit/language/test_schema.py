from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from llm_orchestrator.language.schema import json_schema
from llm_orchestrator.language.source import read
from llm_orchestrator.language.steps import STEP_TYPES
from tests.unit.language import test_compat, test_definition
from tests.unit.language.support import LLM, workflow


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_schema_is_plain_json_of_the_named_draft() -> None:
    schema = json_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["required"] == ["name", "steps"]


def test_every_step_type_is_offered() -> None:
    schema = json_schema()
    names = {
        schema["$defs"][option["$ref"].rpartition("/")[2]]["properties"]["type"]["const"]
        for option in schema["$defs"]["Step"]["oneOf"]
    }
    assert names == set(STEP_TYPES)


@pytest.mark.parametrize(
    "text",
    [
        test_definition.EVERY_TYPE,
        test_compat.CHAIN,
        test_compat.TRANSFORMS,
        test_compat.SENTIMENT,
        test_compat.MODERATION,
        test_compat.RAG,
        workflow(f"{{id: a, type: llm, {LLM}, output: x, depends_on: b, on_error: fallback b}}"),
        workflow(f"{{id: a, type: llm, {LLM}, retry: {{strategy: linear, initial_delay: 1s}}}}"),
    ],
)
def test_what_loads_is_right_by_the_schema(validator: Any, text: str) -> None:
    validator.validate(read(text).data)


@pytest.mark.parametrize(
    "step",
    [
        "{id: a, type: lmm}",
        "{id: a, type: wait, secnds: 1}",
        f"{{id: a, type: llm, {LLM}, temperature: hot}}",
        f"{{id: p, type: parallel, tasks: [{{id: a, type: llm, {LLM}, max_tokens: -1}}]}}",
        "{type: wait, seconds: 1}",
    ],
)
def test_what_is_wrong_is_wrong_by_the_schema(validator: Any, step: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(read(workflow(step)).data)


def test_a_plug_ins_type_is_in_the_schema() -> None:
    schema = json_schema({"shout": test_definition.ShoutStep})
    assert schema["$defs"]["ShoutStep"]["properties"]["type"] == {"const": "shout"}

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import ValidationError

from llm_orchestrator.errors import NotFound, TemplateError
from llm_orchestrator.language.base import BaseStep
from llm_orchestrator.language.definition import NATURAL_OUTPUTS, Definition, walk
from llm_orchestrator.language.render import render_step
from llm_orchestrator.language.steps import (
    STEP_TYPES,
    ApprovalStep,
    LLMStep,
    TransformStep,
    VectorSearchStep,
)
from llm_orchestrator.language.templates import Templates
from llm_orchestrator.model import Backoff, Effect, OnUnknown
from tests.unit.language.support import LLM, load, messages, workflow

T = Templates()

EVERY_TYPE = """
name: all
version: 2
description: every type once
inputs:
  q: string
  n: {type: integer, default: null, min: 1, max: 9}
concurrency: 8
budget: {max_usd: 1.5}
labels: {team: x, tier: 1}
schedule: "*/5 8-18 * * mon-fri"
secrets: {key: "env:KEY"}
steps:
  - {id: l, type: llm, provider: echo, model: m,
     messages: [{role: user, content: "{{ inputs.q }}"}],
     temperature: "{{ inputs.n }}", top_p: 0.5, output: {answer: text, kind: "{{ result.data.k }}"},
     retry: {max_attempts: 5, backoff: linear}}
  - {id: e, type: embed, provider: echo, model: m, input: "{{ steps.l.data.list }}"}
  - {id: s, type: vector_search, database: sql, index: i, query: "{{ steps.e.vector }}"}
  - {id: u, type: vector_upsert, database: sql, index: i, items: "{{ steps.l.data.items }}"}
  - {id: t, type: transform, expression: steps.s.results | length}
  - {id: a, type: action, action: http, url: "http://x/{{ steps.t.result }}"}
  - id: p
    type: parallel
    tasks:
      - {id: p1, type: wait, seconds: 1}
      - {id: p2, type: wait, signal: go, timeout_seconds: 5}
  - id: m
    type: map
    items: steps.l.data.list
    item: doc
    steps: [{id: m1, type: python, function: "mod:f", args: {x: "{{ doc.y }}", i: "{{ index }}"}}]
  - id: b
    type: branch
    condition: "{{ steps.l.kind }}"
    branches: {x: [{id: b1, type: approval, message: ok?, form: {why: string}}]}
    default: [{id: b2, type: workflow, workflow: other, inputs: {q: "{{ inputs.q }}"}}]
  - id: o
    type: loop
    until: steps.o1.text == 'done' and iteration > 1
    steps: [{id: o1, type: llm, provider: echo, model: m, prompt: "{{ iteration }} {{ previous }}"}]
outputs:
  answer: steps.l.answer
  both: {value: ["{{ steps.l.kind }}", "{{ outputs.m }}"], fallback: null}
"""


def test_what_is_read_back_is_the_same_definition() -> None:
    definition = load(EVERY_TYPE)
    again = Definition.from_canonical(definition.canonical())
    assert again == definition
    assert again.canonical() == definition.canonical()
    assert again.digest == definition.digest
    assert len(definition.digest) == 64
    assert {step.type for _, step, _ in walk(definition.steps)} == set(STEP_TYPES)


def test_the_digest_knows_every_change_but_no_warning_and_no_layout() -> None:
    base = load(EVERY_TYPE)
    assert load(EVERY_TYPE.replace("seconds: 1}", "seconds: 2}")).digest != base.digest
    assert (
        load(EVERY_TYPE.replace("  - {id: e,", "\n  # note\n  - {id:   e,")).digest == base.digest
    )
    warned = load(workflow("{id: a, type: action, action: fly}"))
    assert warned.warnings
    assert Definition.from_canonical(warned.canonical()) == warned


def test_half_a_surrogate_pair_survives() -> None:
    step = r'{"id": "a", "type": "action", "action": "log", "message": "\ud800"}'
    text = '{"name": "x", "steps": [' + step + "]}"
    definition = load(text, "w.json")
    assert Definition.from_canonical(definition.canonical()).steps[0].model_extra == {
        "message": "\ud800"
    }


def test_a_definition_cannot_be_changed() -> None:
    definition = load(EVERY_TYPE)
    with pytest.raises(ValidationError):
        definition.name = "other"
    with pytest.raises(ValidationError):
        definition.steps[0].id = "other"


def test_a_step_is_found_by_its_path_in_a_run() -> None:
    definition = load(EVERY_TYPE)
    assert definition.step("m/3/m1").id == "m1"
    assert definition.step("b/x/b1").type == "approval"
    assert definition.step("l").type == "llm"
    with pytest.raises(NotFound):
        definition.step("m/3/nope")


def test_walking_gives_paths_and_scopes() -> None:
    found = {path: scope for path, _, scope in walk(load(EVERY_TYPE).steps)}
    assert {"p", "p/p1", "m/m1", "b/b1", "b/b2", "o/o1"} <= set(found)
    local = found["m/m1"].local
    assert local is not None
    assert local.id == "m"
    assert found["p/p1"].local is None
    assert [step.id for step in found["p/p1"].siblings] == ["p1", "p2"]


def test_version_is_text_and_inputs_know_their_defaults() -> None:
    definition = load(EVERY_TYPE)
    assert definition.version == "2"
    assert definition.labels == {"team": "x", "tier": "1"}
    assert definition.inputs is not None
    assert definition.inputs["q"].required
    assert not definition.inputs["n"].required


def test_policy_carries_what_the_file_says() -> None:
    definition = load(
        workflow(
            "{id: a, type: wait, signal: s, timeout_seconds: 5}",
            """
            id: b
            type: llm
            provider: echo
            model: m
            prompt: x
            effect: once
            on_unknown: fail
            timeout_seconds: 3
            retry: {max_attempts: 7, strategy: constant, initial_delay: 2s, retry_on: timeout}
            """,
        )
    )
    wait = definition.steps[0].policy(Effect.REPEATABLE, is_paid=False)
    assert wait.timeout_s is None
    assert wait.on_unknown is OnUnknown.ASK
    paid = definition.steps[1].policy(Effect.REPEATABLE, is_paid=True)
    assert (paid.effect, paid.on_unknown, paid.timeout_s) == (Effect.ONCE, OnUnknown.FAIL, 3)
    assert (paid.retry.max_attempts, paid.retry.backoff) == (7, Backoff.CONSTANT)
    assert (paid.retry.initial_delay_ms, paid.retry.retry_on) == (2000, ("timeout",))
    assert paid.is_paid


NATURAL = {
    "text": "T",
    "model": "M",
    "tokens": 3,
    "metadata": {},
    "data": {"k": 1},
    "tool_calls": [],
}


def bind(output: object) -> tuple[dict[str, object], object]:
    step = LLMStep.model_validate(
        {
            "id": "a",
            "type": "llm",
            "provider": "echo",
            "model": "m",
            "prompt": "x",
            "output": output,
        }
    )
    bound = step.bind(NATURAL)
    return bound, step.first_output(bound)


def test_outputs_bind_by_position_and_natural_names_stay() -> None:
    bound, first = bind(["answer", "which"])
    assert bound == {"answer": "T", "which": "M", **NATURAL}
    assert first == "T"


def test_outputs_bind_by_name_and_by_template() -> None:
    bound, first = bind(
        {"kind": "{{ result.data.k + 1 }}", "text": "model", "up": "{{ text | lower }}"}
    )
    assert bound == {**NATURAL, "kind": 2, "text": "M", "up": "t"}
    assert first == 2


def test_without_output_the_first_natural_name_counts() -> None:
    assert bind(None) == (NATURAL, "T")


def test_an_http_action_binds_the_parts_of_the_answer() -> None:
    step = load(workflow("{id: a, type: action, action: http, url: x, output: [b, s]}")).steps[0]
    natural = {"body": {"x": 1}, "status": 200, "headers": {}}
    assert step.bind(natural)["s"] == 200
    assert step.first_output(step.bind(natural)) == {"x": 1}


def test_every_type_names_what_it_returns() -> None:
    assert NATURAL_OUTPUTS["llm"] == ("text", "model", "tokens", "metadata", "data", "tool_calls")
    assert set(NATURAL_OUTPUTS) == set(STEP_TYPES)
    assert all(NATURAL_OUTPUTS.values())


class ShoutStep(BaseStep):
    natural_outputs = ("loud",)
    type: Literal["shout"] = "shout"
    text: str


def test_a_plug_ins_type_is_read_validated_and_read_back() -> None:
    text = workflow(
        "{id: p, type: parallel, tasks: [{id: a, type: shout, text: '{{ inputs.x }}'}]}",
        "{id: b, type: llm, provider: echo, model: m, prompt: '{{ steps.a.loud }}'}",
    )
    types = {"shout": ShoutStep}
    definition = load(text, step_types=types)
    assert isinstance(definition.step("a"), ShoutStep)
    again = Definition.from_canonical(definition.canonical(), types)
    assert again == definition
    assert "unknown step type `shout`" in messages("{id: a, type: shout, text: x}")[0]
    bad = "{id: a, type: shout, texts: x}"
    assert "missing key `text`; did you mean it by `texts`?" in messages(bad, step_types=types)


def test_rendering_a_step_gives_its_fields_their_own_types() -> None:
    step = load(
        workflow(
            "{id: s, type: vector_search, database: sql, index: 'i-{{ inputs.n }}',"
            " query: '{{ inputs.v }}', top_k: '{{ inputs.n }}', filter: {a: '{{ inputs.n }}'},"
            " include_vectors: '{{ inputs.n > 1 }}', when: inputs.n > 0}"
        )
    ).steps[0]
    rendered = render_step(step, T, {"inputs": {"n": 3, "v": [1, 2.5]}})
    assert isinstance(rendered, VectorSearchStep)
    assert (rendered.index, rendered.top_k, rendered.query) == ("i-3", 3, (1.0, 2.5))
    assert (rendered.filter, rendered.include_vectors) == ({"a": 3}, True)
    assert rendered.condition == step.condition
    assert step.__dict__["top_k"] == "{{ inputs.n }}"


def test_a_step_without_templates_is_rendered_for_nothing() -> None:
    step = load(workflow(f"{{id: a, type: llm, {LLM}}}")).steps[0]
    assert render_step(step, T, {}) is step


def test_a_value_that_looks_like_a_template_stays_text_in_a_rendered_step() -> None:
    step = load(workflow("{id: a, type: llm, provider: echo, model: m, prompt: '{{ inputs.x }}'}"))
    rendered = render_step(step.steps[0], T, {"inputs": {"x": "{{ secrets.key }}"}})
    assert rendered.__dict__["prompt"] == "{{ secrets.key }}"


def test_a_value_of_the_wrong_type_is_the_templates_error() -> None:
    step = load(
        workflow(f"{{id: a, type: llm, {LLM}, temperature: '{{{{ inputs.t }}}}'}}"),
    ).steps[0]
    assert render_step(step, T, {"inputs": {"t": "0.5"}}).__dict__["temperature"] == 0.5
    for value in ("hot", "{{ 1 }}", 9, [1]):
        with pytest.raises(TemplateError, match="step a: once rendered, `temperature`"):
            render_step(step, T, {"inputs": {"t": value}})


def test_an_expression_per_item_keeps_what_it_uses_of_the_run() -> None:
    step = load(
        workflow(
            "{id: t, type: transform, function: filter, inputs: ['{{ inputs.docs }}'],"
            " expression: item.score > inputs.least}"
        )
    ).steps[0]
    rendered = render_step(step, T, {"inputs": {"docs": [{"score": 1}], "least": 0, "big": "x"}})
    assert isinstance(rendered, TransformStep)
    assert rendered.inputs == {"docs": [{"score": 1}]}
    assert rendered.scope == {"inputs": {"least": 0}}
    assert rendered.expression == "item.score > inputs.least"


def test_an_expression_without_a_function_is_the_result() -> None:
    step = load(workflow("{id: t, type: transform, expression: inputs.a + 1}")).steps[0]
    rendered = render_step(step, T, {"inputs": {"a": 1}})
    assert isinstance(rendered, TransformStep)
    assert (rendered.function, rendered.value, rendered.expression) == ("expression", 2, None)


def test_a_short_form_becomes_a_schema() -> None:
    short = ApprovalStep(id="a", form={"why": "string", "n": {"type": "integer", "minimum": 1}})
    assert short.form_schema() == {
        "type": "object",
        "properties": {"why": {"type": "string"}, "n": {"type": "integer", "minimum": 1}},
        "required": ["why", "n"],
    }
    whole = ApprovalStep(id="a", form={"type": "object", "properties": {}})
    assert whole.form_schema() == {"type": "object", "properties": {}}

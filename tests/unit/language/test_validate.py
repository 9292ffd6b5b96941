from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_orchestrator.errors import DefinitionError
from llm_orchestrator.language.build import STEPS_MAX
from llm_orchestrator.language.load import load_file, load_text
from llm_orchestrator.language.source import read
from llm_orchestrator.language.templates import Templates
from tests.unit.language.support import LLM, load, messages, problems, workflow
from tests.unit.language.test_definition import EVERY_TYPE

TEMPLATES = Templates()
A = f"{{id: a, type: llm, {LLM}}}"


def ask(step_id: str, prompt: str, **more: str) -> str:
    rest = "".join(f", {key}: {value}" for key, value in more.items())
    return f"{{id: {step_id}, type: llm, provider: echo, model: m, prompt: '{prompt}'{rest}}}"


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("{id: a, type: wait, secconds: 1}", "unknown key `secconds`; did you mean `seconds`?"),
        ("{id: a, type: wait, seconds: 1, depend_on: [x]}", "did you mean `depends_on`?"),
        (f"{{id: a, type: llm, {LLM}, temprature: 1}}", "did you mean `temperature`?"),
        (f"{{id: a, type: llm, {LLM}, timeout: 30}}", "did you mean `timeout_seconds`?"),
        ("{id: a, type: llm, provider: echo, prompt: x}", "missing key `model`"),
        ("{id: a, type: llm, provider: echo, modle: m, prompt: x}", "did you mean it by `modle`?"),
        ("{id: a, type: llm, provider: echo, model: m}", "needs either `prompt` or `messages`"),
        (f"{{id: a, type: llm, {LLM}, messages: []}}", "needs either `prompt` or `messages`"),
        ("{id: a, type: lmm}", "unknown step type `lmm`; did you mean `llm`?"),
        ("{id: a}", "missing key `type`"),
        ("{type: wait, seconds: 1}", "missing key `id`"),
        ("{id: 'a b', type: wait, seconds: 1}", "`id` should match"),
        (
            f"{{id: a, type: llm, {LLM}, temperature: hot}}",
            "`temperature` should be a number",
        ),
        (f"{{id: a, type: llm, {LLM}, temperature: 3}}", "`temperature` should be less than or"),
        (f"{{id: a, type: llm, {LLM}, max_tokens: 0}}", "`max_tokens` should be greater than"),
        (f"{{id: a, type: llm, {LLM}, max_tokens: true}}", "not true or false"),
        (f"{{id: a, type: llm, {LLM}, stream: maybe}}", "`stream` should be true or false"),
        (
            f"{{id: a, type: llm, {LLM}, timeout_seconds: -1}}",
            "`timeout_seconds` should be greater",
        ),
        (f"{{id: a, type: llm, {LLM}, retry: {{max_attempts: 0}}}}", "`max_attempts` should be"),
        (f"{{id: a, type: llm, {LLM}, retry: {{max_atempts: 1}}}}", "did you mean `max_attempts`?"),
        (f"{{id: a, type: llm, {LLM}, retry: {{backoff: expo}}}}", "`backoff` should be"),
        (f"{{id: a, type: llm, {LLM}, retry: {{retry_on: time_out}}}}", "did you mean `timeout`?"),
        (f"{{id: a, type: llm, {LLM}, on_unknown: aks}}", "did you mean `ask`?"),
        (f"{{id: a, type: llm, {LLM}, on_unknown: probe}}", "needs `probe`"),
        (f"{{id: a, type: llm, {LLM}, effect: twice}}", "`effect` should be"),
        (f"{{id: a, type: llm, {LLM}, output: [a, b, c, d, e, f, g]}}", "names 7 outputs"),
        (f"{{id: a, type: llm, {LLM}, output: {{x: txt}}}}", "did you mean `text`?"),
        (
            f"{{id: a, type: llm, {LLM}, output: {{x: '{{{{ reslt.a }}}}'}}}}",
            "did you mean `result`?",
        ),
        (f"{{id: a, type: llm, {LLM}, depends_on: [a]}}", "step `a` waits for itself"),
        (f"{{id: a, type: llm, {LLM}, on_error: fallback zz}}", "unknown fallback step `zz`"),
        (f"{{id: a, type: llm, {LLM}, on_error: {{fallback: a}}}}", "cannot be its own fallback"),
        (f"{{id: a, type: llm, {LLM}, on_error: explode}}", "`on_error` should be"),
        ("{id: a, type: wait, seconds: 1, signal: x}", "needs exactly one of"),
        ("{id: a, type: wait, until: tomorrow}", "`until` should be an ISO time"),
        ("{id: a, type: wait, until: '2027-01-01T00:00:00'}", "needs a time zone"),
        ("{id: a, type: approval, on_timeout: shrug}", "`on_timeout` should be"),
        ("{id: a, type: workflow}", "needs either `workflow` or `file`"),
        ("{id: a, type: python, function: mod.f}", "`function` should match"),
        ("{id: a, type: transform, function: mrge, inputs: []}", "did you mean `merge`?"),
        (
            "{id: a, type: transform, function: map, inputs: [x]}",
            "transform map needs `expression`",
        ),
        ("{id: a, type: transform, inputs: [x]}", "missing key `function`"),
        ("{id: a, type: parallel, tasks: []}", "`tasks` should not be empty"),
        ("{id: a, type: map, items: x}", "missing key `steps`"),
        ("{id: a, type: branch, branches: {x: []}}", "missing key `condition`"),
        ("{id: a, type: vector_upsert, database: sql, index: i, ids: [x]}", "needs either `items`"),
        (
            "{id: a, type: vector_search, database: sqll, index: i, query: [1]}",
            "did you mean `sql`?",
        ),
        ("{id: a, type: embed, provider: cohre, model: m, input: x}", "did you mean `cohere`?"),
        (f"{{id: a, type: llm, {LLM}, fallback: [opnai/m]}}", "did you mean `openai`?"),
        (f"{{id: a, type: llm, {LLM}, condition: inputs.a ==}}", "the expression does not parse"),
        (f"{{id: a, type: llm, {LLM}, system: '{{{{ inputs.x }}'}}", "the template does not parse"),
        (
            f"{{id: a, type: llm, {LLM}, system: '{{{{ inputs.x | uper }}}}'}}",
            "did you mean `upper`?",
        ),
        (f"{{id: a, type: llm, {LLM}, system: '{{{{> part}}}}'}}", "partials"),
        ("{id: a, type: loop, until: x ==, steps: [{id: b, type: wait, seconds: 1}]}", "not parse"),
        ("{id: a, type: map, items: x, item: run, steps: [{id: b, type: x}]}", "a meaning already"),
        ("just text", "should be a step: a mapping"),
        ("{id: [1], type: wait, seconds: 1}", "`id` should be text"),
        ("{id: a, type: [x]}", "unknown step type"),
        (f"{{id: a, type: llm, {LLM}, fallback: 3}}", "`fallback` should be a list"),
        (f"{{id: a, type: llm, {LLM}, retry: 3}}", "`retry` should be a mapping"),
    ],
)
def test_a_mistake_in_a_step_is_named(step: str, message: str) -> None:
    found = messages(step)
    assert any(message in line for line in found), found


@pytest.mark.parametrize(
    ("top", "message"),
    [
        ("versoin: 1", "unknown key `versoin`; did you mean `version`?"),
        ("timeout_seconds: 0", "`timeout_seconds` should be greater than 0"),
        ("on_failure: stop", "`on_failure` should be"),
        ("concurrency: 0", "`concurrency` should be greater"),
        ("budget: {max_usd: -1}", "`max_usd` should be greater than 0"),
        ("budget: {max_euro: 1}", "unknown key `max_euro`"),
        ("inputs: {x: strng}", "did you mean `string`?"),
        ("inputs: {x: {tpye: string}}", "unknown key `tpye`; did you mean `type`?"),
        ("inputs: {x: {type: integer, default: a}}", "the default should be an integer, not 'a'"),
        ("inputs: {x: {type: integer, min: 3, max: 2}}", "`min` is greater than `max`"),
        ("inputs: {x: {pattern: '['}}", "the pattern does not parse"),
        ("inputs: {'a b': string}", "should match"),
        ("outputs: {x: steps.b.text}", "unknown step `b`"),
        ("outputs: {x: '{{ steps.a.txt }}'}", "no output `txt`; did you mean `text`?"),
        ("outputs: {x: {value: steps.a.txt, fallback: 1}}", "no output `txt`"),
        ("secrets: {k: hunter2}", "should be a reference, env:NAME or file:PATH"),
        ("schedule: '* * * *'", "needs five fields"),
        ("schedule: '61 * * * *'", "'61' is no minute"),
        ("schedule: '* * * * mno'", "is no day of week"),
        ("schedule: '*/0 * * * *'", "step of 0"),
        ("schedule: '@dayly'", "did you mean `@daily`?"),
        ("schedule: {cron: '@daily', timezone: Europe/Belrin}", "did you mean `Europe/Berlin`?"),
        ("labels: [a]", "`labels` should be"),
        ("priority: high", "`priority` should be"),
    ],
)
def test_a_mistake_at_the_top_is_named(top: str, message: str) -> None:
    found = messages(A, top=f"{top}\n")
    assert any(message in line for line in found), found


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("{{ steps.aa.text }}", "unknown step `aa`; did you mean `a`?"),
        ("{{ steps.a.txt }}", "step `a` has no output `txt`; did you mean `text`?"),
        ("{{ outputs.aa }}", "unknown step `aa`"),
        ("{{ steps.z.text }}", "step `z` uses its own output"),
        ("{{ inputs.tpoic }}", "unknown input `tpoic`; did you mean `topic`?"),
        ("{{ topic }}", "did you mean `inputs.topic`?"),
        ("{{ a.text }}", "did you mean `steps.a`?"),
        ("{{ item }}", "unknown name `item`"),
        ("{{ secrets.kye }}", "unknown secret `kye`; did you mean `key`?"),
        ("{% for x in steps.aa.data %}{{ x }}{% endfor %}", "unknown step `aa`"),
    ],
)
def test_a_name_that_is_not_there_is_found_before_the_run(prompt: str, message: str) -> None:
    top = "inputs: {topic: string}\nsecrets: {key: 'env:KEY'}\n"
    found = messages(A, ask("z", prompt), top=top)
    assert any(message in line for line in found), found


@pytest.mark.parametrize(
    "prompt",
    [
        "{{ steps.a.text }} {{ steps.a.out }} {{ outputs.a }} {{ inputs.topic }} {{ run.id }}",
        "{{ steps.a.data.anything.below }} {{ secrets.key }} {{ steps[inputs.topic] }}",
        "{% set x = 1 %}{{ x }}{% for y in [1] %}{{ y }}{{ loop.index }}{% endfor %}",
    ],
)
def test_names_that_are_there_pass(prompt: str) -> None:
    top = "inputs: {topic: string}\nsecrets: {key: 'env:KEY'}\n"
    a = f"{{id: a, type: llm, {LLM}, output: [out]}}"
    assert messages(a, ask("z", prompt), top=top) == []


NESTED = """
name: w
inputs: {list: array}
steps:
- id: par
  type: parallel
  tasks:
  - {id: p1, type: llm, provider: echo, model: m, prompt: x}
- id: br
  type: branch
  condition: steps.p1.text
  branches: {x: [{id: b1, type: llm, provider: echo, model: m, prompt: x}]}
- id: each
  type: map
  items: inputs.list
  item: doc
  steps:
  - {id: m1, type: llm, provider: echo, model: m, prompt: "{{ doc }}{{ index }}{{ steps.p1.text }}"}
  - {id: m2, type: llm, provider: echo, model: m, prompt: "{{ steps.m1.text }}"}
- id: again
  type: loop
  until: steps.l1.text == 'x' and iteration > 2
  steps:
  - {id: l1, type: llm, provider: echo, model: m, prompt: "{{ iteration }} {{ previous }}"}
- {id: last, type: llm, provider: echo, model: m, prompt: "TEMPLATE"}
"""


def test_steps_in_parallel_and_branch_are_seen_from_outside() -> None:
    text = "{{ steps.p1.text }} {{ steps.b1.text }} {{ steps.each.results }} {{ outputs.again }}"
    assert problems(NESTED.replace("TEMPLATE", text)) == []


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ steps.m1.text }}", "step `m1` is inside of the map `each`: use the outputs of `each`"),
        ("{{ outputs.l1 }}", "step `l1` is inside of the loop `again`"),
        ("{{ doc }}", "unknown name `doc`"),
        ("{{ iteration }}", "unknown name `iteration`"),
        ("{{ steps.each.result }}", "no output `result`; did you mean `results`?"),
    ],
)
def test_the_inside_of_a_map_or_loop_is_its_own(template: str, message: str) -> None:
    found = problems(NESTED.replace("TEMPLATE", template))
    assert len(found) == 1
    assert message in found[0]


def test_a_step_inside_cannot_use_what_is_around_it() -> None:
    text = NESTED.replace("{{ iteration }} {{ previous }}", "{{ steps.again.result }}")
    (found,) = problems(text)
    assert "step `again` is not finished while its own steps run" in found


def test_mistakes_inside_nested_steps_are_found_with_their_place() -> None:
    text = """
    name: w
    steps:
      - id: p
        type: parallel
        tasks:
          - id: b
            type: branch
            condition: inputs.x
            branches:
              one:
                - id: m
                  type: map
                  items: inputs.l
                  steps:
                    - {id: deep, type: wait, secnds: 1}
                    - {id: deep, type: wait, seconds: 1, depends_on: [nope]}
    """
    assert problems(text) == [
        "15:42: unknown key `secnds`; did you mean `seconds`?",
        "16:20: duplicate step id `deep`; ids are unique over the whole file",
        "16:67: unknown step `nope`",
    ]


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file() -> None:
    text = """
    name: w
    versoin: 2
    inputs:
      a: strng
    steps:
      - id: a
        type: llm
        provider: opnai
        model: m
        prompt: "{{ inputs.b }} {{ steps.c.text }}"
        temperature: hot
      - id: a
        type: lmm
      - id: b
        type: llm
        provider: echo
        model: m
        prompt: "{{ inputs.a }"
        condition: "inputs.a =="
        depends_on: [zz]
    outputs:
      x: steps.b.txt
    """
    assert [line.partition(": ")[0] for line in problems(text)] == [
        "2:1", "4:3", "8:5", "10:5", "10:5", "11:5", "12:5", "13:5", "18:5", "19:5", "20:18",
        "22:3",
    ]  # fmt: skip


def test_a_cycle_names_its_path() -> None:
    found = messages(
        ask("a", "{{ steps.b.text }}"),
        ask("b", "x", depends_on="[c]"),
        ask("c", "x", condition="outputs.a == 1"),
        ask("d", "x", depends_on="[a]"),
    )
    assert len(found) == 1
    assert found[0].startswith("these steps wait for each other: ")
    names = found[0].rpartition(": ")[2].split(" -> ")
    assert names[0] == names[-1]
    assert sorted(names[1:]) == ["a", "b", "c"]


def test_a_cycle_through_a_container_and_one_inside_are_found() -> None:
    inside = "{id: t, type: wait, seconds: 1, depends_on: [a]}"
    outer = f"{{id: p, type: parallel, tasks: [{inside}]}}"
    found = messages(ask("a", "x", depends_on="[p]"), outer)
    assert sorted(found[0].rpartition(": ")[2].split(" -> ")[1:]) == ["a", "p"]
    one = "{id: x, type: wait, seconds: 1, depends_on: [y]}"
    two = "{id: y, type: wait, seconds: 1, depends_on: [x]}"
    found = messages(f"{{id: p, type: map, items: inputs.l, steps: [{one}, {two}]}}")
    assert sorted(found[0].rpartition(": ")[2].split(" -> ")[1:]) == ["x", "y"]


def test_a_fallback_stands_beside_its_step() -> None:
    inner = f"{{id: t, type: llm, {LLM}, on_error: fallback a}}"
    found = messages(A, f"{{id: p, type: parallel, tasks: [{inner}]}}")
    assert found == ["fallback step `a` must stand in the same list as `t`"]


def test_known_providers_are_handed_in() -> None:
    step = "{id: a, type: llm, provider: groq, model: m, prompt: x}"
    assert "unknown provider `groq`" in messages(step)[0]
    assert messages(step, known_providers={"groq"}) == []
    templated = "{id: a, type: llm, provider: '{{ inputs.p }}', model: m, prompt: x}"
    assert messages(templated) == []


def test_odd_but_allowed_is_a_warning_with_its_place() -> None:
    definition = load(workflow("{id: a, type: action, action: notfy, channel: x}"))
    (warning,) = definition.warnings
    assert (warning.line, warning.column) == (3, 25)
    assert "goes to the outbox; did you mean `notify`?" in warning.message


def test_a_free_parameter_may_be_called_anything_under_parameters() -> None:
    assert messages(f"{{id: a, type: llm, {LLM}, top_p: 1, seed: 7, stop: [x]}}") == []
    step = load(workflow(f"{{id: a, type: llm, {LLM}, top_p: 1, parameters: {{models: [x]}}}}"))
    assert step.steps[0].free == {"models": ["x"], "top_p": 1}  # type: ignore[attr-defined]


def test_more_steps_than_allowed_are_refused() -> None:
    body = "".join(f"- {{id: s{n}, type: wait, seconds: 1}}\n" for n in range(STEPS_MAX // 4))
    assert load("name: w\nsteps:\n" + body[:4000].rpartition("\n")[0] + "\n").steps
    many = ",".join(['{"type":"wait"}'] * (STEPS_MAX + 1))
    text = '{"name": "w", "steps": [' + many + "]}"
    assert problems(text, "w.json") == [f"1:15: more than {STEPS_MAX} steps; split the workflow"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "should be a mapping with `name` and `steps`"),
        ("- a", "should be a mapping with `name` and `steps`"),
        ("name: w", "missing key `steps`"),
        ("name: w\nstep: []", "did you mean it by `step`?"),
        ("name: w\nsteps: {}", "`steps` should be a list of steps"),
        ("name: w\nsteps: []", "`steps` should be a list of steps"),
        ("steps: [{id: a, type: wait, seconds: 1}]", "missing key `name`"),
    ],
)
def test_what_is_no_workflow_is_refused(text: str, message: str) -> None:
    assert any(message in line for line in problems(text))


def test_errors_name_the_file_and_what_to_do(tmp_path: object) -> None:
    with pytest.raises(DefinitionError) as caught:
        load_text("name: w\nsteps: [{id: a, type: wait}]", "flows/x.yaml")
    assert str(caught.value).startswith("flows/x.yaml:2:9: ")
    assert "llmo validate" in (caught.value.hint or "")
    assert caught.value.exit_code == 2
    assert load_file.__doc__


@pytest.mark.parametrize(
    "line",
    ["*/5 8-18 * * mon-fri", "0 0 1,15 jan-mar 7", "5-59/10 * * * *", "@hourly", "0 12 * DEC sun"],
)
def test_cron_lines_that_are_right_pass(line: str) -> None:
    assert messages(A, top=f"schedule: '{line}'\n") == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["", "a", "{{ x", "{{#if"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=3,
)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_whatever_stands_anywhere_loads_or_is_a_named_mistake(data: st.DataObject) -> None:
    whole = read(EVERY_TYPE).data
    at: Any = whole
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(at[key], dict | list) or not at[key] or data.draw(st.booleans()):
            break
        at = at[key]
    at[key] = data.draw(JSON)
    with contextlib.suppress(DefinitionError):
        load_text(json.dumps(whole), "w.json", templates=TEMPLATES)

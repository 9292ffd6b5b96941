from __future__ import annotations

from llm_orchestrator.language.graph import all_dependencies, dependencies, dependency_table
from llm_orchestrator.language.templates import Templates
from tests.unit.language.support import load, workflow

T = Templates()


def table(*steps: str) -> dict[str, tuple[str, ...]]:
    return all_dependencies(load(workflow(*steps)), T)


def ask(step_id: str, prompt: str = "x", more: str = "") -> str:
    return f"{{id: {step_id}, type: llm, provider: echo, model: m, prompt: '{prompt}'{more}}}"


def test_dependencies_are_what_is_written_and_what_templates_mention() -> None:
    found = table(
        ask("a"),
        ask("b"),
        ask("c", "{{ steps.b.text }}", ", depends_on: [a]"),
        ask("d", "x", ", when: outputs.c == 1 and inputs.z"),
        ask("e", "x", ", messages_extra: [{content: '{{ steps.a.text }}'}]"),
    )
    assert found == {"a": (), "b": (), "c": ("a", "b"), "d": ("c",), "e": ("a",)}


def test_every_kind_of_field_counts() -> None:
    found = table(
        ask("a"),
        "{id: t, type: transform, function: filter, inputs: [x], expression: item == outputs.a}",
        "{id: m, type: map, items: steps.a.data, steps: [{id: m1, type: wait, seconds: 1}]}",
        "{id: b, type: branch, condition: steps.a.text, branches: {x: [" + ask("b1") + "]}}",
        "{id: l, type: loop, until: steps.a.text == steps.l1.text, steps: [" + ask("l1") + "]}",
        "{id: w, type: wait, until: '{{ steps.a.text }}'}",
    )
    assert {name for name, waits in found.items() if waits == ("a",)} == {"t", "m", "b", "l", "w"}
    assert found["l1"] == ()


def test_a_container_waits_for_what_its_inside_mentions() -> None:
    inner = ask("t2", "{{ steps.a.text }} {{ steps.t1.text }}")
    found = table(
        ask("a"),
        f"{{id: p, type: parallel, tasks: [{ask('t1')}, {inner}]}}",
        f"{{id: m, type: map, items: inputs.x, steps: [{ask('m1', '{{ steps.t1.text }}')}]}}",
    )
    assert found["p"] == ("a",)
    assert found["t2"] == ("t1",)
    assert found["m"] == ("p",)
    assert found["m1"] == ()


def test_a_mention_of_a_nested_step_waits_for_its_container() -> None:
    found = table(
        f"{{id: p, type: parallel, tasks: [{ask('t1')}]}}",
        "{id: b, type: branch, condition: steps.t1.text,"
        f" branches: {{x: [{{id: q, type: parallel, tasks: [{ask('deep')}]}}]}}}}",
        ask("z", "{{ steps.deep.text }}"),
    )
    assert found["b"] == ("p",)
    assert found["z"] == ("b",)


def test_a_fallback_waits_for_the_step_that_names_it() -> None:
    found = table(ask("a", "x", ", on_error: fallback f"), ask("f"), ask("b", "{{ steps.a.text }}"))
    assert found == {"a": (), "f": ("a",), "b": ("a",)}


def test_a_computed_name_waits_only_for_what_is_written() -> None:
    found = table(ask("a"), ask("b", "{{ steps[inputs.which].text }}", ", depends_on: [a]"))
    assert found["b"] == ("a",)


def test_ids_with_dashes_are_seen() -> None:
    found = table(ask("my-step"), ask("b", "{{ steps.my-step.text }}"))
    assert found["b"] == ("my-step",)


def test_one_step_alone_is_told_from_its_list() -> None:
    steps = load(workflow(ask("a"), ask("b", "{{ steps.a.text }}"))).steps
    assert dependencies(steps[1], steps) == ("a",)
    assert dependency_table(steps) == {"a": (), "b": ("a",)}


def test_a_chain_of_thousands_is_no_burden() -> None:
    steps = [ask("s0"), *(ask(f"s{n}", f"{{{{ steps.s{n - 1}.text }}}}") for n in range(1, 1500))]
    found = table(*steps)
    assert found["s1499"] == ("s1498",)

from __future__ import annotations

import copy
from typing import Any

import pytest

from llm_orchestrator.errors import InputError
from llm_orchestrator.language.definition import Definition
from llm_orchestrator.language.inputs import check_inputs
from tests.unit.language.support import load, workflow

WAIT = "{id: a, type: wait, seconds: 1}"


def declare(inputs: str) -> Definition:
    return load(workflow(WAIT, top=f"inputs: {inputs}\n"))


def refuse(inputs: str, given: dict[str, Any]) -> list[str]:
    with pytest.raises(InputError) as caught:
        check_inputs(declare(inputs), given)
    return caught.value.message.split("\n")


def test_defaults_are_filled_in() -> None:
    definition = declare("{a: string, b: {default: 3}, c: {required: false}, d: {default: null}}")
    assert check_inputs(definition, {"a": "x"}) == {"a": "x", "b": 3, "c": None, "d": None}


def test_null_for_an_optional_input_is_its_default() -> None:
    assert check_inputs(declare("{a: {type: integer, default: 3}}"), {"a": None}) == {"a": 3}


def test_without_a_section_anything_goes() -> None:
    assert check_inputs(load(workflow(WAIT)), {"a": [1], "b": None}) == {"a": [1], "b": None}


def test_an_empty_section_takes_nothing() -> None:
    assert check_inputs(declare("{}"), {}) == {}
    assert refuse("{}", {"a": 1}) == ["unknown input `a`"]


def test_all_mistakes_are_told_at_once() -> None:
    found = refuse(
        "{topic: string, n: integer, level: {enum: [low, high]}}",
        {"topc": "x", "n": "3", "level": "hihg"},
    )
    assert found == [
        "unknown input `topc`; did you mean `topic`?",
        "missing input `topic`, a string",
        "input `n` should be an integer, not '3'",
        "input `level` should be one of 'low', 'high', not 'hihg'; did you mean `high`?",
    ]


def test_the_hint_lists_the_inputs() -> None:
    with pytest.raises(InputError) as caught:
        check_inputs(declare("{a: string, b: {type: integer, default: 1}}"), {})
    assert caught.value.hint == "the inputs of w: a (string), b (integer, optional)"
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("spec", "good", "bad"),
    [
        ("string", ["", "x"], [1, None, ["x"]]),
        ("integer", [1, 2.0, -3], [1.5, True, "1", None]),
        ("number", [1, 1.5], [True, "1", [1]]),
        ("boolean", [True, False], [1, "true"]),
        ("array", [[], [1, "x"]], ["x", {}]),
        ("object", [{}, {"a": 1}], [[], "x"]),
        ("any", [1, "x", [1], {}], []),
        ("{type: integer, min: 1, max: 3}", [1, 3], [0, 4]),
        ("{type: string, min: 2, max: 3}", ["ab", "abc"], ["a", "abcd"]),
        ("{type: array, max: 1, items: integer}", [[], [1]], [[1, 2], ["x"]]),
        ("{type: string, pattern: '^[a-z]+$'}", ["ab"], ["A", ""]),
        ("{enum: [1, x]}", [1, "x"], [2, "y"]),
    ],
)
def test_types_and_ranges(spec: str, good: list[Any], bad: list[Any]) -> None:
    definition = declare(f"{{x: {spec}}}")
    for value in good:
        assert check_inputs(definition, {"x": value}) == {"x": value}
    for value in bad:
        with pytest.raises(InputError, match="input `x`"):
            check_inputs(definition, {"x": value})


def test_what_is_returned_is_a_copy() -> None:
    given = {"a": {"b": [1]}}
    before = copy.deepcopy(given)
    check_inputs(load(workflow(WAIT)), given)["a"]["b"].append(2)
    check_inputs(declare("{a: object}"), given)["a"]["b"].append(2)
    assert given == before


def test_a_long_value_is_cut_in_the_message() -> None:
    assert len(refuse("{a: integer}", {"a": "x" * 10_000})[0]) < 200

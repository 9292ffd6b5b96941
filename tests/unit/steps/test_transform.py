from __future__ import annotations

import contextlib
import json
import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_orchestrator.errors import AuthorError, TemplateError
from llm_orchestrator.model import Json
from llm_orchestrator.steps.functions import FUNCTIONS
from llm_orchestrator.steps.transform import Transform, apply
from tests.unit.steps.support import Room, config

scalars = st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from([0.5, 1.0, -2.0])
scalars |= st.sampled_from(["", "a", "b", "true", "1"])
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    ),
    max_leaves=6,
)
objects = st.dictionaries(st.sampled_from("abc"), values, max_size=3)


async def run(function: str, inputs: Json, **parameters: Json) -> Json:
    step = config("transform", function=function, inputs=inputs, **parameters)
    return (await Transform().execute(Room(), step))["result"]


def tagged(value: Json) -> str:
    """JSON text that tells true from 1 and knows that 1 is 1.0: a naive way to compare."""
    if isinstance(value, float) and value == int(value):
        value = int(value)
    if isinstance(value, list):
        return f"[{','.join(tagged(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{tagged(value[key])}' for key in sorted(value))}}}"
    return json.dumps(value)


@given(st.lists(objects, min_size=1, max_size=4))
def test_merge_of_objects_is_their_shallow_union_and_the_later_wins(parts: list[Any]) -> None:
    expected: dict[str, Json] = {}
    for part in parts:
        expected.update(part)
    inputs = {f"in{place}": part for place, part in enumerate(parts)}
    assert apply("merge", inputs, {}) == expected


@given(st.lists(st.lists(values, max_size=3), min_size=1, max_size=4))
def test_merge_and_concat_of_lists_chain_them(parts: list[list[Json]]) -> None:
    expected = [item for part in parts for item in part]
    inputs = {f"in{place}": part for place, part in enumerate(parts)}
    assert apply("merge", inputs, {}) == expected
    assert apply("concat", inputs, {}) == expected


async def test_merge_of_anything_else_is_an_object_by_name() -> None:
    inputs = {"text1": "a", "text2": "b"}
    assert await run("merge", inputs) == inputs
    assert await run("merge", {"one": {"a": 1}, "more": [2]}) == {"one": {"a": 1}, "more": [2]}


@given(st.lists(objects | scalars, max_size=6), st.sampled_from("abc"), values)
def test_filter_keeps_the_items_whose_key_equals_the_value(
    items: list[Json], key: str, value: Json
) -> None:
    expected = [
        item
        for item in items
        if tagged(item.get(key) if isinstance(item, dict) else None) == tagged(value)
    ]
    assert apply("filter", {"x": items}, {"key": key, "value": value}) == expected


async def test_filter_of_one_object_gives_it_whole_or_null() -> None:
    merged = {"text1": "a", "text2": "b"}
    assert await run("filter", {"m": merged}, key="text1", value="a") == merged
    assert await run("filter", {"m": merged}, key="text1", value="b") is None


async def test_true_is_not_one_and_one_is_one_point_zero() -> None:
    items = [1, True, 1.0, "1", [1], [True], {"a": 0}, {"a": False}]
    assert await run("filter", {"x": items}, value=True) == [True]
    assert await run("filter", {"x": items}, value=[1.0]) == [[1]]
    assert [type(x) for x in await run("filter", {"x": items}, value=1)] == [int, float]
    assert await run("filter", {"x": items}, value={"a": False}) == [{"a": False}]
    assert len(await run("unique", {"x": items})) == 7


async def test_filter_can_look_for_null() -> None:
    items = [{"a": None}, {"a": 1}, {}]
    assert await run("filter", {"m": items}, key="a", value=None) == [{"a": None}, {}]


@pytest.mark.parametrize(
    ("op", "value", "expected"),
    [
        ("ne", 2, [1, 3]),
        ("gt", 2, [3]),
        ("gte", 2, [2, 3]),
        ("lt", 2, [1]),
        ("lte", 2, [1, 2]),
        ("in", [1, 3], [1, 3]),
    ],
)
async def test_filter_compares_by_its_op(op: str, value: Json, expected: Json) -> None:
    assert await run("filter", {"n": [1, 2, 3]}, op=op, value=value) == expected


async def test_contains_looks_into_texts_lists_and_objects() -> None:
    items = ["abc", ["b"], {"b": 1}, "x", ["bb"], None]
    assert await run("filter", {"n": items}, op="contains", value="b") == items[:3]


async def test_a_null_is_in_no_order() -> None:
    items = [{"n": 1}, {}, {"n": 3}]
    assert await run("filter", {"x": items}, key="n", op="lt", value=2) == [{"n": 1}]


async def test_what_cannot_be_compared_is_named() -> None:
    with pytest.raises(AuthorError, match=r"'n\[1\]' holds text of 1 characters.*'gt'.*a number"):
        await run("filter", {"n": [1, "b"]}, op="gt", value=0)


@given(st.lists(objects, max_size=6))
def test_map_plucks_what_stands_at_the_key(items: list[dict[str, Json]]) -> None:
    expected = [item.get("a") for item in items]
    assert apply("map", {"x": items}, {"key": "a"}) == expected


async def test_paths_lead_into_objects_and_lists() -> None:
    item = {"user": {"tags": ["x", "y"]}, "a.b": 7}
    assert await run("map", {"x": [item]}, key="user.tags.1") == ["y"]
    assert await run("map", {"x": [item]}, key="a.b") == [7]
    assert await run("map", {"x": [item]}, key="user.tags.9", default=0) == [0]
    assert await run("extract", {"x": item}, path="user.tags.-1") == "y"
    assert await run("extract", {"x": item}, path="user.name") is None


async def test_select_keeps_fields_of_an_object_or_of_each() -> None:
    item = {"a": 1, "b": {"c": 2}, "d": 3}
    assert await run("select", {"x": item}, fields=["a", "d", "none"]) == {"a": 1, "d": 3}
    assert await run("select", {"x": [item]}, parameters={"fields": {"z": "b.c"}}) == [{"z": 2}]
    assert await run("select", {"x": item}, key="b.c") == 2


@given(st.lists(st.none() | st.integers(-5, 5) | st.sampled_from([0.5, -1.5])), st.booleans())
def test_sort_is_stable_and_puts_nulls_last(items: list[Any], reverse: bool) -> None:
    numbers = sorted((item for item in items if item is not None), reverse=reverse)
    expected = numbers + [None] * items.count(None)
    assert apply("sort", {"x": items}, {"reverse": reverse}) == expected
    rows = [{"k": item, "place": place} for place, item in enumerate(items)]
    by_key = apply("sort", {"x": rows}, {"key": "k", "reverse": reverse})
    assert [row["k"] for row in by_key] == expected
    for left, right in pairwise(by_key):
        if left["k"] == right["k"]:
            assert left["place"] < right["place"]


async def test_sort_knows_the_words_of_the_file() -> None:
    rows = [{"n": 1}, {"n": 3}, {"n": 2}]
    assert await run("sort", {"x": rows}, by="n", descending=True) == [rows[1], rows[2], rows[0]]
    assert await run("sort", {"x": rows}, by="n", descending=False) == [rows[0], rows[2], rows[1]]


async def test_sort_of_mixed_kinds_names_the_first_that_does_not_fit() -> None:
    with pytest.raises(AuthorError, match=r"'x\[2\]' is a boolean.*a number"):
        await run("sort", {"x": [2, 1, True]})


@given(st.lists(values, max_size=8))
def test_unique_keeps_the_first_of_equals(items: list[Json]) -> None:
    seen: list[str] = []
    expected = []
    for item in items:
        if tagged(item) not in seen:
            seen.append(tagged(item))
            expected.append(item)
    result = apply("unique", {"x": items}, {})
    assert [tagged(item) for item in result] == [tagged(item) for item in expected]


@given(st.text("ab, \n", max_size=20), st.sampled_from([",", "\n", "ab", " "]))
def test_join_undoes_split(text: str, separator: str) -> None:
    parts = apply("split", {"x": text}, {"separator": separator})
    assert parts == text.split(separator)
    assert apply("join", {"x": parts}, {"separator": separator}) == text


async def test_split_and_join_at_line_ends_by_default() -> None:
    assert await run("split", {"x": "a\nb"}) == ["a", "b"]
    assert await run("split", {"x": " a, ,b "}, separator=",", trim=True) == ["a", "b"]
    assert await run("join", {"x": ["a", 1, None, {"b": True}]}) == 'a\n1\n\n{"b":true}'
    assert await run("join", {"x": [{"t": "a"}, {"t": "b"}]}, key="t", separator=" ") == "a b"
    with pytest.raises(AuthorError, match="'separator' is empty"):
        await run("split", {"x": "a"}, separator="")


async def test_concat_makes_one_text_of_texts_and_numbers() -> None:
    assert await run("concat", {"a": "x", "b": 2}, separator="-") == "x-2"
    with pytest.raises(AuthorError, match="'b' is a list of 1"):
        await run("concat", {"a": "x", "b": [1]})


async def test_format_fills_names_and_leaves_other_braces() -> None:
    template = '{"a": {n}, "b": "{user.name}"} { } {}'
    inputs = {"n": 2, "user": {"name": "{n}"}}
    assert await run("format", inputs, template=template) == '{"a": 2, "b": "{n}"} { } {}'
    with pytest.raises(AuthorError, match=r"nothing stands at \{who\}; the inputs are n, user"):
        await run("format", inputs, template="{who}")


async def test_extract_finds_matches() -> None:
    text = "id=17, id=42"
    assert await run("extract", {"x": text}, pattern=r"id=(\d+)") == "17"
    assert await run("extract", {"x": text}, pattern=r"id=\d+") == "id=17"
    assert await run("extract", {"x": text}, pattern=r"id=(?P<n>\d+)", all=True, group="n") == [
        "17",
        "42",
    ]
    assert await run("extract", {"x": text}, pattern="nothing", default="-") == "-"
    with pytest.raises(AuthorError, match="no regular expression"):
        await run("extract", {"x": text}, pattern="(")
    with pytest.raises(AuthorError, match="no group 3"):
        await run("extract", {"x": text}, pattern="(a)", group=3)


@given(values)
def test_parse_json_undoes_to_json(value: Json) -> None:
    text = apply("to_json", {"x": value}, {})
    assert tagged(apply("parse_json", {"x": text}, {})) == tagged(value)
    assert tagged(apply("parse_json", {"x": f"```json\n{text}\n```"}, {})) == tagged(value)


@pytest.mark.parametrize("text", ["", "{", "NaN", "[1,]", "-Infinity", "[" * 100_000, "9" * 5000])
async def test_text_that_is_no_json_is_refused_without_showing_it(text: str) -> None:
    with pytest.raises(AuthorError, match=f"'x' \\(text of {len(text)} characters\\) is not JSON"):
        await run("parse_json", {"x": text})


async def test_to_json_indents() -> None:
    assert await run("to_json", {"x": {"a": 1}}, indent=2) == '{\n  "a": 1\n}'
    assert await run("to_json", {"x": 1, "y": 2}) == '{"x":1,"y":2}'
    with pytest.raises(AuthorError, match="'indent'"):
        await run("to_json", {"x": 1}, indent=10**9)


async def test_template_and_expression_give_what_was_rendered() -> None:
    assert await run("template", {}, template="Hello Ann") == "Hello Ann"
    assert await run("expression", {}, value=[1, 2]) == [1, 2]
    assert await run("expression", {}, value=None) is None


async def test_an_expression_says_what_is_taken_of_each_item() -> None:
    rows = [{"n": 3, "t": "c"}, {"n": 1, "t": "a"}, {"n": 2, "t": "b"}]
    inputs = {"rows": rows}
    assert await run("map", inputs, expression="item.n * 10 + index") == [30, 11, 22]
    expression = "item.n < inputs.max and inputs.rows | length == 3"
    step = config("transform", function="filter", inputs=inputs, expression=expression)
    step = step.with_scope({"inputs": {"max": 3}})
    assert (await Transform().execute(Room(), step))["result"] == rows[1:]
    assert await run("filter", {"x": ["no", "yes", ""]}, expression="item") == ["yes"]
    assert await run("sort", inputs, expression="-item.n") == [rows[0], rows[2], rows[1]]
    assert await run("unique", inputs, expression="item.n % 2") == [rows[0], rows[2]]
    assert await run("sum", inputs, expression="item.n * item.n") == 14
    assert await run("join", inputs, expression="item.t | upper", separator="") == "CAB"
    with pytest.raises(TemplateError, match="nix"):
        await run("map", inputs, expression="item.nix")


async def test_a_value_never_enters_an_expression() -> None:
    rows = [{"n": "{{ 1 + 1 }}"}]
    assert await run("map", {"x": rows}, expression="item.n") == ["{{ 1 + 1 }}"]
    assert await run("format", {"x": "{y}", "y": "no"}, template="{x}") == "{y}"


async def test_length_counts() -> None:
    assert [await run("length", {"x": x}) for x in ("abc", [1], {"a": 1, "b": 2})] == [3, 1, 2]
    with pytest.raises(AuthorError, match="'x' is a number; it must be text, a list or an object"):
        await run("length", {"x": 3})


@given(st.lists(st.integers() | st.floats(-1e6, 1e6)))
def test_sum_adds_exactly(items: list[float]) -> None:
    result = apply("sum", {"x": items}, {})
    assert result == (sum(items) if all(isinstance(i, int) for i in items) else math.fsum(items))
    assert apply("sum", {f"n{place}": item for place, item in enumerate(items)}, {}) == result


async def test_sum_takes_a_key_and_refuses_what_is_no_number() -> None:
    assert await run("sum", {"x": [{"n": 1}, {"n": 2}]}, key="n") == 3
    with pytest.raises(AuthorError, match=r"'x\[1\]' is a boolean; it must be a number"):
        await run("sum", {"x": [1, True]})
    with pytest.raises(AuthorError, match="larger than a number can be"):
        await run("sum", {"x": [1e308, 1e308, 1e308]})


async def test_several_inputs_where_one_is_taken_are_named() -> None:
    with pytest.raises(
        AuthorError, match="transform sort: it takes one input and was given 2: a, b"
    ):
        await run("sort", {"a": [], "b": []})


async def test_an_unknown_or_missing_parameter_is_named() -> None:
    with pytest.raises(AuthorError, match="no parameter 'colour'"):
        await run("sort", {"a": []}, colour="red")
    with pytest.raises(AuthorError, match="needs the parameter 'template'"):
        await run("template", {})


@given(st.sampled_from(sorted(FUNCTIONS)), st.dictionaries(st.sampled_from("xyz"), values))
def test_whatever_comes_in_the_answer_is_json_or_the_authors_mistake(
    name: str, inputs: dict[str, Json]
) -> None:
    before = json.dumps(inputs)
    with contextlib.suppress(AuthorError):
        json.dumps(apply(name, inputs, {}), allow_nan=False)
    assert json.dumps(inputs) == before

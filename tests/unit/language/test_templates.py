from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_orchestrator.errors import TemplateError
from llm_orchestrator.language.templates import (
    FILTERS,
    REMOVED_FILTERS,
    TEMPLATE_LENGTH_MAX,
    Templates,
    is_true,
)

T = Templates()
NAMES: dict[str, Any] = {
    "inputs": {"name": "Ann", "n": 2, "ratio": 1.0, "yes": True, "none": None, "list": [1, 2]},
    "steps": {
        "greet": {"greeting": "hi", "data": {"n": 3, "items": ["a"]}},
        "my-step": {"out": [{"a": 1}]},
    },
}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("inputs.list", [1, 2]),
        ("inputs.n", 2),
        ("inputs.yes", True),
        ("inputs.none", None),
        ("steps.greet.data", {"n": 3, "items": ["a"]}),
        ("steps['my-step'].out[0].a", 1),
        ('steps["my-step"].out.0.a', 1),
        ("inputs.n + 1", 3),
        ("steps.greet.data.items", ["a"]),
        ("steps.greet.data.n if inputs.yes else 0", 3),
        ("{'a': {'b': inputs.n}}", {"a": {"b": 2}}),
        ("inputs.list | map('string') | join('-')", "1-2"),
        ("inputs.missing | default('x')", "x"),
        ("inputs.missing is defined", False),
        ("'}}'", "}}"),
    ],
)
def test_a_value_that_is_one_expression_keeps_its_type(expression: str, value: Any) -> None:
    assert T.render("{{ " + expression + " }}", NAMES) == value
    assert T.evaluate(expression, NAMES) == value


def test_a_lone_path_gives_the_value_exactly() -> None:
    names = {"x": {"float": 1.0, "big": 2**200, "odd": "a\ud800"}}
    for key, value in names["x"].items():
        found = T.render("{{ x." + key + " }}", names)
        assert found == value
        assert type(found) is type(value)


def test_text_shows_null_as_nothing_and_structure_as_json() -> None:
    text = "[{{ inputs.none }}] {{ inputs.yes }} {{ steps.greet.data }} {{ inputs.name }}"
    assert T.render(text, NAMES) == '[] true {"n": 3, "items": ["a"]} Ann'


def test_rendering_goes_into_lists_and_mappings_and_leaves_the_rest() -> None:
    value = {"a": ["{{ inputs.n }}", 3, None], "{{ inputs.n }}": True}
    assert T.render(value, NAMES) == {"a": [2, 3, None], "{{ inputs.n }}": True}


@pytest.mark.parametrize("text", ["{{ inputs.name }}", "{% if 1 %}x{% endif %}", "{{ 1/0 }}", "{{"])
def test_a_value_is_never_rendered(text: str) -> None:
    names = {"inputs": {"evil": text}}
    assert T.render("{{ inputs.evil }}", names) == text
    assert T.render("a {{ inputs.evil }} b", names) == f"a {text} b"
    assert T.render("{{ inputs.evil | trim }}", names) == text.strip()


@pytest.mark.parametrize(
    ("template", "missing", "nearest"),
    [
        ("{{ inputs.nme }}", "inputs.nme", "name"),
        ("Hi {{ inputs.nme }}", "inputs.nme", "name"),
        ("{{ steps.gret.greeting }}", "steps.gret.greeting", "greet"),
        ("{{ steps.greet.greting | upper }}", "steps.greet.greting", "greeting"),
        ("{{ input.name }}", "input.name", "inputs"),
        ("{{ [inputs.nme] }}", "inputs.nme", "name"),
        ("{{ inputs.nme | tojson }}", "inputs.nme", "name"),
        ("{{ not inputs.nme }}", "inputs.nme", "name"),
    ],
)
def test_what_is_missing_is_named_with_its_nearest_neighbour(
    template: str, missing: str, nearest: str
) -> None:
    with pytest.raises(TemplateError) as caught:
        T.render(template, NAMES)
    assert f"`{missing}` is not there" in caught.value.message
    assert f"did you mean `{nearest}`?" in caught.value.message
    assert template in caught.value.message


def test_a_long_template_is_shortened_in_its_error() -> None:
    with pytest.raises(TemplateError) as caught:
        T.render("x" * 5000 + "{{ nope }}", NAMES)
    assert len(caught.value.message) < 300


def test_a_missing_name_that_hides_behind_a_method_is_missing() -> None:
    for template in ("{{ inputs.items }}", "x{{ inputs.items }}", "{{ inputs.keys == 1 }}"):
        with pytest.raises(TemplateError):
            T.render(template, NAMES)


@pytest.mark.parametrize(
    "template",
    [
        "{{ steps.greet.pop('greeting') }}",
        "{{ inputs.clear() }}",
        "{{ inputs.list.append(3) }}",
        "{% if steps.greet.data.update({'n': 9}) %}{% endif %}",
        "{% set _ = inputs.list.clear() %}x",
        "{{ steps.greet.data.setdefault('z', 1) }}",
    ],
)
def test_a_method_that_changes_its_dict_does_not_reach_the_names(template: str) -> None:
    names = copy.deepcopy(NAMES)
    with contextlib.suppress(TemplateError):
        T.render(template, names)
    assert names == NAMES


def test_a_result_is_never_the_names_own_object() -> None:
    names = copy.deepcopy(NAMES)
    T.render("{{ steps.greet.data }}", names)["n"] = 99
    T.evaluate("inputs.list", names).append(3)
    T.copy_used("steps.greet.data.n > 1 and inputs.list", names)["inputs"]["list"].append(4)
    assert names == NAMES


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
METHODS = st.sampled_from(
    ["pop('a')", "clear()", "update({'a': 1})", "append(1)", "sort()", "popitem()", "reverse()"]
)


@given(value=JSON, method=METHODS, is_text=st.booleans())
def test_rendering_never_changes_the_names(value: Any, method: str, is_text: bool) -> None:
    names = {"inputs": {"x": value, "a": {"b": value}}}
    before = copy.deepcopy(names)
    for template in ("{{ inputs.x." + method + " }}", "{{ inputs.a.b." + method + " }}"):
        with contextlib.suppress(TemplateError):
            T.render(template + ("!" if is_text else ""), names)
    assert names == before


@given(value=JSON)
def test_any_value_passes_through_a_template_unread(value: Any) -> None:
    assert T.render("{{ inputs.x }}", {"inputs": {"x": value}}) == value


@given(text=st.text())
def test_any_text_is_text_to_a_template(text: str) -> None:
    assert T.render("<{{ inputs.x }}>", {"inputs": {"x": text}}) == f"<{text}>"


@given(text=st.text(alphabet="{}%# |.'\"abif()[]0-", max_size=30))
def test_any_author_text_renders_or_is_refused(text: str) -> None:
    with contextlib.suppress(TemplateError):
        T.render(text, {"a": 1})
        T.evaluate(text, {"a": 1})


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 2000000000 }}",
        "{{ range(10000000000) }}",
        "{% for i in range(100000) %}{{ i }}{% endfor %}",
        "{{ inputs.name | indent(1000000000) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ inputs.list | batch(1000000000) }}",
        "{{ debug() }}",
        "{{ debug() if 1 else 0 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ inputs | attr('__class__') }}",
        "{% include 'x' %}",
        "{% import 'x' as y %}",
        "{% extends 'x' %}",
        "x" * (TEMPLATE_LENGTH_MAX + 1) + "{{ 1 }}",
    ],
)
def test_a_template_that_is_too_much_is_an_error_and_nothing_worse(template: str) -> None:
    with pytest.raises(TemplateError):
        T.render(template, NAMES)


def test_tojson_is_plain_json_of_bounded_indent() -> None:
    assert T.render("{{ inputs.list | tojson }}", NAMES) == "[1, 2]"
    assert T.render('{"a": {{ "<b>" | tojson }}}', NAMES) == '{"a": "<b>"}'
    wide = T.render("{{ inputs.list | tojson(indent=1000000000) }}", NAMES)
    assert wide == "[\n        1,\n        2\n]"


def test_infinity_does_not_leave_an_expression() -> None:
    with pytest.raises(TemplateError):
        T.evaluate("1e308 * 10 * inputs.n", NAMES)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, True), (0, False), ("", False), ("no", False), (" False\n", False), ("0", False),
        ("yes", True), ("nonsense", True), ([], False), ({"a": 1}, True), (None, False),
    ],
)  # fmt: skip
def test_what_counts_as_true(value: Any, expected: bool) -> None:
    assert is_true(value) is expected
    assert T.is_true("x", {"x": value}) is expected


def test_references_are_the_paths_from_outside() -> None:
    text = (
        "{% for d in steps.search.results %}{{ d.text }} {{ loop.index }}{% endfor %}"
        "{% set z = 1 %}{{ z }} {{ steps['my-step'].out }} {{ inputs.a.b }} {{ x[inputs.key] }}"
        "{{ inputs.name.upper() }} {% raw %}{{ no.no }}{% endraw %}{# {{ no.no }} #}"
    )
    assert T.references(text) == {
        ("steps", "search", "results"),
        ("steps", "my-step", "out"),
        ("inputs", "a", "b"),
        ("inputs", "key"),
        ("inputs", "name"),
        ("x",),
    }


@pytest.mark.parametrize(
    "text", ["{{ inputs.x }", "{% if x %}", "{% foo %}", "{{ x | uper }}", "{{ }}", "{% for %}"]
)
def test_a_template_that_does_not_parse_is_found_without_values(text: str) -> None:
    assert T.check(text)


@pytest.mark.parametrize("text", ["a ==", "a b", "1 %}{{ x }}{% if 1", "1) }}{{ (x", "a | uper"])
def test_an_expression_that_does_not_parse_is_found_without_values(text: str) -> None:
    assert T.check(text, is_expression=True)


@pytest.mark.parametrize("text", ["a.b == 1", "a if b else c", "a is not defined", "'%}' ~ '}}'"])
def test_an_expression_that_parses_passes_the_check(text: str) -> None:
    assert T.check(text, is_expression=True) is None


def test_an_unknown_filter_names_the_nearest() -> None:
    assert "did you mean `upper`?" in (T.check("{{ x | uper }}") or "")


def test_every_listed_filter_exists_and_every_removed_one_does_not() -> None:
    for name in FILTERS:
        with pytest.raises(TemplateError) as caught:
            T.evaluate(f"1 | {name} | no_such_filter", {})
        assert f"filter {name} is unknown" not in caught.value.message
    for name in REMOVED_FILTERS:
        with pytest.raises(TemplateError, match=f"filter {name} is unknown"):
            T.evaluate(f"1 | {name}", {})


def test_more_texts_than_are_kept_still_render() -> None:
    templates = Templates()
    for number in range(2100):
        assert templates.render(f"{number} {{{{ x }}}}", {"x": 1}) == f"{number} 1"
    assert templates.render("0 {{ x }}", {"x": 2}) == "0 2"

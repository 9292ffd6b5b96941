"""Hostile templates: each ends as a plain mistake, in a child or before, and costs nobody else.

No test here measures time; one that would hang is ended by the suite's own limit.
"""

from __future__ import annotations

from typing import Any

import pytest

from llm_orchestrator.errors import TemplateError
from llm_orchestrator.language import sandbox
from llm_orchestrator.language.cost import FUELS, Cost, cost_of
from llm_orchestrator.language.templates import Templates

NUMBERS = list(range(100_000))
SCOPE: dict[str, Any] = {"text": "a" * 3_000_000, "list": NUMBERS, "n": 10**9, "m": {"k": 1}}
DOUBLED = "{% set ns = namespace(s='aa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}"
WIDE = "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}"
NEST = "".join(f"{{% for a{n + 1} in [a{n} ~ a{n}] %}}" for n in range(60)).replace("a0", "text")
TOO_MUCH = [
    f"{DOUBLED}{{% endfor %}}{{{{ ns.s | length }}}}",
    f"{WIDE}{{% endfor %}}{{{{ ns.a | tojson | length }}}}",
    f"{NEST}x{'{% endfor %}' * 60}",
    "{{ text | replace('a', 'b' * 10000) | length }}",
    "{{ list | join('x' * 100000) | length }}",
    "{{ list | map('replace', '1', 'b' * 100000) | list }}",
    "{{ list | select('in', list) | list | length }}",
    "{% for i in range(99999) %}{{ text | upper | length }}{% endfor %}",
    "{% for i in range(99999) %}{{ text }}{% endfor %}",
    "{{ text" + " | tojson" * 40 + " }}",
    "{{ text.replace('a', 'b' * 10000) | length }}",
]
USUAL: dict[str, Any] = {
    "inputs": {"name": "Ann", "n": 3, "text": "some words <b>" * 300, "k": [3, 1, 2]},
    "docs": [{"title": f"t{n}", "text": "words " * 9, "tags": ["a", "b"]} for n in range(8)],
    "m": {"a": 1, "b": [1, {"c": None}]},
}
LIGHT = [
    "Hello {{ inputs.name }}, **read** {{ inputs.text | trim | upper }}!",
    "{% for d in docs %}{{ loop.index }}. {{ d.title }}: {{ d.tags | join(', ') }}\n{% endfor %}",
    "{{ docs | map(attribute='title') | join('; ') }}",
    "{% if inputs.n > 2 and inputs.name != '' %}yes{% elif inputs.n %}{{ inputs.n }}{% endif %}",
    "{{ inputs.n * 2 + 1 }}",
    "{{ inputs.missing | default(inputs.name) }}",
    "{% for key, value in m.items() %}{{ key }}={{ value | tojson }} {% endfor %}",
    "{{ inputs.k | sort | first }}",
    "{{ {'a': inputs.n, 'b': [inputs.name]} }}",
    "{% for i in range(3) %}{{ i }}{% endfor %}",
    "{{ inputs.text | truncate(length=10) }}{{ docs[0].title }}",
]
HEAVY = [
    "{% set x = inputs.name ~ '!' %}{{ x }}",
    "{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(inputs.name) }}",
    "{{ inputs.name * 3 }}",
    "{{ inputs.text | replace('words', inputs.name) | length }}",
    "{{ inputs.k | select('in', inputs.k) | list }}",
    "{{ dict(a=inputs.n) }}",
    "{{ inputs.text.split(' ') | length }}",
]


@pytest.mark.parametrize("text", TOO_MUCH)
def test_a_text_that_is_too_much_is_a_mistake_that_says_so(text: str) -> None:
    templates = Templates()
    assert templates.check(text) is None
    with pytest.raises(TemplateError, match=r"failed: it takes more than 0\.5 s, 512 MiB"):
        templates.render(text, SCOPE)


@pytest.mark.parametrize(
    "expression",
    [
        "'a' * 1000000000000",
        "('a' ~ 'b') * 4000000000 * 4000000000",
        "[1] * 100000000000",
        "10 ** 10000000",
        "range(1000000000)",
    ],
)
def test_a_constant_is_not_worked_out_before_it_is_run(expression: str) -> None:
    templates = Templates()
    assert templates.check(expression, is_expression=True) is None
    with pytest.raises(TemplateError, match="failed: "):
        templates.evaluate(expression, {})


def test_checking_works_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """`'a' * 10**8` took 0.1 GB when its names were looked for; now nothing is repeated."""
    seen: list[str] = []
    templates = Templates()
    engine: Any = templates._parser  # what the engine is handed is the point

    class Watched:
        def undeclared_variables_in_str(self, source: str) -> set[str]:
            seen.append(source)
            return set()

    monkeypatch.setattr(engine, "_env", Watched())
    assert templates.check("'a' * 100 ** n", is_expression=True) is None
    assert seen
    assert "*" not in "".join(seen)


@pytest.mark.parametrize("text", LIGHT)
def test_a_usual_template_needs_no_child(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _in_a_child(text)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError(text)

    monkeypatch.setattr(sandbox, "ask", refuse)
    assert Templates().render(text, USUAL) == expected


@pytest.mark.parametrize("text", HEAVY)
def test_what_nothing_bounds_runs_in_a_child_and_gives_the_same(text: str) -> None:
    assert cost_of(text).fuel(USUAL) == 0
    seen = {"inputs": USUAL["inputs"]}
    assert Templates().render(text, USUAL) == _in_this_process(text, seen)


def _in_a_child(text: str) -> Any:
    templates = Templates()
    compiled = templates._compile(text, is_expression=False)._replace(cost=Cost())
    return templates._evaluate(compiled, USUAL)  # as if it were heavy


def _in_this_process(text: str, seen: dict[str, Any]) -> Any:
    templates = Templates()
    compiled = templates._compile(text, is_expression=False)
    return templates._parser.run(compiled, seen)  # as if it were light


def test_who_runs_out_of_what_is_allowed_here_goes_on_in_a_child() -> None:
    text = "{% for i in range(2000) %}{{ i }};{% endfor %}"
    assert 0 < cost_of(text).fuel({}) < 2000
    assert Templates().render(text, {}) == "".join(f"{n};" for n in range(2000))
    with pytest.raises(TemplateError, match="ran out of fuel"):
        Templates().render("{% for i in range(99999) %}{{ i }}{% endfor %}", {})


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("{{ x * y }}", {"x": "a", "y": 10**9}),
        ("{% for k in [n] %}{{ k * n }}{% endfor %}", {"n": 3}),
        ("{% for k in m %}{{ k * 100000000 }}{% endfor %}", {"m": {"a": 1}}),
        ("{{ ('a', 'b')[0] * n }}", {"n": 10**9}),
        ("{{ n | string * n }}", {"n": 10**9}),
        ("{{ list | join(loop) }}", {"list": [1]}),
        ("{{ list | map('join', x) }}", {"list": [[1]], "x": "a"}),
        ("{{ text.replace('a', x) }}", {"text": "a", "x": "b"}),
        ("{{ (text)(x) }}", {"text": "a", "x": "b"}),
        ("{% with a = x ~ x %}{{ a }}{% endwith %}", {"x": "a"}),
        (f"{NEST}x{'{% endfor %}' * 60}", {"text": "a"}),
        ("{{ x }}", {"x": "a" * 1_000_000}),
    ],
)
def test_what_may_grow_gets_no_fuel_here(text: str, values: dict[str, Any]) -> None:
    assert cost_of(text).fuel(values) == 0


def test_the_larger_the_values_the_less_may_run_here() -> None:
    cost = cost_of("{% for x in l %}{{ x | tojson }}{% endfor %}")
    fuels = [cost.fuel({"l": ["a" * size]}) for size in (1, 500, 2_000, 20_000, 1_000_000)]
    assert fuels == sorted(fuels, reverse=True)
    assert {fuels[0], fuels[-1]} == {FUELS[0], 0}


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "text",
    [
        "{{ x }}" * 14_000,
        "{{ " * 33_000,
        "{% if " + "a is not " * 10_000 + "b %}x{% endif %}",
        '{{ "' + '\\"' * 49_000 + " }}",
        "{% raw " * 14_000,
        "{# {# " * 16_000,
        "{{ " + "a." * 48_000 + "b }}",
        "{{ " + "(" * 90_000 + " }}",
        "{{ " + "a ~ " * 20_000 + "b }}",
        "{{ " + "not " * 20_000 + "b }}",
        "{% if a %}" + "{% elif b %}" * 8_000 + "{% endif %}",
    ],
)
def test_reading_a_text_takes_steps_in_proportion_to_its_length(text: str) -> None:
    templates = Templates()
    for _ in range(2):
        templates.check(text)


def test_a_text_that_is_too_long_is_refused() -> None:
    problem = Templates().check("{{ x }}" + "y" * 100_000)
    assert problem is not None
    assert "longer than 100000 characters" in problem

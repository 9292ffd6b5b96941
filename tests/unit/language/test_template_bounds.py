"""Hostile templates: each ends as a plain mistake, in a child or before, and costs nobody else.

No test here measures time; one that would hang is ended by the suite's own limit.
"""

from __future__ import annotations

from typing import Any

import pytest

from llm_orchestrator.errors import TemplateError
from llm_orchestrator.language.templates import Templates

TEXT = "a" * 3_000_000
NUMBERS = list(range(100_000))
SCOPE: dict[str, Any] = {"text": TEXT, "list": NUMBERS, "n": 10**9, "m": {"k": 1}}
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

"""Hostile files, inputs, patterns and schemas: each is refused with a reason, within bounds."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from llm_orchestrator.errors import AuthorError, InputError
from llm_orchestrator.language import load as loading
from llm_orchestrator.language import names, patterns, sandbox
from llm_orchestrator.language.inputs import check_inputs
from llm_orchestrator.language.load import load_text
from llm_orchestrator.steps.schema import find_problems
from llm_orchestrator.steps.transform import Transform
from tests.unit.language.support import load, problems

STEPS = "steps:\n- {id: a, type: wait, seconds: 1}\n"
HEAD = f"name: w\n{STEPS}"
NINE = ", ".join(["{0}"] * 9)
LAUGHS = "a: &a [x, x, x]\n" + "".join(
    f"{c}: &{c} [{NINE.format(f'*{before}')}]\n"
    for before, c in zip("abcdefghi", "bcdefghij", strict=True)
)
TEXTS = f"outputs:\n  t: &t '{'x' * 9_000}'\n  u: [{'*t, ' * 4_000}]\n"
HOSTILE = "(a+)+$"
TRAP = "a" * 60 + "b"


@pytest.mark.parametrize("bomb", [LAUGHS, TEXTS])
def test_aliases_unfold_to_a_bounded_size(bomb: str) -> None:
    (found,) = problems(HEAD + bomb)
    assert "more than 100000 values, or too much text, once aliases are unfolded" in found


@pytest.mark.parametrize(
    ("text", "source"),
    [
        (HEAD + "x: " + "[" * 5_000, "w.yaml"),
        (HEAD + "x: " + "[" * 500_000, "w.yaml"),
        ('{"name": ' + "[" * 500_000, "w.json"),
        ('{"name": ' + '{"a": ' * 500 + "1" + "}" * 501, "w.json"),
        ("- " * 500_000, "w.yaml"),
    ],
)
def test_depth_is_bounded(text: str, source: str) -> None:
    (found,) = problems(text, source)
    assert "nested deeper than 60" in found


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "text",
    [
        "a: [" + "[]," * 200_000 + "]",
        "[" + ",".join(f"&a{n} x" for n in range(80_000)) + "]",
        "name: w\noutputs:\n"
        + "".join(f"  o{n}: '{'{{ inputs.x }}' * 6_000}'\n" for n in range(9))
        + STEPS,
        "name: w\ninputs:\n"
        + "".join(
            f"  i{n}: {{type: string, default: {TRAP}, pattern: '{HOSTILE}'}}\n" for n in range(9)
        )
        + STEPS,
    ],
)
def test_a_file_that_is_too_much_to_check_says_so(text: str) -> None:
    (found,) = problems(text)
    assert "checking this file is too much: it takes more than 1" in found


def test_a_large_file_is_read_as_a_small_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    text = HEAD + "- {id: b, type: action, action: nobody, depends_on: [a]}\n"
    small = load(text)
    wrong = f"{HEAD}- {{id: b, typo: wait}}\n"
    found = problems(wrong)
    asked: list[str] = []
    ask = sandbox.ask

    def watched(function: str, question: Any, **options: Any) -> Any:
        asked.append(function)
        return ask(function, question, **options)

    monkeypatch.setattr(sandbox, "ask", watched)
    monkeypatch.setattr(loading, "LARGE_BYTES", 10)
    large = load(text)
    assert asked == ["llm_orchestrator.language.load:answer"]
    assert (large, large.digest) == (small, small.digest)
    assert large.warnings == small.warnings != []
    assert problems(wrong) == found != []
    assert load_text(text.encode(), "w.yaml") == small
    with pytest.raises(AuthorError, match="not UTF-8"):
        load_text(b"\xff" * 11, "w.yaml")


def test_a_hostile_pattern_of_an_input_is_a_mistake_of_the_input() -> None:
    definition = load(f"name: w\ninputs:\n  i: {{type: string, pattern: '{HOSTILE}'}}\n{STEPS}")
    assert check_inputs(definition, {"i": "aaa"}) == {"i": "aaa"}
    with pytest.raises(InputError, match=r"should match \(a\+\)\+\$, but .* too much: .* 0\.1 s"):
        check_inputs(definition, {"i": TRAP})
    with pytest.raises(InputError, match="at most 100000 characters, not 100001"):
        check_inputs(definition, {"i": "a" * 100_001})


def test_only_one_hostile_pattern_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = "".join(f"  i{n}: {{type: string, pattern: '{HOSTILE}'}}\n" for n in range(3))
    definition = load(f"name: w\ninputs:\n{specs}{STEPS}")
    tried: list[str] = []

    def too_much(pattern: str, text: str, **_: Any) -> None:
        tried.append(pattern)
        raise AuthorError("too much")

    monkeypatch.setattr(patterns, "find", too_much)
    with pytest.raises(InputError):
        check_inputs(definition, {f"i{n}": "a" for n in range(3)})
    assert tried == [HOSTILE]


@pytest.mark.parametrize("top", ["", "inputs:\n  x: {type: any}\n"])
@pytest.mark.parametrize("depth", [names.DEPTH_MAX + 1, 100_000])
def test_inputs_are_bounded_in_depth(top: str, depth: int) -> None:
    definition = load(f"name: w\n{top}{STEPS}")
    deep: Any = 1
    for _ in range(depth):
        deep = {"a": [deep]} if depth % 2 else [deep]
    with pytest.raises(InputError, match="nested deeper than 100"):
        check_inputs(definition, {"x": deep})
    assert check_inputs(definition, {"x": [[[1]]]})


def test_extract_ends_with_a_hostile_pattern() -> None:
    class Config:
        inputs = (TRAP,)
        function, expression = "extract", None
        free = {"pattern": HOSTILE}  # noqa: RUF012 (stands for a model's field)
        model_fields_set = frozenset[str]()
        template = key = by = fields = path = pattern = separator = descending = None

    with pytest.raises(AuthorError, match=r"'pattern': .* is too much: .* 0\.5 s"):
        asyncio.run(Transform().execute(Any, Config()))  # type: ignore[arg-type]


def _chain(depth: int) -> dict[str, Any]:
    twice = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(depth)}
    return {"$defs": {**twice, f"d{depth}": {}}, "$ref": "#/$defs/d0"}


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"pattern": HOSTILE}, TRAP),
        ({"patternProperties": {HOSTILE: {}}}, {TRAP: 1}),
        (_chain(40), 1),
        ({"uniqueItems": True}, [{"a": n} for n in range(20_000)]),
    ],
)
def test_a_hostile_schema_is_a_mistake(schema: dict[str, Any], value: Any) -> None:
    with pytest.raises(AuthorError, match="the schema is too much"):
        find_problems(value, schema)


def test_a_schema_says_the_same_in_a_child() -> None:
    name = {"type": "string", "pattern": "^[a-z]+$"}
    schema = {"$defs": {"name": name}, "properties": {"a": {"$ref": "#/$defs/name"}}}
    assert find_problems({"a": "x"}, schema) == []
    assert find_problems({"a": "X"}, schema) == ["$.a: 'X' does not match '^[a-z]+$'"]
    with pytest.raises(AuthorError, match="which it does not hold") as caught:
        find_problems(1, {"$ref": "#/$defs/none"})
    assert caught.value.hint
    with pytest.raises(AuthorError, match="the schema is wrong"):
        find_problems("a", {"type": 5})

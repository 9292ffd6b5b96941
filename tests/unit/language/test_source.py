from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_orchestrator.language.source import BYTES_MAX, Mark, SourceError, read


def test_scalars_are_read_as_yaml_1_2_reads_them() -> None:
    text = """
a: yes
b: true
c: 1
d: 1.5e3
e: ~
f: "1"
g: 0x1F
h: 0o17
i: 012
j: !!str 1
k: |
  x
l: 1:30
m: 2027-01-31
"""
    assert read(text).data == {
        "a": "yes", "b": True, "c": 1, "d": 1500.0, "e": None, "f": "1", "g": 31, "h": 15, "i": 12,
        "j": "1", "k": "x\n", "l": "1:30", "m": "2027-01-31",
    }  # fmt: skip


def test_keys_are_text_whatever_they_look_like() -> None:
    assert read("true: 1\n1: 2\n~: 3\n").data == {"true": 1, "1": 2, "~": 3}


def test_every_key_knows_its_line_and_column() -> None:
    source = read("a: 1\nsteps:\n  - id: x\n    retry: {max: 2, why: [p, q]}\n")
    assert source.find(("a",)) == Mark(1, 1)
    assert source.find(("steps",)) == Mark(2, 1)
    assert source.find(("steps", 0)) == Mark(3, 5)
    assert source.find(("steps", 0, "retry", "why")) == Mark(4, 21)
    assert source.find(("steps", 0, "retry", "why", 1)) == Mark(4, 30)
    assert source.find(("steps", 0, "nope", "deeper")) == Mark(3, 5)


def test_json_has_places_too() -> None:
    source = read('{\n\t"name": "x",\n\t"steps": [\n\t\t{"id":\t"a"}]\n}', is_json=True)
    assert source.data == {"name": "x", "steps": [{"id": "a"}]}
    assert source.find(("steps", 0, "id")) == Mark(4, 4)


def test_json_escapes_become_characters() -> None:
    source = read(r'{"a": "\ud83d\ude00\n\/\"\u0041", "b": "\ud800"}', is_json=True)
    assert source.data == {"a": '😀\n/"A', "b": "\ud800"}


def test_merge_keys_fill_in_what_is_not_given() -> None:
    data = read("base: &b {x: 1, y: 2}\nuse:\n  <<: *b\n  y: 3\n").data
    assert data["use"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("a: 1\na: 2\n", (2, 1), "duplicate key `a` (first in line 1)"),
        ("x:\n  - {k: 1, k: 2}\n", (2, 12), "duplicate key `k`"),
        ("a:\n\tb: 1\n", (2, 1), "tab"),
        ("a:\n  b: 1\n \tc: 1\n", (3, 2), "tab"),
        ("a: [1\n", (2, 1), "not valid YAML"),
        ("a: b: c\n", (1, 5), "not valid YAML"),
        ("a: {{ x }}\n", (1, 5), "quote a template"),
        ("a: *nope\n", (1, 4), "alias *nope"),
        ("a: &x [*x]\n", (1, 8), "alias *x"),
        ("a: 1\n---\nb: 2\n", (3, 1), "more than one document"),
        ("a: !!python/object/apply:os.system [id]\n", (1, 4), "not allowed"),
        ("a: !!binary aGk=\n", (1, 4), "not allowed"),
        ("a: !mine 1\n", (1, 4), "not allowed"),
        ("a: .nan\n", (1, 4), ".nan"),
        ("a: -.inf\n", (1, 4), "no number that JSON knows"),
        ("a: 1e999\n", (1, 4), "no number that JSON knows"),
        ("a: b\x00c\n", (1, 5), "control character U+0000"),
        ('{"a": 1,}', (1, 9), "not valid JSON"),
    ],
)
def test_bad_text_is_refused_with_its_place(
    text: str, place: tuple[int, int], message: str
) -> None:
    with pytest.raises(SourceError) as caught:
        read(text)
    assert message in caught.value.message
    if "YAML" not in message and "JSON" not in message[:9]:
        assert (caught.value.line, caught.value.column) == place


def test_text_that_is_not_utf_8_is_refused_with_its_place() -> None:
    with pytest.raises(SourceError) as caught:
        read(b"a: 1\nb: \xc3\xa9\xff\n")
    assert (caught.value.message, caught.value.line, caught.value.column) == ("not UTF-8", 2, 5)


def test_a_byte_order_mark_is_no_character() -> None:
    assert read(b"\xef\xbb\xbfa: 1\n").data == {"a": 1}


def _laughs(levels: int) -> str:
    lines = ["a0: &a0 [1, 1]"]
    for level in range(1, levels):
        inside = ", ".join([f"*a{level - 1}"] * 10)
        lines.append(f"a{level}: &a{level} [{inside}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_laughs(12), "once aliases are unfolded"),
        ("[" * 100_000, "nested deeper"),
        ("{a: " * 1000, "nested deeper"),
        ('{"a":' * 100_000, "nested deeper"),
        ("- " * 5000, "nested deeper"),
        ("x" * (BYTES_MAX + 1), "larger than"),
        ("[" + "1," * 100_000 + "1]", "more than"),
    ],
    ids=["laughs", "lists", "mappings", "json", "dashes", "size", "values"],
)
def test_a_bomb_is_refused(text: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        read(text)


def test_a_json_bomb_by_name_is_refused() -> None:
    with pytest.raises(SourceError, match="nested deeper"):
        read("[" * 100_000, is_json=True)


@given(text=st.text(alphabet=" \n\t:-[]{}&*!|>'\"#%@`,?abc01<~.\\/", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(SourceError):
        read(text)

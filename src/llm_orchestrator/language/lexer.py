"""Cuts templates and expressions into tokens, so that loading can read and rewrite names.

It knows nothing of values and never evaluates; `templates.py` does that. Invariant: joining the
pieces of `split` gives the text back unchanged, so a rewrite touches only what it means to touch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_TOKEN = re.compile(
    r"""
    (?P<space>\s+)
  | (?P<string>"(?:\\.|[^"\\])*(?:"|\\?\Z)|'(?:\\.|[^'\\])*(?:'|\\?\Z))
  | (?P<name>[A-Za-z_][A-Za-z0-9_]*)
  | (?P<number>\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)
  | (?P<op>==|!=|<=|>=|//|\*\*|.)
    """,
    re.VERBOSE | re.DOTALL,
)
_RAW_END = re.compile(r"\{%-?\s*endraw\s*-?%\}")
_CLOSE = {"{{": "}}", "{%": "%}", "{#": "#}"}
_OPENING = re.compile(r"\{[{%#]")

_KEYWORDS = "and else false False if in is loop none None not null or recursive self true True"
KEYWORDS = frozenset(_KEYWORDS.split())
"""Words that are never a name of a value."""


def is_template(value: object) -> bool:
    """True for text that holds `{{` or `{%`: what rendering would work on."""
    return isinstance(value, str) and ("{{" in value or "{%" in value)


class Token(NamedTuple):
    """A piece of an expression; `kind` is space, string, name, number or op."""

    kind: str
    text: str


class Piece(NamedTuple):
    """A piece of a template: `opening` is empty for plain text, else `{{`, `{%` or `{#`."""

    opening: str
    text: str

    @property
    def inner(self) -> str:
        """What stands between the delimiters."""
        return self.text[2:-2].strip("-+") if self.opening else self.text


def tokens(expression: str) -> list[Token]:
    """Every character of the expression, in order, as tokens."""
    return [Token(m.lastgroup or "op", m.group()) for m in _TOKEN.finditer(expression)]


def split(template: str) -> list[Piece]:
    """The template as plain text and blocks. An unclosed block runs to the end."""
    return list(_pieces(template))


def _pieces(template: str) -> Iterator[Piece]:
    position = plain = 0
    while (start := _next_opening(template, position)) >= 0:
        opening = template[start : start + 2]
        end = _end_of_block(template, start)
        block = template[start:end]
        if opening == "{%" and block[2:-2].strip("-+ \t\n") == "raw":
            close = _RAW_END.search(template, end)
            position = close.end() if close else len(template)
            continue
        if start > plain:
            yield Piece("", template[plain:start])
        yield Piece(opening, block)
        position = plain = end
    if plain < len(template):
        yield Piece("", template[plain:])


def _next_opening(template: str, position: int) -> int:
    found = _OPENING.search(template, position)
    return found.start() if found else -1


def _end_of_block(template: str, start: int) -> int:
    opening = template[start : start + 2]
    close = _CLOSE[opening]
    if opening == "{#":
        at = template.find(close, start + 2)
        return at + 2 if at >= 0 else len(template)
    position, depth = start + 2, 0
    while position < len(template):
        if depth == 0 and template.startswith(close, position):
            return position + 2
        match = _TOKEN.match(template, position)
        assert match is not None
        depth += (match.group() in "{[(") - (match.group() in "}])" and depth > 0)
        position = match.end()
    return len(template)


class Path(NamedTuple):
    """A dotted path in an expression: its parts, and where its tokens start and end."""

    parts: tuple[str, ...]
    start: int
    end: int


def paths(items: list[Token]) -> Iterator[Path]:
    """Every path that starts at a name: `a.b`, `a["b"].c`; a computed index ends it."""
    position = 0
    while position < len(items):
        token = items[position]
        if token.kind == "name" and _starts_path(items, position):
            path = _read_path(items, position)
            yield path
            position = path.end
        else:
            position += 1


def _starts_path(items: list[Token], position: int) -> bool:
    if items[position].text in KEYWORDS:
        return False
    before = _neighbour(items, position, -1)
    if before.text in {".", "|"} or (before.kind == "name" and before.text == "is"):
        return False
    if before.text == "not" and _is_test(items, position):
        return False
    return _neighbour(items, position, 1).text != "="


def _is_test(items: list[Token], position: int) -> bool:
    """True for the name in `x is not name`."""
    before = _skip_space(items, position, -1)
    return items[before].text == "not" and _neighbour(items, before, -1).text == "is"


def _neighbour(items: list[Token], position: int, step: int) -> Token:
    at = _skip_space(items, position, step)
    return items[at] if 0 <= at < len(items) else Token("op", "")


def _skip_space(items: list[Token], position: int, step: int) -> int:
    position += step
    while 0 <= position < len(items) and items[position].kind == "space":
        position += step
    return position


def _read_path(items: list[Token], position: int) -> Path:
    parts, at = [items[position].text], position + 1
    while at < len(items):
        text = items[at].text
        following = items[at + 1] if at + 1 < len(items) else Token("op", "")
        if text == "." and following.kind in {"name", "number"}:
            parts.append(following.text)
            at += 2
        elif text == "[" and _is_constant_index(items, at):
            parts.append(following.text[1:-1] if following.kind == "string" else following.text)
            at += 3
        else:
            break
    if len(parts) > 1 and _neighbour(items, at - 1, 1).text == "(":
        parts.pop()  # a method, not a part
        at -= 2
    return Path(tuple(parts), position, at)


def _is_constant_index(items: list[Token], at: int) -> bool:
    if at + 2 >= len(items) or items[at + 2].text != "]":
        return False
    index = items[at + 1]
    return index.kind == "number" or (index.kind == "string" and "\\" not in index.text)

"""How much work a template can be, told before it runs.

The template engine counts its instructions and stops when its fuel is spent, but one instruction
may copy a gigabyte, and nothing can stop it once it runs. So this module says how large a value can
become in a template at most (from its tokens, and from the size of the values that it sees), and
how many instructions may then run in this process. A text of which nothing can be said (names that
grow, text that is repeated, filters whose arguments are values) runs in a child process
(sandbox.py), and so does one that runs out of these instructions.

It errs on one side only: calling light work heavy costs a millisecond, calling heavy work light
would cost the process. What it does not know is heavy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from llm_orchestrator.language import lexer
from llm_orchestrator.language.lexer import Token

FUELS = (20_000, 4_000, 800, 100)
"""Instructions that may run in this process, most first."""
UNITS_MAX = 20_000_000
"""Units (about 10 ns, one character touched) that one text may take in this process."""
_STEPS = tuple((fuel, UNITS_MAX // fuel) for fuel in FUELS)
_VALUE_UNITS = 32
"""What a value takes besides its characters."""

_GROWTH: Mapping[str, int] = {
    name: growth
    for growth, words in (
        (1, "abs bool count d default first float int last length max min pluralize reverse"),
        (1, "round safe string sum trim truncate"),
        (
            2,
            "capitalize chain join lower map reject rejectattr replace select selectattr striptags",
        ),
        (2, "title upper zip"),
        (8, "dictsort e escape items lines tojson"),
        (12, "urlencode"),
        (24, "groupby list sort split unique"),
    )
    for name in words.split()
}
"""How much larger a filter's result may be, or how much dearer than one look at each character."""
_INDENTS = 100
"""Blanks that `tojson` may put before each value."""
_BY_TEXT = frozenset({"join", "replace", "select", "selectattr", "reject", "rejectattr", "trim"})
"""Each character or item may meet the whole of an argument."""
_ANY_ARGUMENT = frozenset({"chain", "d", "default", "zip"})
_METHODS = frozenset(
    {"get", "items", "keys", "values", "strip", "lstrip", "rstrip", "lower", "upper", "cycle"}
    | {"startswith", "endswith", "title", "capitalize", "isdigit", "isnumeric"}
)
_STATEMENTS = frozenset({"if", "elif", "else", "endif", "for", "endfor", "raw", "endraw"})
_OPERATORS = frozenset({"and", "or", "not", "in", "is", "if", "elif", "else"})
_CONSTANTS = frozenset({"true", "false", "none", "True", "False", "None"})
_NUMERIC = frozenset({"abs", "count", "d", "default", "float", "int", "length", "round"})
_RANGE_MAX = 100_000
"""How many numbers the engine lets `range` make."""


class Cost(NamedTuple):
    """What a text alone tells."""

    growth: int = 0
    """How much larger than all it sees a value may become; 0: nothing bounds it."""
    length: int = 0
    """Units of the text itself."""
    is_product: bool = False
    """It has `*`, which also repeats text: light only if all it sees are numbers."""

    def fuel(self, values: dict[str, Any]) -> int:
        """How many instructions may run in this process with these values; 0: none."""
        if not self.growth or (self.is_product and _holds_text(values)):
            return 0
        units = self.growth * (self.length + measure(values))
        for fuel, units_max in _STEPS:
            if units <= units_max:
                return fuel
        return 0


def cost_of(source: str) -> Cost:
    """The cost of a template's text (an expression is one in braces)."""
    blocks = [
        (piece.opening, [token for token in lexer.tokens(piece.inner) if token.kind != "space"])
        for piece in lexer.split(source)
        if piece.opening in {"{{", "{%"}
    ]
    is_product = any(token.text in {"*", "**"} for _, items in blocks for token in items)
    loops, growth, units = 1, 1, len(source)
    for opening, items in blocks:
        word = items[0].text if opening == "{%" and items else ""
        grown = 0 if word and word not in _STATEMENTS else _growth(items, is_product=is_product)
        if word == "for":
            loops *= grown  # what a loop goes over may be made of what the loop around it made
        else:
            growth = max(growth, grown)
        if any(token.text == "range" for token in items):
            units += _VALUE_UNITS * _range_max(items)
        if not grown or loops * growth * units > UNITS_MAX:
            return Cost()
    return Cost(loops * growth, units, is_product)


def _range_max(items: Sequence[Token]) -> int:
    """How many numbers `range` may make in a block."""
    counts = [0]
    for at, token in enumerate(items):
        if token.text == "range":
            given = [each for each in _arguments(items[at + 1 :]) if each.text not in {",", "-"}]
            is_known = all(each.text.isdecimal() and len(each.text) < 7 for each in given)
            counts.append(sum(int(each.text) for each in given) if is_known else _RANGE_MAX)
    return sum(counts)


def measure(values: dict[str, Any]) -> int:
    """The units of plain JSON; stops counting where it is heavy anyway."""
    units = 0
    left: list[Any] = [values]
    while left and units < UNITS_MAX:
        inner = left.pop()
        units += _VALUE_UNITS * len(inner)
        if type(inner) is dict:
            for key in inner:
                units += len(key)
            inner = inner.values()
        for value in inner:
            kind = type(value)
            if kind is str:
                units += len(value)
            elif kind is dict or kind is list:
                left.append(value)
            elif kind is int:
                units += value.bit_length() >> 2
    return units


def _holds_text(values: Any) -> bool:
    """True if there is anything in it but numbers under names."""
    if isinstance(values, Mapping):
        return any(map(_holds_text, values.values()))
    return not (values is None or isinstance(values, int | float))


def _growth(items: Sequence[Token], *, is_product: bool) -> int:
    """How much larger than all that a block sees a value in it may become; 0: nothing bounds it."""
    growth, joined, literal_to = 1, 1, 0
    for at, token in enumerate(items):
        before = items[at - 1] if at else Token("op", "")
        if is_product and not _is_numeric(token, before):
            return 0
        if token.kind == "name" and before.text == "|":
            arguments = _arguments(items[at + 1 :])
            grown = _filter(token.text, arguments)
            if not grown:
                return 0
            growth *= grown
            if _are_literal(arguments):
                literal_to = at + 2 + len(arguments)
        elif token.text == "(" and not _is_call_bounded(items, at):
            return 0
        joined += at >= literal_to and token.text in {"~", "+", ",", "("}
    return growth * joined


def _is_numeric(token: Token, before: Token) -> bool:
    """True for what, beside `*`, makes numbers out of numbers."""
    if before.text == "|":
        return token.text in _NUMERIC
    if token.text == "(":
        return before.kind != "name" or before.text in _NUMERIC | _OPERATORS
    return token.kind != "string" and token.text not in {"~", "[", "{", "for"}


def _filter(name: str, arguments: Sequence[Token]) -> int:
    """By how much a filter multiplies; 0: nothing bounds it."""
    growth = _GROWTH.get(name, 0)
    if name == "map" and arguments and arguments[0].kind == "string":
        growth = 2 * _filter(arguments[0].text[1:-1], arguments[1:])
    if name not in _ANY_ARGUMENT and not _are_literal(arguments):
        return 0
    if name in _BY_TEXT:
        growth *= max((len(token.text) for token in arguments), default=1)
    return growth * (_INDENTS if name == "tojson" and arguments else 1)


def _are_literal(arguments: Sequence[Token]) -> bool:
    for at, token in enumerate(arguments):
        is_keyword = at + 1 < len(arguments) and arguments[at + 1].text == "="
        if token.kind == "name" and token.text not in _CONSTANTS and not is_keyword:
            return False
    return True


def _is_call_bounded(items: Sequence[Token], at: int) -> bool:
    """True for the bracket at `at` if it only groups, or if what it calls makes nothing large."""
    before = [items[place].text if place >= 0 else "" for place in (at - 1, at - 2, at - 3)]
    kind = items[at - 1].kind if at else "op"
    if kind != "name":
        return kind == "op" and before[0] not in {")", "]"}
    if before[1] == ".":
        return before[0] in _METHODS
    is_test = before[1] == "is" or before[1:] == ["not", "is"]
    return before[1] == "|" or is_test or before[0] in _OPERATORS | {"range"}


def _arguments(items: Iterable[Token]) -> list[Token]:
    """What stands in the bracket with which the items begin, if they do."""
    found: list[Token] = []
    depth = 0
    for token in items:
        depth += (token.text in {"(", "[", "{"}) - (token.text in {")", "]", "}"})
        if depth <= 0:
            break
        found.append(token)
    return found[1:]

"""Reads what people wrote as what the schema says: other names, short forms, the earlier system.

Every rule here is a rewrite at load, of keys or of the text of templates, and afterwards the
definition holds only the one form that the engine knows. A value never enters an expression's text:
`{{ x }} == 'v'` becomes the expression `x == 'v'`. Nothing here decides whether a file is right;
what it does not understand it leaves for validation to name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llm_orchestrator.errors import TemplateError
from llm_orchestrator.language import handlebars, lexer
from llm_orchestrator.language.lexer import is_template
from llm_orchestrator.language.templates import Templates
from llm_orchestrator.model import Json

ROOTS = frozenset({"inputs", "steps", "outputs", "run", "secrets"})
LOOP_NAMES = ("iteration", "previous")

Loc = tuple[str | int, ...]

_COMPARISON = re.compile(
    r"^\s*\{\{(?P<left>.+?)\}\}\s*(?P<op>==|!=)\s*(?P<right>[^{}]*?)\s*$", re.DOTALL
)
_QUOTED_TEMPLATE = re.compile(r"(['\"])\s*\{\{(.+?)\}\}\s*\1", re.DOTALL)
_WORD = re.compile(r"^[\w.-]+$")
_DURATION = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h)?\s*$")
_UNIT_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000}


@dataclass(frozen=True)
class Names:
    """What the file declares, for reading names in it."""

    steps: Mapping[str, tuple[str, ...]]
    """Step id to the names that its `output` binds, in file order."""
    inputs: frozenset[str] | None
    """None: no `inputs` section, so any bare name may be an input."""
    local: frozenset[str] = field(default=frozenset())
    """Names that a map or loop around gives: item, index, iteration, previous."""

    def within(self, *local: str) -> Names:
        """The same, with further local names."""
        return Names(self.steps, self.inputs, self.local | set(local))


class Rewriter:
    """Rewrites the text of templates and expressions."""

    def __init__(self, templates: Templates) -> None:
        self._templates = templates

    def value(self, value: Json, names: Names) -> Json:
        """Every template inside a JSON value, rewritten."""
        if isinstance(value, str):
            return self.template(value, names) if is_template(value) else value
        if isinstance(value, Mapping):
            return {key: self.value(item, names) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(item, names) for item in value]
        return value

    def template(self, text: str, names: Names) -> str:
        """One template in our syntax, with the names that the engine knows."""
        text = handlebars.translate(text)
        try:
            roots = {path[0] for path in self._templates.references(text)}
        except TemplateError:
            return text  # validation says what is wrong with it
        return "".join(self._piece(piece, roots, names) for piece in lexer.split(text))

    def expression(self, text: str, names: Names) -> str:
        """A condition or any other expression; templates inside it become parts of it."""
        text = unwrap(handlebars.translate(text))
        try:
            roots = {path[0] for path in self._templates.references(text, is_expression=True)}
        except TemplateError:
            return text
        return self._names(text, roots, names)

    def _piece(self, piece: lexer.Piece, roots: set[str], names: Names) -> str:
        if piece.opening not in {"{{", "{%"}:
            return piece.text
        return piece.opening + self._names(piece.text[2:-2], roots, names) + piece.text[-2:]

    def _names(self, text: str, roots: set[str], names: Names) -> str:
        items = lexer.tokens(text)
        out: list[str] = []
        position = 0
        for path in lexer.paths(items):
            if path.start < position:
                continue  # part of a dashed name
            out.extend(token.text for token in items[position : path.start])
            written, position = _rewrite_path(items, path, roots=roots, names=names)
            out.append(written)
        out.extend(token.text for token in items[position:])
        return "".join(out)


def _rewrite_path(
    items: list[lexer.Token], path: lexer.Path, *, roots: set[str], names: Names
) -> tuple[str, int]:
    """One path as it should read, and the position behind it."""
    root, end = path.parts[0], path.end
    text = "".join(token.text for token in items[path.start : end])
    if root in names.local or root not in roots:
        return text, end
    if root == "input":
        root, text = "inputs", f"inputs{text[5:]}"
    if root in {"steps", "outputs", "inputs"}:
        return _join_dashes(items, text, end=end, known=_dashed(root, names))
    is_call = end < len(items) and items[end].text == "("
    if names.inputs is None and root not in ROOTS and not is_call:
        return f"inputs.{text}", end
    return text, end


def _dashed(root: str, names: Names) -> set[str]:
    if root == "inputs":
        return {name for name in names.inputs or () if "-" in name}
    ids = {step for step in names.steps if not step.isidentifier()}
    return ids | {name for bound in names.steps.values() for name in bound if "-" in name}


def _join_dashes(
    items: list[lexer.Token], text: str, *, end: int, known: set[str]
) -> tuple[str, int]:
    """`steps.my-step.out` is a subtraction to the engine: write `steps["my-step"].out`."""
    while known and end < len(items) and items[end].text == "-":
        head, dot, word = text.rpartition(".")
        found, position, joined = "", end, word
        while position + 1 < len(items) and items[position].text == "-":
            if items[position + 1].kind not in {"name", "number"}:
                break
            joined += f"-{items[position + 1].text}"
            position += 2
            if joined in known:
                found, end = joined, position
        if not dot or not found:
            break
        text = f'{head}["{found}"]'
        while end + 1 < len(items) and items[end].text == "." and items[end + 1].kind == "name":
            text += f".{items[end + 1].text}"
            end += 2
    return text, end


def unwrap(text: str) -> str:
    """An expression out of text that may have templates where the expression has values.

    The earlier system rendered a condition and compared text with text: a bare word or a number on
    the right of `==` is text, too.
    """
    if not is_template(text):
        return text.strip()
    match = _COMPARISON.match(text)
    if match:
        left, right = match["left"].strip(), match["right"]
        if right[:1] in {"'", '"'}:
            return f"{_group(left)} {match['op']} {right}"
        if _WORD.match(right):
            lower = "|lower" if right in {"true", "false"} else ""
            return f"{_group(left)}|string{lower} {match['op']} '{right}'"
    text = _QUOTED_TEMPLATE.sub(lambda m: f"({m.group(2).strip()})|string", text)
    pieces = lexer.split(text)
    if any(piece.opening == "{%" for piece in pieces):
        return text.strip()
    solid = [piece for piece in pieces if piece.text.strip()]
    if len(solid) == 1:
        return solid[0].inner.strip()
    return "".join(_group(p.inner.strip()) if p.opening == "{{" else p.text for p in pieces).strip()


def _group(expression: str) -> str:
    return expression if re.fullmatch(r"[\w.\[\]'\"-]+", expression) else f"({expression})"


STEP_ALIASES = {
    "when": "condition",
    "when_skipped": "on_skipped",
}
RETRY_ALIASES = {
    "strategy": "backoff",
    "initial_delay": "initial_delay_ms",
    "max_delay": "max_delay_ms",
    "backoff_multiplier": "multiplier",
}


def rename(
    data: Mapping[str, Any], aliases: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The data under the schema's keys, and for each renamed key the one that was written."""
    out: dict[str, Any] = {}
    written: dict[str, str] = {}
    for key, value in data.items():
        name = aliases.get(key, key)
        if name != key and name in data and aliases.get(name, name) == name:
            name = key  # both were written; the schema refuses the alias
        elif name != key:
            written[name] = key
        out[name] = value
    return out, written


def read_retry(data: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """A retry section, also with the keys of the earlier system's README."""
    out, written = rename(data, RETRY_ALIASES)
    for key in ("initial_delay_ms", "max_delay_ms"):
        if key in written:
            out[key] = _milliseconds(out[key])
    if isinstance(out.get("jitter"), bool):
        out["jitter"] = 0.25 if out["jitter"] else 0.0
    if isinstance(out.get("retry_on"), str):
        out["retry_on"] = [out["retry_on"]]
    return out, written


def _milliseconds(value: Any) -> Any:
    """`100ms`, `1s`, `2m`; a number alone is milliseconds, as in the earlier README."""
    match = _DURATION.match(value) if isinstance(value, str) else None
    if match is None:
        return value
    return round(float(match.group(1)) * _UNIT_MS[match.group(2) or "ms"])


def read_step(data: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """A step's keys as the schema has them. Nested steps and template text stay as they are."""
    kind = data.get("type")
    aliases = dict(STEP_ALIASES)
    if kind == "branch":
        aliases["condition"] = "switch"
    if kind == "map":
        aliases.update({"as": "item"})
    out, written = rename(data, aliases)
    for key in ("depends_on", "output"):
        if isinstance(out.get(key), str):
            out[key] = [out[key]]
    if isinstance(out.get("condition"), bool):
        out["condition"] = "true" if out["condition"] else "false"
    if isinstance(out.pop("run_if_skipped", None), bool):
        out.setdefault("on_skipped", "run" if data["run_if_skipped"] else "skip")
    fallback = re.fullmatch(r"fallback\s+(\S+)", str(out.get("on_error")))
    if fallback:
        out["on_error"] = {"fallback": fallback.group(1)}
    if kind == "llm" and isinstance(out.get("fallback"), list):
        out["fallback"] = [_alternative(item) for item in out["fallback"]]
    if kind == "transform" and "function" not in out and "expression" in out:
        out["function"] = "expression"
    return out, written


def _alternative(item: Any) -> Any:
    """`anthropic/claude-x` as provider and model."""
    if not isinstance(item, str):
        return item
    provider, _, model = item.partition("/")
    return {"provider": provider, "model": model} if model else {"provider": provider}


def read_transform_inputs(inputs: Any, step_id: str, names: Names) -> Any:
    """Bare names in `inputs` as templates, under their own names where these are distinct."""
    if not isinstance(inputs, list):
        if isinstance(inputs, str) and not is_template(inputs):
            inputs = [inputs]
        elif not isinstance(inputs, Mapping):
            return inputs
    if isinstance(inputs, Mapping):
        return inputs
    values = [_find_name(item, step_id, names) for item in inputs]
    keys = [_key(item) for item in inputs]
    if all(keys) and len(set(keys)) == len(keys):
        return dict(zip(keys, values, strict=True))
    return values


def _key(item: Any) -> str:
    if not isinstance(item, str):
        return ""
    path = unwrap(item)
    return path.rpartition(".")[2] if re.fullmatch(r"[\w.-]+", path) else ""


def _find_name(item: Any, step_id: str, names: Names) -> Any:
    if not isinstance(item, str) or is_template(item):
        return item
    if not re.fullmatch(r"[A-Za-z_][\w-]*", item):
        return "{{ " + item + " }}"
    if item in names.local or item in (names.inputs or ()):
        return "{{ " + (item if item in names.local else _subscript("inputs", item)) + " }}"
    holders = [step for step, bound in names.steps.items() if item in bound and step != step_id]
    earlier = [step for step in holders if _is_before(step, step_id, names)]
    found = earlier if len(earlier) == 1 else holders
    if len(found) == 1:
        return "{{ " + _subscript(_subscript("steps", found[0]), item) + " }}"
    return "{{ " + (_subscript("inputs", item) if names.inputs is None else item) + " }}"


def _is_before(step: str, other: str, names: Names) -> bool:
    order = list(names.steps)
    return order.index(step) < order.index(other) if other in order else True


def _subscript(base: str, name: str) -> str:
    return f"{base}.{name}" if name.isidentifier() else f'{base}["{name}"]'

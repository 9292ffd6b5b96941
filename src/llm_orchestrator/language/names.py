"""What a template may see of the names around it: looking up, copying, and saying what is missing.

Nothing here evaluates text. Invariant: nothing that is handed in is changed or given away; `prune`
returns copies of just the parts that a plan mentions.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llm_orchestrator.model import Json

DEPTH_MAX = 100
NEAR_LENGTH_MAX = 100
NEAR_NAMES_MAX = 100
_DICT_METHODS = frozenset(name for name in dir(dict) if not name.startswith("_"))
_SCALARS = frozenset({str, int, float, bool, type(None)})

Path = tuple[str, ...]
Plan = Mapping[str, "Plan | None"]
"""Which parts of the names a text mentions; None: the whole of that part."""


class NotJson(ValueError):
    """A value that no JSON can hold: a method, infinity, something without an end."""


def nearest(name: str, valid: Iterable[object], cutoff: float = 0.6) -> str:
    """`; did you mean ...` with the closest valid name, or nothing. Looks at some of many."""
    if len(name) > NEAR_LENGTH_MAX:
        return ""
    some = [text for text in map(str, valid) if len(text) <= NEAR_LENGTH_MAX]
    if len(some) > NEAR_NAMES_MAX:
        some = sorted(text for text in some if text[:2] == name[:2])[:NEAR_NAMES_MAX]
    close = difflib.get_close_matches(name, some, n=1, cutoff=cutoff)
    return f"; did you mean `{close[0]}`?" if close else ""


def make_plan(paths: Iterable[Path]) -> dict[str, Any]:
    """The paths as a tree. A path that ends in a method of dict needs the whole dict."""
    plan: dict[str, Any] = {}
    for path in paths:
        at = plan
        for position, part in enumerate(path):
            is_last = position == len(path) - 1 or path[position + 1] in _DICT_METHODS
            if is_last or at.get(part, at) is None:
                at[part] = None
                break
            at = at.setdefault(part, {})
    return plan


def prune(plan: Plan, names: Mapping[str, Json]) -> dict[str, Json]:
    """A copy of just the parts of `names` that the plan mentions; missing parts stay missing."""
    pruned: dict[str, Json] = {}
    for part, inner in plan.items():
        if part in names:
            value = names[part]
            if type(value) in _SCALARS:
                pruned[part] = value
            elif inner is not None and (type(value) is dict or isinstance(value, Mapping)):
                pruned[part] = prune(inner, value)
            else:
                pruned[part] = copy(value)
    return pruned


def copy(value: Json) -> Json:
    """A deep copy of plain JSON."""
    kind = type(value)
    if kind in _SCALARS:
        return value
    if kind is dict:
        return {key: item if type(item) in _SCALARS else copy(item) for key, item in value.items()}
    if kind is list:
        return [item if type(item) in _SCALARS else copy(item) for item in value]
    if isinstance(value, Mapping):
        return {key: copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [copy(item) for item in value]
    return value


def is_deep(value: Json) -> bool:
    """True for lists and mappings in each other deeper than DEPTH_MAX."""
    level, depth = [value], 0
    while level and depth <= DEPTH_MAX:
        level = [
            item
            for inner in level
            if isinstance(inner, Mapping | list | tuple)
            for item in (inner.values() if isinstance(inner, Mapping) else inner)
            if type(item) not in _SCALARS
        ]
        depth += 1
    return bool(level)


def to_json(value: Any, depth: int = 0) -> Json:
    """An expression's result as plain JSON. Raises NotJson."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise NotJson(f"{value} is no JSON number")
        return value
    if isinstance(value, str):
        return str(value)
    if depth > DEPTH_MAX:
        raise NotJson(f"the value is nested deeper than {DEPTH_MAX}")
    if isinstance(value, Mapping):
        return {str(key): to_json(item, depth + 1) for key, item in value.items()}
    if callable(value) or not isinstance(value, Iterable):
        raise NotJson("the result is a method, not a value: a name may be missing, or its `()`")
    return [to_json(item, depth + 1) for item in value]


def step_into(value: Any, part: str) -> tuple[bool, Any]:
    """Whether `value` has `part` (a key, or an index as text), and what stands there."""
    if type(value) is dict or isinstance(value, Mapping):
        return part in value, value.get(part)
    if isinstance(value, list | tuple) and part.isdecimal() and int(part) < len(value):
        return True, value[int(part)]
    return False, None


def explain_missing(paths: Sequence[Path], names: Mapping[str, Json]) -> str | None:
    """Which of the paths is not there, where it ends, and what stands nearest to it."""
    for path in paths:
        value: Any = names
        for depth, part in enumerate(path):
            is_there, inner = step_into(value, part)
            if not is_there:
                where = f" in `{'.'.join(path[:depth])}`" if depth else ""
                hint = nearest(part, value) if isinstance(value, Mapping) else ""
                return f"`{'.'.join(path)}` is not there (no `{part}`{where}){hint}"
            value = inner
    return None

"""Any Python value as JSON: what a step returns is paid for, so nothing it returns may be refused.

`default` knows the ordinary values that have one obvious form; `escape` takes all others, and
never raises for what a foreign object does when it is looked at. What JSON lacks becomes an object
with one key that starts with `$`; an object that looks like one is wrapped, so `unescape` cannot
mistake it.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import enum
import math
from collections.abc import Mapping

from llm_orchestrator.model import Json

_DEPTH_MAX = 200
_INT_BITS_MAX = 2_000
"""Python may refuse to write a longer number in decimal (`sys.set_int_max_str_digits`)."""
_REPR_CHARACTERS_MAX = 10_000


def default(value: object) -> object:
    """JSON for the ordinary Python values that have one obvious form."""
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    dump = getattr(value, "model_dump", None)  # a pydantic model, without importing pydantic
    if callable(dump):
        return dump(mode="json")
    raise TypeError(f"{type(value).__name__} is not JSON")


def escape(value: object, depth: int = 0) -> object:
    """`value` as plain JSON. Never raises for its content."""
    if depth > _DEPTH_MAX:
        return {"$repr": _safe_repr(value)}
    try:
        return _escape(value, depth)
    except Exception:  # noqa: BLE001, whatever a foreign object does when asked, its repr is kept
        return {"$repr": _safe_repr(value)}


def _escape(value: object, depth: int) -> object:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return value if value.bit_length() <= _INT_BITS_MAX else {"$int": hex(value)}
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": float.__repr__(value)}
    if isinstance(value, bytes | bytearray | memoryview):
        return {"$bytes": base64.b64encode(bytes(value)).decode()}
    if isinstance(value, Mapping):
        return _escape_mapping(value, depth)
    if isinstance(value, list | tuple):
        return [escape(item, depth + 1) for item in value]
    if isinstance(value, set | frozenset):
        return [escape(item, depth + 1) for item in sorted(value, key=_safe_repr)]
    return escape(default(value), depth + 1)


def _escape_mapping(value: Mapping[object, object], depth: int) -> object:
    plain: dict[str, object] = {}
    for key, item in value.items():
        name = key if isinstance(key, str) else _name(key)
        while name in plain:  # 1 and "1" are two keys here, and one in JSON
            name += "'"
        plain[name] = escape(item, depth + 1)
    is_marker = len(plain) == 1 and next(iter(plain)).startswith("$")
    return {"$object": plain} if is_marker else plain


def _name(key: object) -> str:
    """A key in JSON's words, as the standard library writes it."""
    if key is None or isinstance(key, bool):
        return {None: "null", True: "true", False: "false"}[key]
    if isinstance(key, int) and key.bit_length() > _INT_BITS_MAX:
        return hex(key)
    return key.__repr__() if isinstance(key, int | float) else _safe_repr(key)


def _safe_repr(value: object) -> str:
    try:
        return repr(value)[:_REPR_CHARACTERS_MAX]
    except Exception:  # noqa: BLE001 - as above
        return f"<{type(value).__name__}>"


def unescape(value: Json) -> Json:
    """What a replay sees of an escaped value: text for bytes and foreign objects."""
    if isinstance(value, list):
        return [unescape(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        [(key, item)] = value.items()
        if key == "$float":
            return float(item)
        if key == "$int":
            return int(item, 16)
        if key in ("$bytes", "$repr"):
            return item
        if key == "$object":
            return {name: unescape(inner) for name, inner in item.items()}
    return {key: unescape(item) for key, item in value.items()}

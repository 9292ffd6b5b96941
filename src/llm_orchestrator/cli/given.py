"""What a command is given besides words: JSON (given, in a file, on stdin) and `name=value`."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from llm_orchestrator.errors import InputError
from llm_orchestrator.model import MICROSECONDS, Json

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def read_json(text: str, option: str) -> Json:
    """`JSON`, `@file` or `-` (stdin) as a value. Raises InputError that says where it is wrong."""
    where = option
    try:
        if text == "-":
            where, text = "stdin", sys.stdin.read()
        elif text.startswith("@"):
            where = text[1:]
            text = Path(where).read_text()
    except OSError as error:
        raise InputError(
            f"{option}: cannot read {where}: {error.strerror}", hint=f"ls -l '{where}'"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{option}: {where} is not UTF-8: {error.reason}") from error
    try:
        return json.loads(text)
    except RecursionError as error:
        raise InputError(f"{where}: nested too deeply") from error
    except ValueError as error:
        raise InputError(
            f"{where}: not JSON: {error}", hint=f'{option} \'{{"name": "value"}}\' or @FILE or -'
        ) from error


def read_pairs(pairs: Sequence[str], option: str) -> dict[str, str]:
    """`name=value` pairs as texts. Raises InputError for one without `=`."""
    values: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise InputError(f"{option} {pair!r} is no name=value", hint=f"{option} name=value")
        values[name] = value
    return values


def guess(text: str, kind: str | None = None) -> Json:
    """The value that `text` stands for. A workflow's own type decides; else JSON, else the text."""
    if kind == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def merge_inputs(
    whole: str | None, pairs: Sequence[str], kinds: Mapping[str, str] | None = None
) -> dict[str, Json]:
    """The inputs from `-i` and, over it, each `--input name=value`."""
    value = read_json(whole, "-i") if whole is not None else {}
    if not isinstance(value, dict):
        raise InputError(f"-i: inputs must be a JSON object, not {_kind(value)}")
    for name, text in read_pairs(pairs, "--input").items():
        value[name] = guess(text, (kinds or {}).get(name))
    return value


def read_ids(given: Sequence[str]) -> list[str]:
    """Ids as they were given; `-` stands for those on stdin. Each once, in order."""
    ids: dict[str, None] = {}
    for item in given:
        for one in sys.stdin.read().split() if item == "-" else [item]:
            ids[one] = None
    return list(ids)


def read_moment(text: str, option: str, *, now_us: int) -> int:
    """`90s`, `15m`, `2h` or `7d` ago, or an ISO 8601 time (UTC unless it says otherwise).

    Microseconds since the epoch. Raises InputError.
    """
    amount, unit = text[:-1], text[-1:]
    if amount.isdecimal() and unit in _UNITS_S:
        return now_us - int(amount) * _UNITS_S[unit] * MICROSECONDS
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError as error:
        raise InputError(
            f"{option} {text!r} is no time", hint=f"{option} 2h, or {option} 2026-01-31T12:00Z"
        ) from error
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return int(moment.timestamp() * MICROSECONDS)


def _kind(value: Json) -> str:
    names = {list: "a list", str: "a text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")

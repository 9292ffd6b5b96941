"""Whether a schedule's cron line and time zone can be used. Computes no time; checks text only."""

from __future__ import annotations

import re
from zoneinfo import ZoneInfo, available_timezones

from llm_orchestrator.language.names import nearest

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_FIELDS = (
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of month", 1, 31, ()),
    ("month", 1, 12, _MONTHS),
    ("day of week", 0, 7, _DAYS),
)
MACROS = ("@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly")
_PART = re.compile(r"^(?:\*|(\w+)(?:-(\w+))?)(?:/(\d+))?$")


def check_cron(text: str) -> str | None:
    """Why a cron line (five fields, or a macro such as @daily) does not parse, or None."""
    if text.startswith("@"):
        return None if text in MACROS else f"unknown schedule `{text}`{nearest(text, MACROS)}"
    fields = text.split()
    if len(fields) != len(_FIELDS):
        return f"`cron` needs five fields (minute hour day month weekday), not {len(fields)}"
    for value, (name, low, high, words) in zip(fields, _FIELDS, strict=True):
        for part in value.split(","):
            match = _PART.match(part.lower())
            numbers = (
                [_number(word, low, words) for word in match.groups()[:2] if word]
                if match
                else [-1]
            )
            is_step = match is not None and match.group(3) is not None
            if any(not low <= number <= high for number in numbers) or numbers != sorted(numbers):
                return f"`cron`: {part!r} is no {name} ({low} to {high})"
            if is_step and int(match.group(3)) == 0:  # type: ignore[union-attr]
                return f"`cron`: {part!r} has a step of 0"
    return None


def _number(word: str, low: int, words: tuple[str, ...]) -> int:
    if word in words:
        return words.index(word) + low
    return int(word) if word.isdecimal() and len(word) < 4 else -1


def check_timezone(name: str) -> str | None:
    """Why a time zone is unknown, or None. Without zone data on the machine all names pass."""
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        zones = available_timezones()
        return f"unknown time zone `{name}`{nearest(name, zones)}" if zones else None
    return None

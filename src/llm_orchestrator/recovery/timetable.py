"""When backups are made: a cron line, in the words of cron, of systemd and of people.

systemd knows no `either the day of the month or the day of the week`, which is what cron means when
both are given: such a line becomes two calendar lines. Days of the week are written out, because
systemd's week begins on Monday and cron's on Sunday.
"""

from __future__ import annotations

import itertools
import re

from llm_orchestrator.engine.schedule import MACROS, times_after
from llm_orchestrator.errors import ConfigError
from llm_orchestrator.language.schedule import check_cron
from llm_orchestrator.model import MICROSECONDS

DAILY = "0 2 * * *"
HOURLY = "0 * * * *"
HOUR_S = 3_600
_DAYS = ("Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_PART = re.compile(r"(\*|\w+)(?:-(\w+))?(?:/(\d+))?")


def default_cron(*, has_archive: bool) -> tuple[str, str]:
    """The cron line when none is given, and why it is that one."""
    if has_archive:
        return DAILY, "daily: the archive keeps what comes between two backups"
    return HOURLY, (
        "hourly: nothing else keeps what comes between two backups, and a daily one could lose"
        " a day (set archive_place, or Barman, for less)"
    )


def plain_cron(text: str) -> str:
    """Five fields. Raises ConfigError for what is no cron line."""
    flaw = check_cron(text)
    if flaw is not None:
        raise ConfigError(flaw, hint=f'five fields, as in "{DAILY}"')
    return " ".join(MACROS.get(text, text).split())


def longest_gap_s(cron: str, now_us: int) -> int:
    """The longest time between two of the next hundred planned moments, seconds."""
    times = times_after(plain_cron(cron), "UTC", now_us)
    found = [next(times) for _ in range(101)]
    return max(b - a for a, b in itertools.pairwise(found)) // MICROSECONDS


def on_calendar(cron: str) -> list[str]:
    """The same moments as systemd's `OnCalendar=` lines, one or two. Raises ConfigError."""
    minute, hour, day, month, weekday = plain_cron(cron).lower().split()
    time = f"{_numbers(hour, 0)}:{_numbers(minute, 0)}:00"
    months = _numbers(month, 1)
    days, names = _numbers(day, 1), _weekdays(weekday)
    by_day, by_name = f"*-{months}-{days} {time}", f"{names} *-{months}-* {time}"
    if names == "":
        return [by_day]
    if day == "*":
        return [by_name]
    if day.startswith("*") or weekday.startswith("*"):
        return [f"{names} {by_day}"]  # cron: a field that begins with a star restricts the other
    return [by_day, by_name]


def _numbers(field: str, low: int) -> str:
    """A field of numbers (or names of months), `low` being the least of its kind."""
    return ",".join(_span(part, low) for part in field.split(","))


def _span(part: str, low: int) -> str:
    first, last, step = _parsed(part)
    if first == "*":
        return f"{low:02d}/{step}" if step > 1 else "*"
    begin = f"{_number(first):02d}"
    if last:
        begin += f"..{_number(last):02d}"
    return f"{begin}/{step}" if step > 1 else begin


def _weekdays(field: str) -> str:
    """Names of days in cron's order; "" for all of them."""
    found: set[int] = set()
    for part in field.split(","):
        first, last, step = _parsed(part)
        begin = 0 if first == "*" else _day(first)
        is_open = first == "*" or (step > 1 and not last)
        end = 6 if is_open else _day(last or first)
        found |= {day % 7 for day in range(begin, end + 1, step)}
    return "" if len(found) == len(_DAYS) else ",".join(_DAYS[day] for day in sorted(found))


def _parsed(part: str) -> tuple[str, str, int]:
    match = _PART.fullmatch(part)
    assert match is not None, part  # check_cron has seen it
    return match[1], match[2] or "", int(match[3] or 1)


def _number(word: str) -> int:
    return _MONTHS.index(word) + 1 if word in _MONTHS else int(word)


def _day(word: str) -> int:
    return int(word) if word.isdecimal() else [day.lower() for day in _DAYS].index(word)

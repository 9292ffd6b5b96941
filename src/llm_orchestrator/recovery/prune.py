"""Which backups go, and why each of the others stays. `plan` is pure; `execute` removes.

A backup stays if anything says so: it is the newest, or the newest in the second place (uploads may
fail for long), the last proved one, younger than `days`, one of the last `last`, the newest of one
of the last `daily` days, `weekly` weeks (from Monday) or `monthly` months that have one (in UTC),
locked by its place, or nobody knows when it was made. All else goes. A folder is one store's: of
two stores' backups in it, the newest would be one store's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from llm_orchestrator.errors import ConfigError, Denied, OperatorError
from llm_orchestrator.model import MICROSECONDS
from llm_orchestrator.recovery.catalogue import Item
from llm_orchestrator.recovery.pack import explained
from llm_orchestrator.recovery.places import Place
from llm_orchestrator.recovery.places_folder import sync_folder

_DAY_US = 86_400 * MICROSECONDS


class Policy(NamedTuple):
    """What stays. 0 switches a rule off."""

    days: int = 30
    last: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0


class Verdict(NamedTuple):
    """What becomes of one backup."""

    item: Item
    is_kept: bool
    why: str


class Removed(NamedTuple):
    """What came of removing."""

    verdicts: Sequence[Verdict]
    trouble: Sequence[str]
    """Files that could not be removed, and why."""


def plan(
    items: Sequence[Item],
    *,
    now_us: int,
    policy: Policy,
    proved: str = "",
    locked: Collection[str] = (),
) -> list[Verdict]:
    """A verdict for each, newest first. `proved` is the last proved one's id.

    Raises ConfigError when the policy
    says nothing at all, or less than nothing.
    """
    if min(policy) < 0 or max(policy) == 0:
        raise ConfigError(
            "a policy that keeps nothing", hint="set backup_keep_days or backup_keep_last"
        )
    newest_first = sorted(items, key=lambda item: (item.made_at_us, item.backup_id), reverse=True)
    reasons = _reasons(newest_first, now_us, policy)
    found = []
    for number, item in enumerate(newest_first):
        why = reasons.get(item.backup_id, "")
        if item.backup_id in locked:
            why = "locked by its place"
        if item.backup_id == proved:
            why = "the last proved one"
        if number == 0:
            why = "the newest"
        found.append(Verdict(item, bool(why), why or _gone(item, now_us, policy)))
    return found


def _gone(item: Item, now_us: int, policy: Policy) -> str:
    days = (now_us - item.made_at_us) // _DAY_US
    limit = f"more than {policy.days}" if policy.days else "and nothing keeps it"
    return f"{days} days old, {limit}"


def _reasons(items: Sequence[Item], now_us: int, policy: Policy) -> dict[str, str]:
    """Why backups stay, by id; the first reason counts."""
    found: dict[str, str] = {}
    for item in items:
        if item.is_remote:
            found[item.backup_id] = "the newest in the second place"
            break
    for item in items:
        if not item.made_at_us:
            found.setdefault(item.backup_id, "nobody knows when it was made")
        elif now_us - item.made_at_us <= policy.days * _DAY_US and policy.days:
            found.setdefault(item.backup_id, f"younger than {policy.days} days")
        elif item.made_at_us > now_us:
            found.setdefault(item.backup_id, "its moment lies ahead")
    for item in items[: policy.last]:
        found.setdefault(item.backup_id, f"one of the last {policy.last}")
    for limit, word, period in _periods(policy):
        seen: set[str] = set()
        for item in items:
            name = period(datetime.fromtimestamp(item.made_at_us / MICROSECONDS, UTC))
            if name not in seen and len(seen) < limit:
                seen.add(name)
                found.setdefault(item.backup_id, f"the newest of {word} {name}")
    return found


def _periods(policy: Policy) -> Iterator[tuple[int, str, Callable[[datetime], str]]]:
    yield policy.daily, "day", lambda moment: f"{moment:%Y-%m-%d}"
    yield policy.weekly, "week", lambda moment: f"{moment:%G-W%V}"
    yield policy.monthly, "month", lambda moment: f"{moment:%Y-%m}"


async def execute(verdicts: Sequence[Verdict], place: Place | None) -> Removed:
    """Remove what is not kept, here and in `place`, oldest first. What is locked there stays."""
    trouble: list[str] = []
    done: list[Verdict] = []
    for verdict in sorted(verdicts, key=lambda each: each.item.made_at_us):
        if not verdict.is_kept:
            try:
                await _remove(verdict.item, place)
            except Denied as error:
                verdict = verdict._replace(is_kept=True, why=error.message)
            except OperatorError as error:
                trouble.append(error.message)
                verdict = verdict._replace(is_kept=True, why=error.message)
        done.append(verdict)
    return Removed(done[::-1], trouble)


async def _remove(item: Item, place: Place | None) -> None:
    """The far one first: what is locked there is kept here too."""
    if item.is_remote and place is not None:
        for name in item.names:
            await place.remove(name)
    if item.file is not None:
        await asyncio.to_thread(_unlink, item.file)


def _unlink(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
        sync_folder(file.parent)
    except OSError as error:
        raise explained(error, file) from error

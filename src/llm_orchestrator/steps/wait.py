"""Step type `wait`: for time to pass, a moment, or a signal. The engine does the waiting."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, ClassVar

from llm_orchestrator.model import MICROSECONDS, Json
from llm_orchestrator.steps.base import Names, Outcome, Plan, Signal, Timer


class Wait:
    """Waits for one of `seconds`, `until`, `signal`; `output` binds payload (null for time)."""

    type: ClassVar[str] = "wait"
    outputs: ClassVar[tuple[str, ...]] = ("payload",)

    def plan(
        self,
        config: Any,
        names: Names,
        children: Mapping[str, Outcome],
        *,
        waited: Json | None = None,
    ) -> Plan:
        """A wait first, then its payload; an error when no signal came in time."""
        if waited is not None:
            if waited.get("timed_out"):
                limit = config.timeout_seconds
                return Plan(error=f"no signal {config.signal!r} came within {limit:g} s")
            return Plan(outputs={"payload": waited.get("payload")})
        if config.signal is not None:
            signal = Signal(config.signal, config.timeout_seconds, config.payload_schema)
            return Plan(wait=signal)
        if config.seconds is not None:
            return Plan(wait=Timer(seconds=config.seconds))
        moment = parse_moment(config.until)
        if moment is None:
            return Plan(error="until is no moment: write it like 2027-01-31T08:00:00Z")
        return Plan(wait=Timer(until_us=moment))


def parse_moment(text: str) -> int | None:
    """Microseconds since the epoch of an ISO 8601 text (UTC where it names no zone), or of seconds.

    None when it is neither.
    """
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        return _parse_seconds(text)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * MICROSECONDS + since.microseconds


def _parse_seconds(text: str) -> int | None:
    try:
        seconds = float(text)
        return int(seconds * MICROSECONDS) if 0 <= seconds < 1e11 else None
    except ValueError:
        return None

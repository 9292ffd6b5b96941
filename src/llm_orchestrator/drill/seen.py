"""What the product must say of a fault by itself: an alert's condition on /metrics.

Some disasters stop nothing: a backup that is not made, an object store that is away, a lost key.
What counts then is how soon it is said. The condition must not hold before the fault, else seeing
it proves nothing; where `ends` is set it must be over after the healing, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import aiohttp

from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill.scenario import Seen
from llm_orchestrator.drill.target import NotPossible, Target

_POLL_S = 0.2
_PREFIX = "llm_orchestrator_"


@runtime_checkable
class Tells(Protocol):
    """A target whose endpoints can be reached from here."""

    http: aiohttp.ClientSession | None


async def _page(http: aiohttp.ClientSession | None, endpoint: str) -> str:
    """The page /metrics; "" while it does not answer."""
    if http is None:
        return ""
    try:
        async with http.get(f"{endpoint}/metrics") as response:
            return await response.text() if response.ok else ""
    except (aiohttp.ClientError, TimeoutError):
        return ""


def samples(page: str) -> Mapping[str, float]:
    """Every sample of a metrics page by its name with labels, without our prefix."""
    found = {}
    for line in page.splitlines():
        name, _, value = line.rpartition(" ")
        if name and not line.startswith("#"):
            found[name.removeprefix(_PREFIX)] = float(value)
    return found


def holds(seen: Seen, page: str) -> bool:
    """Whether the page says it. A sample that is not there says nothing."""
    found = samples(page)
    limit = found.get(seen.above) if isinstance(seen.above, str) else seen.above
    value = found.get(seen.metric)
    return value is not None and limit is not None and value > limit


async def wait(
    target: Target, seen: Seen, clock: RealClock, *, until: bool, limit_s: float
) -> float | None:
    """When it was first seen to hold (`until` True) or not to; None after `limit_s` seconds.

    Raises NotPossible for a target whose metrics cannot be read.
    """
    if not isinstance(target, Tells):
        raise NotPossible(f"{target.name} shows no metrics to the drill", hint="--against single")
    endpoint = target.endpoints[0]
    end_s = clock.monotonic() + limit_s
    while True:
        page = await _page(target.http, endpoint)
        if page and holds(seen, page) is until:
            return clock.monotonic()
        if clock.monotonic() >= end_s:
            return None
        await clock.sleep(_POLL_S)

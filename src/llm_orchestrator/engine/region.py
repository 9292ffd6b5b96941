"""Which regions work: one record of the store, obeyed by every node like an operator's order.

    active-active    every region works, but for those that stand by or are fenced (no record: all)
    active-passive   one region works, the others stand by

A node of a region that is not active serves the API, and claims nothing: no run, no timer, no
schedule; what it drives it lets go, in order, as a drain does. Who may write to the database is not
decided here but by the arbiter (Patroni's majority of sites); who cannot write to it cannot beat,
and begins no effect once its lease has ended. So a region that is cut off is fenced by its nodes'
own leases, whatever this record says, and the record is what the majority's side agrees on.

A standby region's node that sees no living node in any active region for a while makes its own
region active (`Heir`): compare-and-swap, so one of several wins. Times are its own steady clock's,
deaths are those by which runs are taken over (lease.py); nobody's wall clock is asked.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from llm_orchestrator.clock import Clock
from llm_orchestrator.engine.lease import Verdict
from llm_orchestrator.errors import NotFound, Refused
from llm_orchestrator.model import Json
from llm_orchestrator.store.base import Batch, PutRecord, Shelf, Store

logger = logging.getLogger(__name__)
KIND, KEY = "maintenance", "regions"
"""Among operators' orders: read with them, and news of it reaches every node at once."""
POLL_S = 1.0
"""How often a node that stands by looks, when no news comes."""
_TRIES = 20


class Policy(StrEnum):
    """Which regions work while nothing is wrong."""

    ACTIVE_ACTIVE = "active-active"
    ACTIVE_PASSIVE = "active-passive"


class Role(StrEnum):
    """What a region's nodes do."""

    ACTIVE = "active"
    STANDBY = "standby"
    """It takes over by itself when no active region lives."""
    FENCED = "fenced"
    """It does not, until a person lets it."""


@dataclass(frozen=True, slots=True)
class Regions:
    """The record. `counter` grows with each change; `since` is microseconds, the store's clock."""

    policy: Policy = Policy.ACTIVE_ACTIVE
    home: str = ""
    """Where the work belongs while nothing is wrong; empty where it does not matter."""
    roles: Mapping[str, Role] = field(default_factory=dict)
    counter: int = 0
    since: int = 0
    by: str = ""
    why: str = ""

    def role_of(self, region: str) -> Role:
        """A region that nobody has named works only where all do, or where it is the home."""
        if region in self.roles:
            return self.roles[region]
        is_active = self.policy is Policy.ACTIVE_ACTIVE or region == self.home
        return Role.ACTIVE if is_active else Role.STANDBY

    def known(self, more: Collection[str] = ()) -> list[str]:
        """Every region that is named here or in `more`, by name."""
        return sorted({*self.roles, *more, *([self.home] if self.home else [])})

    def to_json(self) -> dict[str, Json]:
        """The record's value."""
        return {
            "policy": self.policy.value,
            "home": self.home,
            "roles": {region: role.value for region, role in self.roles.items()},
            "counter": self.counter,
            "since": self.since,
            "by": self.by,
            "why": self.why,
        }

    @classmethod
    def from_json(cls, data: Json) -> Regions:
        """The inverse. A record that makes no sense is none."""
        if not isinstance(data, Mapping):
            return cls()
        try:
            return cls(
                Policy(data["policy"]),
                str(data["home"]),
                {str(region): Role(role) for region, role in data["roles"].items()},
                int(data["counter"]),
                int(data["since"]),
                str(data["by"]),
                str(data["why"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError):
            return cls()


# --- what a change makes of the record; all pure ---


def with_policy(regions: Regions, policy: Policy, home: str) -> Regions:
    """Another policy. Fenced regions stay fenced."""
    if policy is Policy.ACTIVE_PASSIVE and not home:
        raise Refused("which region works?", hint="llmo region policy active-passive --home REGION")
    roles: dict[str, Role] = {
        name: Role.FENCED for name, role in regions.roles.items() if role is Role.FENCED
    }
    if policy is Policy.ACTIVE_PASSIVE:
        roles[home] = Role.ACTIVE
    return replace(regions, policy=policy, home=home or regions.home, roles=roles)


def moved(regions: Regions, to: str, living: Collection[str]) -> Regions:
    """`to` alone works; the others stand by, and who was fenced stays fenced."""
    if to not in living:
        shown = ", ".join(sorted(living)) or "none"
        raise NotFound(
            f"no node lives in region {to}; there is: {shown}", hint="llmo region status"
        )
    roles = {
        name: Role.FENCED if regions.role_of(name) is Role.FENCED else Role.STANDBY
        for name in regions.known(living)
    }
    return replace(regions, roles={**roles, to: Role.ACTIVE})


def back_home(regions: Regions, living: Collection[str]) -> Regions:
    """As the policy says while nothing is wrong: nobody is fenced any more."""
    if regions.policy is Policy.ACTIVE_ACTIVE:
        return replace(regions, roles={})
    cleared = replace(regions, roles={})
    return moved(cleared, regions.home, living)


def fenced(regions: Regions, region: str) -> Regions:
    """`region` claims nothing until a person lets it."""
    return replace(regions, roles={**_named(regions), region: Role.FENCED})


def unfenced(regions: Regions, region: str) -> Regions:
    """It may work again: at once where all work, or where nobody does; else it stands by."""
    if regions.role_of(region) is not Role.FENCED:
        raise Refused(f"region {region} is not fenced", hint="llmo region status")
    roles = dict(regions.roles)
    del roles[region]
    if regions.policy is Policy.ACTIVE_PASSIVE:
        is_free = Role.ACTIVE not in roles.values()
        roles[region] = Role.ACTIVE if is_free else Role.STANDBY
    return replace(regions, roles=roles)


def inherited(regions: Regions, region: str) -> Regions:
    """`region` stood by, and works from now on; where one works, the others stand by."""
    roles = _named(regions)
    if regions.policy is Policy.ACTIVE_PASSIVE:
        roles = {
            name: Role.STANDBY if role is Role.ACTIVE else role for name, role in roles.items()
        }
    return replace(regions, roles={**roles, region: Role.ACTIVE})


def is_orphaned(regions: Regions, living: Collection[str]) -> bool:
    """True when no region that works has a node that lives."""
    return not any(regions.role_of(region) is Role.ACTIVE for region in living)


def _named(regions: Regions) -> dict[str, Role]:
    """Roles by name, the home's included where it follows only from the policy."""
    home = [regions.home] if regions.home else []
    return {name: regions.role_of(name) for name in [*home, *regions.roles]}


# --- the record in the store ---


async def read_regions(shelf: Shelf) -> Regions:
    """As it stands. Raises StoreError."""
    return Regions.from_json((await shelf.record(KIND, KEY))[0])


async def change_regions(
    store: Store, clock: Clock, change: Callable[[Regions], Regions], *, by: str, why: str = ""
) -> Regions:
    """Put what `change` makes of the record; what stands then. Raises what it raises, StoreError.

    `change` is asked again when somebody else was faster.
    """
    for _ in range(_TRIES):
        value, version = await store.shelf.record(KIND, KEY)
        before = Regions.from_json(value)
        after = replace(
            change(before), counter=before.counter + 1, since=clock.now_us(), by=by, why=why
        )
        put = PutRecord(KIND, KEY, after.to_json(), version)
        if not (await store.commit(Batch(changes=(put,)))).is_refused:
            return after
    raise Refused("somebody else changes the regions again and again; try again")


# --- a standby region takes over ---


class Patience:
    """How long no active region has lived. Pure: times are seconds on a steady clock."""

    def __init__(self, failover_s: float, *, blind_s: float) -> None:
        """`blind_s`: who has not looked for so long has not seen that it was so all the time."""
        self.failover_s = failover_s
        self._blind_s = blind_s
        self._since: float | None = None
        self._looked_at = 0.0

    def looked(self, now: float, *, is_orphaned: bool) -> bool:
        """Take in one look; True when it has been so for long enough."""
        was_blind = now - self._looked_at > self._blind_s
        self._looked_at = now
        if not is_orphaned:
            self._since = None
        elif self._since is None or was_blind:
            self._since = now
        return self._since is not None and now - self._since >= self.failover_s


Told = Callable[[Regions], Awaitable[None]]


class Heir:
    """One node's part in the takeover by its region."""

    def __init__(
        self, store: Store, clock: Clock, *, region: str, failover_s: float, lease_s: float
    ) -> None:
        self.region = region
        self.told: Told | None = None
        """Called with the record once this node has made its region active (the audit log)."""
        self._store = store
        self._clock = clock
        # never sooner than a lease: whoever was cut off has begun its last effect by then
        self._patience = Patience(max(failover_s, lease_s), blind_s=lease_s / 2)
        self._living: frozenset[str] = frozenset()

    def saw(self, verdict: Verdict, regions: Regions) -> bool:
        """The heart has seen the other nodes; True when this region is to take over now."""
        self._living = verdict.regions
        is_due = self._patience.looked(
            self._clock.monotonic(), is_orphaned=is_orphaned(regions, verdict.regions)
        )
        return is_due and regions.role_of(self.region) is Role.STANDBY

    async def succeed(self) -> bool:
        """Make this region active; False when another one was faster. Raises StoreError."""
        value, version = await self._store.shelf.record(KIND, KEY)
        before = Regions.from_json(value)
        is_due = is_orphaned(before, self._living) and before.role_of(self.region) is Role.STANDBY
        if not is_due:
            return False
        active = [name for name in before.known() if before.role_of(name) is Role.ACTIVE]
        after = replace(
            inherited(before, self.region),
            counter=before.counter + 1,
            since=self._clock.now_us(),
            by=self._store.node_id,
            why=f"no node lives in {', '.join(active) or 'any active region'}",
        )
        put = PutRecord(KIND, KEY, after.to_json(), version)
        if (await self._store.commit(Batch(changes=(put,)))).is_refused:
            return False
        logger.warning("region %s is active from now on: %s", self.region, after.why)
        if self.told is not None:
            await self.told(after)
        return True

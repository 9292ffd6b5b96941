"""Moving the work from one region to another: look, plan, do, and measure what it cost.

The order of a failover: the primary first (a move that Patroni refuses changes nothing else), then
the regions' roles in one compare-and-swap, then waiting until the nodes obey and runs have moved.
All the while a probe commits a small record, again and again: the longest time between two of its
commits is the write gap. Nothing that was acknowledged can be lost by any of it: a planned move
hands over to a synchronous standby, and an unplanned one is the arbiter's, not ours.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llm_orchestrator.engine.region import (
    Regions,
    Role,
    back_home,
    change_regions,
    moved,
    read_regions,
)
from llm_orchestrator.errors import Refused, StoreError
from llm_orchestrator.model import MICROSECONDS, Run, RunState
from llm_orchestrator.recovery.patroni import Cluster, Patroni
from llm_orchestrator.store.base import Batch, Database, Member, PutRecord, RunFilter, lives
from llm_orchestrator.store.statistics import Standby

PROBE = "region-probe"
PROBE_S = 0.05
_POLL_S = 0.25
_NODES = 1_000
_RUNS = 10_000
OFF = "--old-region-is-off"
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything that is looked at before anything is decided."""

    regions: Regions
    nodes: Sequence[Member]
    """Those that live."""
    now_us: int
    runs: Sequence[Run] = ()
    """Those that are driven."""
    standbys: Sequence[Standby] | None = None
    cluster: Cluster | None = None
    has_patroni: bool = False

    @property
    def living(self) -> set[str]:
        """Regions with a node that lives."""
        return {node.region for node in self.nodes}

    def region_of(self, run: Run) -> str:
        """Where a run is driven; empty when its node does not live."""
        return next((node.region for node in self.nodes if node.node_id == run.owner), "")

    def runs_in(self) -> Counter[str]:
        """Driven runs by region."""
        return Counter(self.region_of(run) for run in self.runs)

    def silent(self, lease_s: float, *, besides: str) -> list[str]:
        """Nodes outside `besides` that nobody has declared dead and that cannot be asked."""
        return [
            node.node_id
            for node in self.nodes
            if node.region != besides
            and node.beat
            and (not node.is_connected or self.now_us - node.heartbeat_at > lease_s * MICROSECONDS)
        ]


class Check(NamedTuple):
    """One thing that has to be so before a failover."""

    name: str
    is_ok: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a failover to `to` would do."""

    to: str
    checks: Sequence[Check]
    steps: Sequence[str]
    leader: str = ""
    candidate: str = ""
    """Where the primary goes; empty when it stays."""

    @property
    def troubles(self) -> list[Check]:
        """What speaks against it."""
        return [check for check in self.checks if not check.is_ok]


@dataclass(frozen=True, slots=True)
class Site:
    """What the work is done with."""

    store: Database
    lease_s: float = 3.0
    patroni: Patroni | None = None


@dataclass(slots=True)
class Done:
    """What a failover did."""

    regions: Regions
    primary: str = ""
    """Where it was moved to; empty when it stayed."""
    gap_s: float = 0.0
    """The longest time in which nothing could be written."""
    runs_before: int = 0
    """Runs that were driven elsewhere."""
    runs_left: int = 0
    """Runs that still end a step there."""
    deaf: Sequence[str] = ()
    """Nodes elsewhere that live and have not said that they know."""


async def look(site: Site) -> Scene:
    """Raises StoreError."""
    store = site.store
    nodes = [node for node in await store.shelf.nodes(_NODES) if lives(node)]
    runs = await store.look.runs(RunFilter(states=(RunState.RUNNING,), limit=_RUNS))
    now_us = store.clock.now_us()
    figures = await store.counts.statistics(now_us, stalled_before=0)
    return Scene(
        await read_regions(store.shelf),
        nodes,
        now_us,
        runs,
        figures.standbys,
        await site.patroni.look() if site.patroni is not None else None,
        has_patroni=site.patroni is not None,
    )


# --- the plan: pure ---


def make_plan(scene: Scene, to: str, *, lease_s: float = 3.0, is_off: bool = False) -> Plan:
    """`is_off`: a person vouches for it that nothing runs in the old region."""
    cluster = scene.cluster
    leader = cluster.leader if cluster else ""
    is_elsewhere = cluster is not None and cluster.region != to
    found = cluster.candidate(to) if cluster is not None and is_elsewhere else None
    candidate = found.name if found is not None else ""
    checks = [_nodes_there(scene, to), _others(scene, to, lease_s=lease_s, is_off=is_off)]
    if scene.has_patroni:
        checks += _database(cluster, to, candidate=candidate, is_off=is_off)
    steps = []
    if candidate and leader:
        steps.append(f"move the primary from {leader} to {candidate} (Patroni, switchover)")
    elif candidate:
        steps.append(f"make {candidate} the primary (Patroni, failover)")
    others = [name for name in scene.regions.known(scene.living) if name != to]
    besides = f"; from then on these stand by: {', '.join(others)}" if others else ""
    steps.append(f"make region {to} active{besides}")
    count = sum(number for name, number in scene.runs_in().items() if name != to)
    steps.append(f"wait until the runs that are driven elsewhere have left (now {count})")
    steps.append("say how long nothing could be written")
    return Plan(to, checks, steps, leader=leader, candidate=candidate)


def _nodes_there(scene: Scene, to: str) -> Check:
    count = sum(node.region == to for node in scene.nodes)
    return Check("nodes", count > 0, f"{count} nodes live in region {to}")


def _others(scene: Scene, to: str, *, lease_s: float, is_off: bool) -> Check:
    """Somebody has to know that the old region works no more: it, the arbiter, or a person."""
    silent = scene.silent(lease_s, besides=to)
    if not silent:
        return Check("old region", is_ok=True, detail="every node answers, or is gone")
    shown = ", ".join(silent)
    if scene.cluster is not None and scene.cluster.leader:
        why = "a majority has elected the primary, their leases have ended"
        return Check("old region", is_ok=True, detail=f"{shown}: no answer; {why}")
    if is_off:
        return Check("old region", is_ok=True, detail=f"{shown}: no answer; you say it is off")
    return Check("old region", is_ok=False, detail=f"{shown}: no answer, no arbiter: {OFF}")


def _database(cluster: Cluster | None, to: str, *, candidate: str, is_off: bool) -> list[Check]:
    if cluster is None:
        return [Check("arbiter", is_off, f"no Patroni answers; {OFF} goes on without it")]
    if not cluster.leader:
        found = [Check("arbiter", is_off, f"nobody leads: no majority has decided; {OFF}")]
    else:
        found = [Check("arbiter", is_ok=True, detail=f"{cluster.leader} leads")]
    if cluster.region == to:
        found.append(Check("primary", is_ok=True, detail=f"it is in region {to} already"))
    else:
        well = f"{candidate} can take over" if candidate else f"nobody in region {to} can take over"
        found.append(Check("primary", bool(candidate), well))
    near = [each.name for each in cluster.servers if each.is_sync and each.region == cluster.region]
    if cluster.leader:
        shown = ", ".join(near)
        said = f"{shown} would be lost with the primary" if near else "outside the primary's region"
        found.append(Check("synchronous standbys", not near, said))
    return found


def demand(plan: Plan) -> None:
    """Raises Refused while anything speaks against it."""
    if plan.troubles:
        told = "; ".join(f"{check.name}: {check.detail}" for check in plan.troubles)
        raise Refused(f"region {plan.to} cannot take over: {told}", hint="llmo region plan")


# --- doing it ---


async def arbitrate(patroni: Patroni, to: str, *, is_off: bool) -> None:
    """Before the store is opened: somebody has to lead. Raises Refused, StoreUnavailable.

    With a majority of sites Patroni elects by itself; without one nobody may be promoted unless a
    person vouches for it that the old region is off.
    """
    cluster = await patroni.look()
    if cluster is None or cluster.leader:
        return
    try:
        await patroni.await_leader()
    except StoreError as error:
        if not is_off:
            raise Refused(
                f"nobody leads the database, and no majority of sites decides; if nothing of the "
                f"old region runs any more, say so: {OFF}",
                hint="llmo region status",
            ) from error
        found = cluster.candidate(to)
        if found is None:
            raise Refused(f"no server in region {to} can become the primary") from error
        await patroni.promote(found.name)


async def fail_over(
    site: Site,
    plan: Plan,
    *,
    by: str,
    why: str,
    wait_s: float,
    is_back: bool = False,
    tell: Tell = lambda _: None,
) -> Done:
    """Do what the plan says. Raises Refused, StoreError. `is_back`: as the policy has it."""
    demand(plan)
    before = await look(site)
    elsewhere = [run.run_id for run in before.runs if before.region_of(run) != plan.to]

    def change(regions: Regions) -> Regions:
        return (
            back_home(regions, before.living) if is_back else moved(regions, plan.to, before.living)
        )

    async with measured(site.store) as gap:
        if plan.candidate and site.patroni is not None:
            tell(f"moving the primary to {plan.candidate}")
            if plan.leader:
                await site.patroni.switch(plan.leader, plan.candidate)
            else:
                await site.patroni.promote(plan.candidate)
            await gap.written()
        regions = await change_regions(site.store, site.store.clock, change, by=by, why=why)
        tell(f"roles: {shown_roles(regions, before.living)}")
        done = Done(regions, plan.candidate, runs_before=len(elsewhere))
        await _settle(site, done, elsewhere, wait_s=wait_s)
    done.gap_s = gap.longest_s
    return done


def shown_roles(regions: Regions, living: set[str]) -> str:
    """`a standby, b active`."""
    return ", ".join(f"{name} {regions.role_of(name).value}" for name in regions.known(living))


async def _settle(site: Site, done: Done, elsewhere: Sequence[str], *, wait_s: float) -> None:
    """Until every node knows and no run of before is driven where it should not be."""
    clock = site.store.clock
    end = clock.monotonic() + wait_s
    while True:
        try:
            scene = await look(Site(site.store, site.lease_s))
            done.deaf = [
                node.node_id
                for node in scene.nodes
                if node.beat and _told(node) < done.regions.counter
            ]
            idle = {
                name
                for name in done.regions.known(scene.living)
                if done.regions.role_of(name) is not Role.ACTIVE
            }
            left = {run.run_id for run in scene.runs if scene.region_of(run) in {*idle, ""}}
            done.runs_left = len(left & set(elsewhere))
            if not done.deaf and not done.runs_left:
                return
        except StoreError:
            pass  # the primary has just moved
        if clock.monotonic() >= end:
            return
        await clock.sleep(_POLL_S)


def _told(node: Member) -> int:
    """Which record a node says that it obeys."""
    region = node.info.get("region") if isinstance(node.info, dict) else None
    return int(region.get("counter", 0)) if isinstance(region, dict) else 0


class Gap:
    """How long nothing could be written: filled by `measured`."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._event = asyncio.Event()

    def wrote(self, after_s: float) -> None:
        """One more commit, so long after the one before it."""
        self.longest_s = max(self.longest_s, after_s)
        self._event.set()

    async def written(self, limit_s: float = 30.0) -> None:
        """Until the next commit, for so long at most."""
        self._event.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._event.wait()


@contextlib.asynccontextmanager
async def measured(store: Database) -> AsyncIterator[Gap]:
    """Commit a small record again and again while the block runs."""
    gap = Gap()
    task = asyncio.create_task(_probe(store, gap), name="region probe")
    try:
        yield gap
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        with contextlib.suppress(StoreError):
            value, version = await store.shelf.record(PROBE, store.node_id)
            if value is not None:
                put = PutRecord(PROBE, store.node_id, None, version)
                await store.commit(Batch(changes=(put,)))


async def _probe(store: Database, gap: Gap) -> None:
    clock, number = store.clock, 0
    last = clock.monotonic()
    while True:
        with contextlib.suppress(StoreError):
            _, version = await store.shelf.record(PROBE, store.node_id)
            number += 1
            put = PutRecord(PROBE, store.node_id, {"number": number}, version)
            if not (await store.commit(Batch(changes=(put,)))).is_refused:
                now = clock.monotonic()
                gap.wrote(now - last)
                last = now
        await clock.sleep(PROBE_S)


def home_of(regions: Regions) -> str:
    """Where `failback` leads. Raises Refused when nobody has said."""
    if not regions.home:
        raise Refused(
            "no home region is set",
            hint=f"llmo region policy {regions.policy.value} --home REGION",
        )
    return regions.home

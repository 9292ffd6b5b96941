"""What makes a region active, and what speaks against it: pure, and on virtual time."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_orchestrator.engine.region import (
    Patience,
    Policy,
    Regions,
    Role,
    back_home,
    change_regions,
    fenced,
    inherited,
    is_orphaned,
    moved,
    read_regions,
    unfenced,
    with_policy,
)
from llm_orchestrator.errors import NotFound, Refused, StoreUnavailable
from llm_orchestrator.recovery.patroni import Cluster, Patroni, cluster_of
from llm_orchestrator.recovery.region import Scene, arbitrate, demand, make_plan
from llm_orchestrator.store.base import Member, NodeState
from tests.unit.engine.nodes import House
from tests.unit.engine.support import definition, virtually

PASSIVE = with_policy(Regions(), Policy.ACTIVE_PASSIVE, "a")
NOW_US = 1_000_000_000
ROLES = st.dictionaries(st.sampled_from("abc"), st.sampled_from(Role))
RECORDS = st.builds(
    Regions, st.sampled_from(Policy), st.sampled_from(["", "a", "b"]), ROLES, st.integers(0, 99)
)


def node(name: str, *, age_s: float = 0.1, is_connected: bool = True) -> Member:
    at = NOW_US - int(age_s * 1_000_000)
    return Member(name, name[0], NodeState.ALIVE, 7, is_connected, 0, at)


# -- the record ----------------------------------------------------------------------------------


@given(RECORDS)
def test_a_record_is_read_as_it_was_written(regions: Regions) -> None:
    assert Regions.from_json(regions.to_json()) == regions


@pytest.mark.parametrize(
    "value", [None, 3, {}, {**PASSIVE.to_json(), "policy": "none"}, {"roles": 1}]
)
def test_a_record_that_makes_no_sense_stops_nobody(value: Any) -> None:
    assert Regions.from_json(value).role_of("anywhere") is Role.ACTIVE


def test_roles_follow_from_the_policy_where_nothing_else_is_said() -> None:
    assert [PASSIVE.role_of(name) for name in "ab"] == [Role.ACTIVE, Role.STANDBY]
    both = with_policy(PASSIVE, Policy.ACTIVE_ACTIVE, "")
    assert [both.role_of(name) for name in "ab"] == [Role.ACTIVE, Role.ACTIVE]
    assert both.home == "a"
    with pytest.raises(Refused):
        with_policy(Regions(), Policy.ACTIVE_PASSIVE, "")


@given(RECORDS, st.sampled_from("abc"))
def test_after_a_move_one_region_works_and_a_fence_holds(regions: Regions, to: str) -> None:
    after = moved(regions, to, "abc")
    assert [name for name in "abc" if after.role_of(name) is Role.ACTIVE] == [to]
    for name in set("abc") - {to}:
        was_fenced = regions.role_of(name) is Role.FENCED
        assert (after.role_of(name) is Role.FENCED) == was_fenced


@given(RECORDS, st.sampled_from("abc"))
def test_an_heir_works_and_no_fence_is_opened(regions: Regions, heir: str) -> None:
    after = inherited(regions, heir)
    assert after.role_of(heir) is Role.ACTIVE
    others = [name for name in "abc" if name != heir]
    for name in others:
        assert (after.role_of(name) is Role.FENCED) == (regions.role_of(name) is Role.FENCED)
        if regions.policy is Policy.ACTIVE_PASSIVE:
            assert after.role_of(name) is not Role.ACTIVE


def test_back_home_is_as_the_policy_has_it() -> None:
    away = fenced(moved(PASSIVE, "b", "ab"), "a")
    assert back_home(away, "ab").roles == {"a": Role.ACTIVE, "b": Role.STANDBY}
    both = fenced(Regions(home="a"), "b")
    assert back_home(both, "ab").roles == {}
    with pytest.raises(NotFound):
        back_home(away, "b")


def test_who_is_let_free_works_only_where_nobody_else_does() -> None:
    assert unfenced(fenced(PASSIVE, "b"), "b").role_of("b") is Role.STANDBY
    assert unfenced(fenced(PASSIVE, "a"), "a").role_of("a") is Role.ACTIVE
    assert unfenced(fenced(Regions(), "b"), "b").role_of("b") is Role.ACTIVE
    with pytest.raises(Refused):
        unfenced(PASSIVE, "b")


def test_an_orphaned_store_has_no_living_node_where_work_is_done() -> None:
    assert not is_orphaned(PASSIVE, {"a", "b"})
    assert is_orphaned(PASSIVE, {"b"})
    assert is_orphaned(fenced(PASSIVE, "a"), {"a", "b"})
    assert not is_orphaned(Regions(), {"b"})


# -- patience ------------------------------------------------------------------------------------


def test_it_has_to_be_so_all_the_time_and_to_have_been_seen() -> None:
    patience = Patience(3.0, blind_s=1.5)
    steady = [patience.looked(at / 5, is_orphaned=True) for at in range(1, 17)]
    assert steady == [False] * 15 + [True]
    assert not patience.looked(3.4, is_orphaned=False)  # it was back for a moment
    assert not patience.looked(3.6, is_orphaned=True)
    assert not patience.looked(30.0, is_orphaned=True)  # nobody has looked meanwhile
    assert not Patience(float("inf"), blind_s=1.5).looked(9.0, is_orphaned=True)


# -- the plan ------------------------------------------------------------------------------------


def cluster(leader: str = "a-db1", *, sync: str = "b-db1", strict: bool = False) -> Cluster:
    roles = {"a-db1": "replica", "a-db2": "replica", "b-db1": "replica", sync: "sync_standby"}
    if leader:
        roles[leader] = "leader"
    members = [
        {"name": name, "role": role, "state": "streaming", "lag": 0} for name, role in roles.items()
    ]
    settings = {"synchronous_mode": True, "synchronous_mode_strict": strict}
    return cluster_of(members, settings, leader)


def scene(*nodes: Member, found: Cluster | None = None, has_patroni: bool = False) -> Scene:
    return Scene(PASSIVE, nodes, NOW_US, cluster=found, has_patroni=has_patroni)


def test_a_plan_moves_the_primary_to_the_synchronous_standby_there() -> None:
    plan = make_plan(scene(node("a1"), node("b1"), found=cluster(), has_patroni=True), "b")
    assert plan.troubles == []
    assert (plan.leader, plan.candidate) == ("a-db1", "b-db1")
    assert "a-db1 to b-db1" in plan.steps[0]
    demand(plan)
    stays = make_plan(scene(node("a1"), found=cluster(), has_patroni=True), "a")
    assert (stays.troubles, stays.candidate) == ([], "")


def test_a_standby_that_commits_do_not_wait_for_is_no_candidate() -> None:
    near = cluster(sync="a-db2")
    plan = make_plan(scene(node("a1"), node("b1"), found=near, has_patroni=True), "b")
    assert [check.name for check in plan.troubles] == ["primary", "synchronous standbys"]
    with pytest.raises(Refused, match="a-db2 would be lost with the primary"):
        demand(plan)


def test_a_region_without_a_node_takes_nothing_over() -> None:
    plan = make_plan(scene(node("a1")), "b")
    assert [check.name for check in plan.troubles] == ["nodes"]


@pytest.mark.parametrize("silent", [{"age_s": 3.5}, {"is_connected": False}])
def test_who_cannot_be_asked_needs_an_arbiter_or_a_persons_word(silent: dict[str, Any]) -> None:
    lone = scene(node("a1", **silent), node("b1"))
    assert [check.name for check in make_plan(lone, "b").troubles] == ["old region"]
    assert make_plan(lone, "b", is_off=True).troubles == []
    decided = scene(
        node("a1", **silent), node("b1"), found=cluster("b-db1", sync="a-db1"), has_patroni=True
    )
    assert make_plan(decided, "b").troubles == []
    undecided = scene(node("a1", **silent), node("b1"), found=cluster(""), has_patroni=True)
    names = [check.name for check in make_plan(undecided, "b").troubles]
    assert names == ["old region", "arbiter"]
    assert make_plan(undecided, "b", is_off=True).troubles == []


def test_what_commits_wait_for_is_read_from_patronis_settings() -> None:
    assert cluster(strict=True).sync == "strict"
    assert cluster().sync == "degrade"
    assert cluster_of([], {}, "").sync == "off"
    tagged = cluster_of([{"name": "db7", "tags": {"region": "c"}, "lag": "unknown"}], {}, "db7")
    assert tagged.region == "c"
    assert tagged.servers[0].lag_bytes is None


class LeaderlessPatroni:
    """Answers, and nobody leads until somebody is promoted."""

    def __init__(self, found: Cluster | None) -> None:
        self.found = found
        self.promoted: list[str] = []

    async def look(self) -> Cluster | None:
        return self.found

    async def await_leader(self, name: str = "") -> Cluster:
        raise StoreUnavailable(f"nobody leads {name}")

    async def promote(self, candidate: str) -> None:
        self.promoted.append(candidate)


def test_without_a_majority_nobody_is_promoted_unless_a_person_vouches() -> None:
    async def main() -> None:
        patroni = LeaderlessPatroni(cluster(""))
        with pytest.raises(Refused, match="--old-region-is-off"):
            await arbitrate(cast("Patroni", patroni), "b", is_off=False)
        assert patroni.promoted == []
        await arbitrate(cast("Patroni", patroni), "b", is_off=True)
        assert patroni.promoted == ["b-db1"]
        for found in (None, cluster()):  # nothing to arbitrate
            calm = LeaderlessPatroni(found)
            await arbitrate(cast("Patroni", calm), "b", is_off=True)
            assert calm.promoted == []

    asyncio.run(main())


# -- production nodes on virtual time ------------------------------------------------------------


STEP = definition("one", steps=[{"id": "one", "type": "work", "takes": 1.0}])


async def site(house: House, *names: str, failover_s: float = 0.0, poll_s: float = 2.0) -> None:
    """Nodes whose region is the first letter of their name; a is at home."""
    for name in names:
        await house.begin(name, region=name[0], region_failover_s=failover_s, poll_s=poll_s)

    def to_passive(regions: Regions) -> Regions:
        return with_policy(regions, Policy.ACTIVE_PASSIVE, "a")

    await change_regions(house.store, house.clock, to_passive, by="ada")


def test_a_standby_region_takes_over_once_and_no_sooner_than_it_may() -> None:
    async def main() -> None:
        house = House()
        await site(house, "a1", "b1", "b2", failover_s=8.0)
        for run_id in [await house.accept(STEP) for _ in range(10)]:
            await house.ends(run_id)
        assert not house.homes["b1"].work.seen
        assert not house.homes["b2"].work.seen
        await house.crash("a1")
        crashed_at = house.clock.monotonic()
        run_id = await house.accept(STEP)
        await house.ends(run_id)
        assert house.clock.monotonic() - crashed_at >= 8.0
        after = await read_regions(house.store.shelf)
        assert after.counter == 2
        assert (after.role_of("a"), after.role_of("b")) == (Role.STANDBY, Role.ACTIVE)
        assert sum(bool(house.homes[name].work.seen) for name in ("b1", "b2")) == 1
        await house.stop()

    virtually(main())


def test_of_two_nodes_that_try_at_once_one_wins() -> None:
    async def main() -> None:
        house = House()
        await site(house, "a1", "b1", "c1")
        told: list[Regions] = []

        async def tell(regions: Regions) -> None:
            told.append(regions)

        gate = asyncio.Event()
        for name in ("b1", "c1"):
            house.homes[name].node.upkeep.heir.told = tell
            house.homes[name].desk.hold = gate
        await house.crash("a1")
        await house.clock.sleep(5.0)  # both have read the record, and want to change it
        assert (await read_regions(house.store.shelf)).counter == 1
        gate.set()
        await house.clock.sleep(5.0)
        assert len(told) == 1
        after = await read_regions(house.store.shelf)
        assert after == told[0]
        assert [after.role_of(name) for name in "abc"].count(Role.ACTIVE) == 1
        await house.stop()

    virtually(main())


def test_a_standby_region_that_may_not_take_over_waits_for_a_person() -> None:
    async def main() -> None:
        house = House()
        await site(house, "a1", "b1", failover_s=float("inf"))
        await house.crash("a1")
        run_id = await house.accept(STEP)
        await house.clock.sleep(600.0)
        assert not house.homes["b1"].work.seen
        await change_regions(
            house.store, house.clock, lambda regions: moved(regions, "b", "b"), by="ada"
        )
        told_at = house.clock.monotonic()
        await house.ends(run_id)
        assert house.clock.monotonic() - told_at < 1.5, "it begins at once"
        await house.stop()

    virtually(main())


def test_a_standby_region_that_cannot_see_does_not_take_over() -> None:
    async def main() -> None:
        house = House()
        await site(house, "a1", "b1")
        troubles = house.homes["b1"].desk.troubles
        troubles["any"] = 1_000_000
        await house.clock.sleep(60.0)
        troubles.clear()
        await house.clock.sleep(10.0)
        assert (await read_regions(house.store.shelf)).counter == 1
        await house.stop()

    virtually(main())


def test_a_region_that_is_cut_off_begins_nothing_whatever_the_record_says() -> None:
    async def main() -> None:
        house = House()
        await site(house, "a1", "b1")
        node, desk = house.homes["a1"].node, house.homes["a1"].desk
        assert node.heart.holds()
        desk.is_cut = True
        house.close_session(node.node_id)
        run_id = await house.accept(STEP)
        await house.until(lambda: bool(house.homes["b1"].work.seen))
        assert not node.heart.holds(), "its lease had ended before another region worked"
        assert node.upkeep.watch.orders.regions.role_of("a") is Role.ACTIVE  # as far as it knows
        await house.ends(run_id)
        assert not house.homes["a1"].work.seen
        await house.stop()

    virtually(main())


def test_a_node_that_no_news_reaches_obeys_within_its_poll() -> None:
    async def main() -> None:
        house = House()
        await site(house, "a1", "b1", poll_s=60.0)
        house.homes["b1"].desk.is_deaf = True
        await house.clock.sleep(5.0)
        await change_regions(
            house.store, house.clock, lambda regions: moved(regions, "b", "ab"), by="ada"
        )
        await house.clock.sleep(1.5)
        assert not house.homes["b1"].node.upkeep.is_holding
        assert house.homes["a1"].node.upkeep.is_holding
        await house.stop()

    virtually(main())

"""What retention lets go, never the newest or the last proved one; and what lists find."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyrage
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_orchestrator.errors import ConfigError, Denied, NotFound, StoreDamaged, StoreUnavailable
from llm_orchestrator.recovery import catalogue as listing
from llm_orchestrator.recovery.catalogue import Catalogue, Finding, Item, Limits, check, read_marks
from llm_orchestrator.recovery.create import Made
from llm_orchestrator.recovery.manifest import PREFIX
from llm_orchestrator.recovery.places import Kept
from llm_orchestrator.recovery.places_folder import FolderPlace
from llm_orchestrator.recovery.prune import Policy, execute, plan
from tests.recovery.backup_support import backed_up, options, sqlite_store

NOW = datetime(2026, 6, 15, 12, tzinfo=UTC)  # a Monday
NOW_US = int(NOW.timestamp()) * 1_000_000
DAY = 86_400


def id_of(moment: datetime) -> str:
    return f"{PREFIX}{moment:%Y%m%d_%H%M%S}"


def item(days: float, *, is_remote: bool = False) -> Item:
    backup_id = id_of(NOW - timedelta(days=days))
    names = (f"{backup_id}.tar.gz",) if is_remote else ()
    return Item(backup_id, listing.made_at_us(backup_id), 10, None, names)


def kept(items: Sequence[Item], policy: Policy, *, proved: str = "") -> list[str]:
    verdicts = plan(items, now_us=NOW_US, policy=policy, proved=proved)
    assert {each.item.backup_id for each in verdicts} == {each.backup_id for each in items}
    assert all(each.why for each in verdicts)
    return [each.item.backup_id for each in verdicts if each.is_kept]


def ids(*days: float) -> list[str]:
    return [item(each).backup_id for each in days]


# -- the plan -------------------------------------------------------------------------------------


def test_days_keep_what_is_young() -> None:
    items = [item(days) for days in (45, 0.5, 29.9, 30, 30.1, 10)]
    assert kept(items, Policy(days=30)) == ids(0.5, 10, 29.9, 30)


def test_the_newest_stays_however_old() -> None:
    assert kept([item(400), item(500)], Policy(days=30)) == ids(400)


def test_the_last_proved_one_stays_however_old() -> None:
    items = [item(1), item(100), item(200)]
    assert kept(items, Policy(days=30), proved=ids(200)[0]) == ids(1, 200)


def test_the_newest_in_the_second_place_stays() -> None:
    """Uploads have failed for months: what is there is all that is there."""
    items = [item(1), item(100, is_remote=True), item(200, is_remote=True)]
    assert kept(items, Policy(days=30)) == ids(1, 100)


def test_what_its_place_has_locked_stays() -> None:
    items = [item(1), item(100), item(200)]
    verdicts = plan(items, now_us=NOW_US, policy=Policy(), locked=ids(100))
    assert [(each.is_kept, each.why) for each in verdicts][1] == (True, "locked by its place")
    assert not verdicts[2].is_kept


def test_last_daily_weekly_and_monthly_keep_the_newest_of_each() -> None:
    items = [item(days / 2) for days in range(200)]  # two a day, the first of them at noon today
    none = Policy(days=0)
    assert kept(items, none._replace(last=3)) == ids(0, 0.5, 1)
    assert kept(items, none._replace(daily=3)) == ids(0, 1, 2)
    assert kept(items, none._replace(weekly=3)) == ids(0, 1, 8)  # Monday; two Sundays
    assert kept(items, none._replace(monthly=3)) == ids(0, 15, 46)  # June; 31 May; 30 April
    both = kept(items, none._replace(daily=2, monthly=2))
    assert both == ids(0, 1, 15)


def test_what_has_no_moment_or_one_that_lies_ahead_stays() -> None:
    strange = Item(f"{PREFIX}by-hand", 0, 10)
    ahead = item(-3)
    found = kept([strange, ahead, item(1), item(99)], Policy(days=30))
    assert found == [ahead.backup_id, *ids(1), strange.backup_id]


@pytest.mark.parametrize("policy", [Policy(days=0), Policy(days=-1), Policy(last=-2)])
def test_a_policy_that_keeps_nothing_is_refused(policy: Policy) -> None:
    with pytest.raises(ConfigError):
        plan([item(1)], now_us=NOW_US, policy=policy)


number = st.integers(0, 5)
POLICIES = st.builds(Policy, st.integers(0, 60), number, number, number, number).filter(any)
AGES = st.lists(st.integers(0, 400 * DAY), min_size=1, max_size=40, unique=True)


@given(AGES, POLICIES, st.data())
def test_no_policy_removes_the_newest_or_the_proved_one(
    ages: list[int], policy: Policy, data: st.DataObject
) -> None:
    items = [item(age / DAY, is_remote=age % 3 == 0) for age in ages]
    proved = data.draw(st.sampled_from(items)).backup_id
    found = kept(items, policy, proved=proved)
    newest = max(items, key=lambda each: each.made_at_us)
    assert {newest.backup_id, proved} <= set(found)
    young = {
        each.backup_id for each in items if NOW_US - each.made_at_us <= policy.days * DAY * 1e6
    }
    assert not policy.days or young <= set(found)
    again = [each for each in items if each.backup_id in found]
    assert kept(again, policy, proved=proved) == found  # nothing more goes the next time


# -- removing -------------------------------------------------------------------------------------


class StrictPlace(FolderPlace):
    """Some of its things are locked, some cannot be reached."""

    locked = ""
    away = ""

    async def remove(self, name: str) -> None:
        if self.locked and self.locked in name:
            raise Denied(f"{name} is locked until tomorrow")
        if self.away and self.away in name:
            raise StoreUnavailable(f"{name}: it does not answer")
        await super().remove(name)


def placed(folder: Path, days: Sequence[float]) -> list[str]:
    """Files of such ages; their ids."""
    folder.mkdir(exist_ok=True)
    for backup_id in ids(*days):
        (folder / f"{backup_id}.tar.gz").write_bytes(b"x")
    return ids(*days)


def there(folder: Path) -> list[str]:
    return sorted((each.name.removesuffix(".tar.gz") for each in folder.iterdir()), reverse=True)


async def test_what_the_plan_says_is_removed_in_both_places(tmp_path: Path) -> None:
    here, far = tmp_path / "b", tmp_path / "p"
    placed(here, (1, 50, 70, 90))
    placed(far, (1, 50, 60))
    (here / "somebody-elses.tar.gz").write_bytes(b"x")
    catalogue = Catalogue(here, FolderPlace(far))
    verdicts = plan(await catalogue.items(), now_us=NOW_US, policy=Policy(days=30))
    assert len(there(here)) == 5  # a plan removes nothing
    done = await execute(verdicts, catalogue.place)
    assert done.trouble == []
    assert there(far) == ids(1)
    assert there(here) == ["somebody-elses.tar.gz".removesuffix(".tar.gz"), *ids(1)]


async def test_what_is_locked_or_away_stays_in_both_places_and_is_said(tmp_path: Path) -> None:
    here, far = tmp_path / "b", tmp_path / "p"
    locked, away = placed(here, (1, 50, 60, 70))[1:3]
    placed(far, (1, 50, 60, 70))
    place = StrictPlace(far)
    place.locked, place.away = locked, away
    verdicts = plan(await Catalogue(here, place).items(), now_us=NOW_US, policy=Policy(days=30))
    done = await execute(verdicts, place)
    assert there(here) == there(far) == ids(1, 50, 60)
    why = {each.item.backup_id: (each.is_kept, each.why) for each in done.verdicts}
    assert why[locked] == (True, f"{locked}.tar.gz is locked until tomorrow")
    assert why[away][0]
    assert len(done.trouble) == 1
    assert "does not answer" in done.trouble[0]


# -- lists, and one of them by name ---------------------------------------------------------------


async def test_a_list_joins_both_places_newest_first(tmp_path: Path) -> None:
    here, far = tmp_path / "b", tmp_path / "p"
    placed(here, (1, 3))
    placed(far, (3, 2))
    (far / f"{PREFIX}old").mkdir()
    (far / f"{PREFIX}old" / f"{PREFIX}20260101_000000.tar.gz").write_bytes(b"x")
    (here / f"{PREFIX}20260101_000000.tar.bz2").write_bytes(b"x")
    records = {
        "proved": {"backup_id": ids(3)[0], "at": 5},
        "verified": {"backup_id": ids(1)[0], "at": 5, "all": {ids(1)[0]: 5, ids(2)[0]: 4}},
    }
    catalogue = Catalogue(here, FolderPlace(far), read_marks(records))
    found = await catalogue.items()
    assert [each.backup_id for each in found] == ids(1, 2, 3)
    assert [each.file is not None for each in found] == [True, False, True]
    assert [each.is_remote for each in found] == [False, True, True]
    assert [each.is_proved for each in found] == [False, False, True]
    assert [each.is_verified for each in found] == [True, True, False]
    assert await Catalogue(tmp_path / "none").items() == []
    assert read_marks({}).proved == frozenset()


async def test_a_backup_is_found_by_every_name(tmp_path: Path) -> None:
    here, far = tmp_path / "b", tmp_path / "p"
    placed(here, (1, 3))
    placed(far, (2,))
    catalogue = Catalogue(here, FolderPlace(far), open_place=lambda _: FolderPlace(far))
    [second] = ids(2)
    for name in (second, f"{second}.tar.gz", second.removeprefix(PREFIX)):
        assert (await catalogue.find(name)).backup_id == second
    assert (await catalogue.find("latest")).backup_id == ids(1)[0]
    path = here / f"{ids(3)[0]}.tar.gz"
    assert (await catalogue.find(str(path))).file == path
    far_one = await catalogue.find(f"s3://bucket/x/{second}.tar.gz")
    async with catalogue.fetched(far_one) as file:
        assert file.read_bytes() == b"x"
    assert not file.exists()
    for name in ("nothing", str(here / "nothing"), "s3://bucket/nothing", "s3://bucket"):
        with pytest.raises(NotFound):
            await catalogue.find(name)
    with pytest.raises(NotFound, match="none at all"):
        await Catalogue(tmp_path / "none").find("latest")


# -- real ones ------------------------------------------------------------------------------------

KEY = pyrage.x25519.Identity.generate()
AGED = Limits(age_s_max=3600.0)


async def made(folder: Path, place: FolderPlace, *, is_sealed: bool = False) -> Made:
    who = [str(KEY.to_public())] * 2 if is_sealed else []
    async with sqlite_store(folder / "live.db") as store:
        return await backed_up(store, options(folder / "b", recipients=who), place)


def unlink(file: Path) -> None:
    file.unlink()


def bad(findings: Sequence[Finding]) -> list[str]:
    return [each.name for each in findings if not each.is_good]


@pytest.mark.parametrize("is_sealed", [False, True])
async def test_a_far_backup_is_shown_by_its_beginning(tmp_path: Path, is_sealed: bool) -> None:
    place = FolderPlace(tmp_path / "p")
    one = await made(tmp_path, place, is_sealed=is_sealed)
    unlink(one.file)
    catalogue = Catalogue(tmp_path / "b", place)
    found = await catalogue.find("latest")
    assert found.file is None
    assert await catalogue.show(found, [KEY]) == one.manifest
    (tmp_path / "p" / one.file.name).write_bytes(b"")
    with pytest.raises(StoreDamaged):
        await catalogue.show(found, [KEY])


async def test_a_check_finds_what_is_wrong(tmp_path: Path) -> None:
    place = FolderPlace(tmp_path / "p")
    catalogue = Catalogue(tmp_path / "b", place)
    assert "last backup" in bad(await check(catalogue, now_us=NOW_US, limits=AGED))
    one = await made(tmp_path, place, is_sealed=True)
    now_us = listing.made_at_us(one.manifest.backup_id) + 60 * 1_000_000
    assert bad(await check(catalogue, now_us=now_us, limits=AGED, keys=[KEY])) == []
    assert bad(await check(catalogue, now_us=now_us, limits=AGED)) == ["key"]
    late = now_us + 3600 * 1_000_000
    assert bad(await check(catalogue, now_us=late, limits=AGED, keys=[KEY])) == ["last backup"]
    proof = Limits(3600.0, 3600.0)
    assert bad(await check(catalogue, now_us=now_us, limits=proof, keys=[KEY])) == ["last proof"]
    unlink(tmp_path / "p" / one.file.name)
    lacks = bad(await check(catalogue, now_us=now_us, limits=AGED, keys=[KEY]))
    assert lacks == ["newest in the second place"]
    more = [Finding("wal", False, "a gap")]
    assert "wal" in bad(await check(catalogue, now_us=now_us, limits=AGED, more=more))


async def test_a_place_that_is_away_is_a_finding_and_the_rest_is_checked(tmp_path: Path) -> None:
    class Away(FolderPlace):
        async def list(self, prefix: str = "") -> Sequence[Kept]:
            raise StoreUnavailable("it does not answer")

    one = await made(tmp_path, FolderPlace(tmp_path / "p"))
    catalogue = Catalogue(tmp_path / "b", Away(tmp_path / "p"))
    now_us = listing.made_at_us(one.manifest.backup_id)
    found = await check(catalogue, now_us=now_us, limits=AGED)
    assert "second place" in bad(found)
    assert {each.name for each in found if each.is_good} == {"last backup", "newest readable"}

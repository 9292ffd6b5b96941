"""A region is gone, and with it the database's primary."""

from pathlib import Path

from tests.disaster_recovery.drilling import DISASTER, drill, needs_root

pytestmark = [*DISASTER, needs_root]


def test_the_other_region_goes_on_by_itself(tmp_path: Path) -> None:
    run = drill("region_active_active_primary_lost", tmp_path, against="lab")
    assert run["affected_runs"] > 0
    assert run["recovery_point_entries"] == 0
    assert run["marks"]["t5"] < run["marks"]["t7"] < run["marks"]["t8"]
    assert any("leads again" in text for text in run["evidence"])


def test_a_region_that_stood_by_takes_the_work(tmp_path: Path) -> None:
    run = drill("region_active_passive", tmp_path, against="lab")
    assert run["affected_runs"] > 0
    assert run["recovery_point_entries"] == 0
    assert run["facts"]["regions"] == {"a": "standby", "b": "active"}


def test_a_client_leaves_a_name_that_leads_nowhere(tmp_path: Path) -> None:
    run = drill("region_client_stale_name", tmp_path, against="lab")
    assert run["affected_runs"] > 0
    assert run["refused_requests"] == 0

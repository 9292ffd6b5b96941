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

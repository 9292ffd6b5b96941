"""A node does not reach the database any more."""

from pathlib import Path

from tests.disaster_recovery.drilling import DISASTER, drill, needs_root

pytestmark = [*DISASTER, needs_root]


def test_the_other_node_takes_its_runs_and_nothing_is_done_twice(tmp_path: Path) -> None:
    run = drill("network_partition_both_ways", tmp_path, against="lab")
    assert run["affected_runs"] > 0
    assert run["recovery_point_entries"] == 0

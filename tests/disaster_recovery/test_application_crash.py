"""The process dies."""

from pathlib import Path

from tests.disaster_recovery.drilling import DISASTER, drill

pytestmark = DISASTER


def test_its_runs_go_on_when_it_is_started_again(tmp_path: Path) -> None:
    run = drill("application_single_node_restart", tmp_path)
    assert run["affected_runs"] > 0
    assert run["recovery_point_entries"] == 0

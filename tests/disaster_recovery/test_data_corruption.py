"""A bit flips in what is recorded."""

from pathlib import Path

from tests.disaster_recovery.drilling import DISASTER, drill

pytestmark = DISASTER


def test_only_the_damaged_runs_do_anything_again(tmp_path: Path) -> None:
    run = drill("data_corrupted_run_state", tmp_path)
    assert run["affected_runs"] > 0

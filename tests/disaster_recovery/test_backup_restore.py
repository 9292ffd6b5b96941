"""The database is gone, and there is a backup."""

from pathlib import Path

from tests.disaster_recovery.drilling import DISASTER, drill

pytestmark = DISASTER


def test_what_the_backup_holds_goes_on(tmp_path: Path) -> None:
    run = drill("backup_restore_full", tmp_path)
    assert run["affected_runs"] > 0

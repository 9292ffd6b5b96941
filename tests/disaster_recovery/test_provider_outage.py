"""The provider answers with errors."""

from pathlib import Path

from tests.disaster_recovery.drilling import DISASTER, drill

pytestmark = DISASTER


def test_no_run_fails_for_it(tmp_path: Path) -> None:
    run = drill("provider_server_errors", tmp_path, "load.in_flight=60")
    assert run["affected_runs"] > 0
    assert run["counts"]["runs_accepted"] > run["affected_runs"]

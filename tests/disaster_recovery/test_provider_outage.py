"""The provider answers with errors."""

from pathlib import Path

from tests.disaster_recovery.drilling import DISASTER, drill

pytestmark = DISASTER


def test_no_run_fails_for_it(tmp_path: Path) -> None:
    run = drill("provider_server_errors", tmp_path, "load.in_flight=60")
    assert run["affected_runs"] > 0
    assert run["counts"]["runs_accepted"] > run["affected_runs"]


def test_with_a_fallback_no_run_is_parked_and_none_fails(tmp_path: Path) -> None:
    run = drill("provider_down_fallback", tmp_path, "heal.after_s=5")
    assert run["affected_runs"] > 0
    assert run["counts"]["claimed_again"] == 0
    assert run["respent"]["tokens"] > 0
    assert run["respent_usd"] > 0

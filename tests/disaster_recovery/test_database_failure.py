"""The database is not there, dies, or its host does: three of the eight objectives."""

from pathlib import Path

import pytest

from tests.disaster_recovery.drilling import DISASTER, drill, needs_root

pytestmark = [*DISASTER, needs_root]


@pytest.mark.parametrize(
    "scenario",
    [
        "database_connection_loss_refused",
        "database_crash_during_execution",
        "database_primary_failover",
    ],
)
def test_what_was_acknowledged_is_there_and_the_runs_go_on(scenario: str, tmp_path: Path) -> None:
    before = _namespaces()
    run = drill(scenario, tmp_path, against="lab")
    assert run["affected_runs"] > 0
    assert run["recovery_point_entries"] == 0
    assert _namespaces() <= before, "a lab is left"


def _namespaces() -> set[Path]:
    """Labs of others may be there, also dead ones: a machine is not ours alone."""
    return set(Path("/run/netns").glob("llmo*"))

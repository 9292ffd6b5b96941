"""What a drill takes for said: an alert's condition on a page of metrics."""

from __future__ import annotations

import pytest

from llm_orchestrator.drill.scenario import Seen
from llm_orchestrator.drill.seen import holds

PAGE = """\
# HELP llm_orchestrator_archive_degraded 1 if it is away
# TYPE llm_orchestrator_archive_degraded gauge
llm_orchestrator_archive_degraded 1.0
llm_orchestrator_failed 1.764e+09
llm_orchestrator_done 1.763e+09
llm_orchestrator_exposure_seconds{mechanism="backup"} 130.0
"""


@pytest.mark.parametrize(
    ("metric", "above", "is_said"),
    [
        ("archive_degraded", 0.0, True),
        ("archive_degraded", 1.0, False),
        ("failed", "done", True),
        ("done", "failed", False),
        ('exposure_seconds{mechanism="backup"}', 120.0, True),
        ('exposure_seconds{mechanism="archive"}', 120.0, False),
        ("no_such", 0.0, False),
        ("failed", "no_such", False),
    ],
)
def test_a_condition_holds_only_for_samples_that_are_there(
    metric: str, above: float | str, is_said: bool
) -> None:
    assert holds(Seen(metric=metric, above=above, within_s=1.0), PAGE) is is_said

"""The eight recovery objectives that we inherit, and what the drills say of each.

The outer limits come from the system that inspired us, which promised them; a scenario's own goal
is ours, and stricter. An objective is *met* when each of its scenarios was measured, lost nothing
beyond its point, and recovered within the limit in every run; *missed* when one did not; *open*
when one was not measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from llm_orchestrator.drill.scenario import load_one
from llm_orchestrator.recovery.readiness import DEFAULTS, Objective

Json = Any


TITLES = {
    "application_crash": "Application crash",
    "database_connection_loss": "Database connection loss",
    "database_crash": "Database crash",
    "database_failover": "Database failover",
    "network_partition": "Network partition",
    "data_corruption": "Data corruption",
    "backup_restore": "Backup and restore",
    "multi_region_failover": "Multi-region failover",
}
SCENARIOS: Mapping[str, Sequence[str]] = {
    "application_crash": ("application_sigkill_second_node", "application_single_node_restart"),
    "database_connection_loss": (
        "database_connection_loss_refused",
        "database_connection_loss_black_hole",
    ),
    "database_crash": ("database_crash_during_execution",),
    "database_failover": ("database_primary_failover",),
    "network_partition": ("network_partition_both_ways", "network_split_brain"),
    "data_corruption": ("data_corrupted_run_state", "data_json_damage", "data_missing_entry"),
    "backup_restore": ("backup_restore_full", "backup_point_in_time"),
    "multi_region_failover": (
        "region_active_active_primary_lost",
        "region_active_active_primary_elsewhere",
        "region_active_passive",
        "region_failback",
    ),
}
"""Which scenarios speak of an objective."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What was measured for an objective: all runs of its scenarios together, seconds."""

    id: str
    limits: Objective
    status: str
    times_s: Sequence[float]
    points_s: Sequence[float]
    goals_s: Sequence[float]

    @property
    def shown(self) -> str:
        """Median, 95th percentile and worst, or that there is no measurement."""
        if not self.times_s:
            return "not measured"
        shown = " / ".join(f"{each:.2f}" for each in spread_of(self.times_s))
        return f"{shown} s (n = {len(self.times_s)})"

    @property
    def point(self) -> str:
        """The age of the oldest acknowledged work that was lost in any run."""
        return f"{max(self.points_s):.1f} s" if self.points_s else "not measured"


def spread_of(times_s: Sequence[float]) -> tuple[float, float, float]:
    """Median, 95th percentile, worst; of fewer than twenty values the last two are the same."""
    found = sorted(times_s)
    return median(found), found[math.ceil(len(found) * 0.95) - 1], found[-1]


def standings(
    results: Mapping[str, Mapping[str, Json]], limits: Mapping[str, Objective] = DEFAULTS
) -> list[Standing]:
    """Each objective against the results at hand; trials and inconclusive ones do not count."""
    found = []
    for name_of, scenarios in SCENARIOS.items():
        measured = [
            results[name]
            for name in scenarios
            if name in results
            and not results[name]["overrides"]
            and results[name]["summary"]["status"] != "inconclusive"
        ]
        runs = [run for result in measured for run in result["runs"]]
        times = [t for run in runs if (t := run["recovery_time_s"]) is not None]
        points = [p for run in runs if (p := run["recovery_point_s"]) is not None]
        found.append(
            Standing(
                name_of,
                limits[name_of],
                _status(limits[name_of], runs, is_whole=len(measured) == len(scenarios)),
                times,
                points,
                [load_one(name).objectives.recovery_time_s for name in scenarios],
            )
        )
    return found


def _status(objective: Objective, runs: Sequence[Mapping[str, Json]], *, is_whole: bool) -> str:
    is_kept = all(
        run["status"] in ("passed", "missed")
        and run["recovery_time_s"] is not None
        and run["recovery_time_s"] <= objective.rto_s
        and (run["recovery_point_s"] or 0.0) <= objective.rpo_s
        for run in runs
    )
    if not is_kept:
        return "missed"
    return "met" if is_whole else "open"

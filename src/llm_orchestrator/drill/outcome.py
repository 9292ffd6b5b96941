"""What came of one run of a scenario, and what it fell short of, in words. Nothing here acts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llm_orchestrator.drill.marks import Marks
from llm_orchestrator.drill.money import dollars
from llm_orchestrator.drill.scenario import Scenario

Json = Any
PASSED, MISSED, INCONCLUSIVE, LOST = "passed", "missed", "inconclusive", "lost"
EXIT_CODES = {PASSED: 0, MISSED: 6, INCONCLUSIVE: 7, LOST: 8}


@dataclass
class Outcome:
    """What came of one run of a scenario."""

    status: str = INCONCLUSIVE
    reasons: list[str] = field(default_factory=list)
    marks: Marks = field(default_factory=Marks)
    verdict: dict[str, Json] = field(default_factory=dict)
    baseline: dict[str, Json] = field(default_factory=dict)
    evidence: list[str] = field(default_factory=list)
    sights: list[str] = field(default_factory=list)
    facts: dict[str, Json] = field(default_factory=dict)
    affected: int = 0
    refused: int = 0
    not_judged: list[str] = field(default_factory=list)
    """What nobody could see: about that the status says nothing."""

    def plain(self) -> dict[str, Json]:
        """As JSON: times in seconds from t0."""
        return {
            "status": self.status,
            "reasons": self.reasons,
            "recovery_time_s": _rounded(self.marks.recovery_time_s),
            "recovery_point_s": _rounded(self.verdict.get("lost_s")),
            "recovery_point_entries": self.verdict.get("lost_entries"),
            "marks": self.marks.relative(),
            "parts": self.marks.parts(),
            "affected_runs": self.affected,
            "refused_requests": self.refused,
            "counts": self.verdict.get("counts", {}),
            "respent": self.verdict.get("respent", {}),
            "respent_usd": dollars(self.verdict.get("respent_by", {})),
            "not_judged": self.not_judged,
            "findings": list(self.verdict.get("findings", ()))[:50],
            "findings_total": len(self.verdict.get("findings", ())),
            "baseline": self.baseline,
            "evidence": self.evidence,
            "sights": self.sights,
            "facts": self.facts,
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def shortfalls(
    scenario: Scenario, outcome: Outcome, *, is_damaged: bool, deaths: int | None
) -> list[str]:
    """What was promised and not kept, in words."""
    goals, found = scenario.objectives, []
    took_s = outcome.marks.recovery_time_s
    if took_s is None:
        found.append(f"it did not recover within {scenario.limits.recover_s:g} s")
    elif took_s > goals.recovery_time_s:
        found.append(f"recovery took {took_s:.2f} s, the goal is {goals.recovery_time_s:g} s")
    verdict = outcome.verdict
    if goals.recovery_point_s == 0 and verdict["lost_entries"] > goals.recovery_point_entries:
        if not is_damaged:
            found.append(f"{verdict['lost_entries']} acknowledged entries are lost")
    elif verdict["lost_s"] > goals.recovery_point_s > 0:
        found.append(f"work of {verdict['lost_s']:.1f} s is lost")
    expect = scenario.expect
    if expect.has_outage is False and outcome.refused:
        found.append(f"{outcome.refused} requests were refused, and none was to be")
    if expect.node_deaths is not None and deaths is None:
        outcome.not_judged.append(f"whether nodes died {expect.node_deaths} times")
    elif expect.node_deaths is not None and deaths != expect.node_deaths:
        found.append(f"nodes died {deaths} times, not {expect.node_deaths}")
    again = verdict["counts"]["claimed_again"]
    if expect.claimed_again is not None and again > expect.claimed_again:
        found.append(f"{again} runs were claimed again, at most {expect.claimed_again} may be")
    found += [
        f"{finding['kind']} {finding['run_id']}: {finding['text']}"
        for finding in verdict["findings"][:5]
    ]
    return found

"""Fill what the pages of docs/disaster_recovery say of drills, from the stored results.

Usage: make docs      (or .venv/bin/python scripts/recovery_docs.py; --check only compares)

Between `<!-- generated: NAME -->` and `<!-- end -->` stands what this makes; tests/test_dr_docs.py
fails when it differs. RECOVERY_METRICS.md as a whole is `llmo drill report`'s.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_orchestrator.drill import report_detail as detail
from llm_orchestrator.drill.report import read
from llm_orchestrator.drill.scenario import load_all, load_one

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / "docs" / "disaster_recovery"
RESULTS = PLACE / "results"
PAGES = ("README.md", "DR_RUNBOOK.md", "DR_PROCEDURES.md")
_PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_SECTION = re.compile(r"^### (.+)$")
Results = Mapping[str, Mapping[str, Any]]
_HANG = 3


def objectives(results: Results) -> str:
    return detail.table(detail.objectives(results))


def guideline(results: Results) -> str:
    """Scenarios that were measured: how long it took, and when to begin by hand."""
    rows: list[Sequence[object]] = [("scenario", "measured, worst", "begin by hand after")]
    for name in load_all():
        times = (results.get(name) or {}).get("summary", {}).get("recovery_time_s")
        if times and not results[name]["overrides"]:
            limit_s = max(times["max"], load_one(name).objectives.recovery_time_s) * _HANG
            rows.append((f"`{name}`", f"{times['max']:.1f} s", f"{limit_s:.0f} s"))
    return detail.table(rows) if len(rows) > 1 else "Nothing was measured yet."


def scenarios(results: Results) -> str:
    """Every scenario, the alerts whose sections name it, its goal, and what was measured."""
    sections = alerts_of((PLACE / "DR_PROCEDURES.md").read_text())
    rows: list[Sequence[object]] = [
        ("scenario", "what happens", "sections", "RTO", "RPO", "measured")
    ]
    for name in load_all():
        scenario = load_one(name)
        times = (results.get(name) or {}).get("summary", {}).get("recovery_time_s")
        is_measured = times and not results[name]["overrides"]
        found = ", ".join(f"[{each}](#{slug(each)})" for each in sections.get(name, []))
        since = " from healing" if scenario.measure_from == "heal" else ""
        rows.append(
            (
                f"`{name}`",
                scenario.title,
                found or "-",
                f"{scenario.objectives.recovery_time_s:g} s{since}",
                f"{scenario.objectives.recovery_point_s:g} s",
                f"{times['max']:.1f} s" if is_measured else "not measured",
            )
        )
    return detail.table(rows)


def slug(heading: str) -> str:
    """Its anchor on the page."""
    return heading.lower().replace(" ", "-")


def alerts_of(page: str) -> dict[str, list[str]]:
    """Which sections of the procedures name a scenario."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in page.splitlines():
        if match := _SECTION.match(line):
            section = match.group(1)
        elif section and not line.startswith("|"):
            for name in re.findall(r"`((?:[a-z]+_)+[a-z]+)`", line):
                if section not in found.setdefault(name, []):
                    found[name].append(section)
    return found


MAKERS: Mapping[str, Callable[[Results], str]] = {
    "objectives": objectives,
    "guideline": guideline,
    "scenarios": scenarios,
}


def filled(text: str, results: Results) -> str:
    """A page with its generated parts made anew."""
    return _PART.sub(
        lambda part: part.group(1) + MAKERS[part.group(2)](results) + "\n" + part.group(3), text
    )


def main() -> int:
    results = read(RESULTS, "").results
    stale = []
    for name in PAGES:
        path = PLACE / name
        text = path.read_text()
        fresh = filled(text, results)
        if fresh != text:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(fresh)
    for name in stale:
        print(f"{'stale' if '--check' in sys.argv else 'written'}: {name}")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())

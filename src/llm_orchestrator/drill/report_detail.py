"""The longer half of the report: classes, objectives, each scenario's marks, what would be next.

Everything follows from the result files by the rules that stand here; nothing is typed in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from llm_orchestrator.drill.marks import NAMES
from llm_orchestrator.drill.objectives import TITLES, Standing, spread_of, standings

Json = Any
Results = Mapping[str, Mapping[str, Json]]
Row = Sequence[object]
_NEXT = {
    "detect": "who notices, and how soon: leases, probes, the clients' own time limits",
    "decide": "what has to be agreed on before anything is done",
    "promote": "the change of the primary: Patroni's `ttl` and `loop_wait`",
    "verify": "what begins again once the store can be written: claims, replay, breakers",
    "work off": "the backlog: it is worked off at the speed of the provider",
}


def verdict(results: Results) -> str:
    """One sentence, by rule: what was lost or done twice counts before what was late."""
    measured = {
        name: result
        for name, result in results.items()
        if not result["overrides"] and result["summary"]["status"] != "inconclusive"
    }
    if not measured:
        return "No verdict: nothing was measured."
    by_status: dict[str, list[str]] = {}
    for name, result in measured.items():
        by_status.setdefault(result["summary"]["status"], []).append(f"`{name}`")
    lost, late = by_status.get("lost", []), by_status.get("missed", [])
    if lost:
        return f"**Not fit**: acknowledged work was lost, doubled or wrong in {', '.join(lost)}."
    total = (
        f"{len(measured)} scenarios were measured; in none was anything lost that was promised (a"
        " restore goes back to its backup, a damaged entry is done again), or done twice"
    )
    if late:
        return f"**Safe, not always in time**: {total}. Later than their goals: {', '.join(late)}."
    return f"**Fit**: {total}, and all met their goals."


def classes(results: Results) -> Iterable[Row]:
    """Runs that passed, by class."""
    yield "class", "scenarios", "runs", "passed", "late", "lost or doubled", "inconclusive"
    found: dict[str, list[Mapping[str, Json]]] = {}
    for result in results.values():
        found.setdefault(result["scenario"]["class"], []).append(result)
    for name, some in found.items():
        statuses = [run["status"] for result in some for run in result["runs"]]
        counts = [statuses.count(word) for word in ("passed", "missed", "lost", "inconclusive")]
        yield name, len(some), len(statuses), *counts


def objectives(results: Results) -> Iterable[Row]:
    """The eight objectives: outer limit, our goal, what was measured."""
    yield (
        "objective",
        "RTO, at most",
        "our goal",
        "measured: median / p95 / worst",
        "RPO, at most",
        "measured",
        "",
    )
    for standing in standings(results):
        yield _objective(standing)


def _objective(standing: Standing) -> Row:
    limits = standing.limits
    goals = sorted(set(standing.goals_s))
    return (
        TITLES[standing.id],
        f"{limits.rto_s:g} s",
        ", ".join(f"{goal:g}" for goal in goals) + " s" if goals else "-",
        standing.shown,
        f"{limits.rpo_s:g} s",
        standing.point,
        standing.status,
    )


def details(results: Results) -> Iterable[str]:
    """Each scenario: when, how often, its marks, what it cost, how to do it again."""
    for name, result in results.items():
        yield f"### {name}"
        yield from _detail(name, result)


def _detail(name: str, result: Mapping[str, Json]) -> Iterable[str]:
    runs = [run for run in result["runs"] if run["status"] != "inconclusive"]
    scenario, goal_s = result["scenario"], result["scenario"]["objectives"]["recovery_time_s"]
    if not runs:
        yield "Inconclusive: " + "; ".join(r for run in result["runs"] for r in run["reasons"])
        return
    times = [t for run in runs if (t := run["recovery_time_s"]) is not None]
    shown = " / ".join(f"{each:.2f}" for each in spread_of(times)) + " s" if times else "never"
    since = "the healing" if scenario["measure_from"] == "heal" else "the fault"
    affected = ", ".join(str(run["affected_runs"]) for run in runs)
    ended = "yes" if all("t6" in run["marks"] for run in runs) else "no"
    lost = max(run.get("recovery_point_entries") or 0 for run in runs)
    calls, tokens, refused = (
        sum(run["respent"].get(word, 0) for run in runs)
        for word in ("calls", "tokens", "refused_calls")
    )
    what = f"target `{result['target']}`, commit `{result['commit'][:12] or 'unknown'}`"
    lines = (
        f"{scenario['title']}.",
        f"{result['finished_at']}, {what}, n = {len(runs)}: {result['summary']['status']}.",
        f"Recovery time, median / p95 / worst: {shown}, from {since}; goal {goal_s:g} s.",
        f"Runs affected: {affected}; all of them ended: {ended}. Entries lost: {lost}.",
        f"Made again: {calls} calls, {tokens} tokens, {_price(runs)}; not whole: {refused} calls.",
        f"Again: `llmo drill run {name}`.",
    )
    yield "\n".join(f"- {line}" for line in lines)
    yield table(_marks(runs))
    late = [reason for run in runs for reason in run["reasons"]]
    if late:
        yield "\n".join(f"- {reason}" for reason in dict.fromkeys(late))


def _price(runs: Sequence[Mapping[str, Json]]) -> str:
    """What was paid again, in dollars; a result of before prices were asked has none."""
    found = [run.get("respent_usd") for run in runs]
    prices = [each for each in found if each is not None]
    return f"{sum(prices):.4f} USD" if len(prices) == len(found) else "without a price"


def _marks(runs: Sequence[Mapping[str, Json]]) -> Iterable[Row]:
    names = [name for name in NAMES if any(name in run["marks"] for run in runs)]
    yield ("", *(f"{name} {NAMES[name]}" for name in names))
    middle = [median(run["marks"][name] for run in runs if name in run["marks"]) for name in names]
    yield ("seconds, median", *(f"{value:.2f}" for value in middle))


def recommendations(results: Results) -> Iterable[str]:
    """The largest part of each recovery that was later than its goal, and what to look at."""
    for name, result in results.items():
        late = [run for run in result["runs"] if run["status"] == "missed" and run["parts"]]
        if not late:
            continue
        parts = {
            part: median(run["parts"][part] for run in late if part in run["parts"])
            for part in _NEXT
            if any(part in run["parts"] for run in late) and part != "work off"
        }
        if parts:
            worst = max(parts, key=parts.__getitem__)
            advice = _NEXT[worst]
            if worst == "promote" and result["target"] == "single":
                advice = "the start of the process: imports, opening the store, the first claim"
            yield f"- `{name}`: {parts[worst]:.2f} s of it to {worst}: {advice}."


def table(rows: Iterable[Row]) -> str:
    """As Markdown; the first row is the head."""
    lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * (lines[0].count(" | ") + 1), *lines[1:]])

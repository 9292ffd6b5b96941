"""From measurements to the table: medians with their range, beside peers, ideal and goals."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

WORKS = ["W1", "W2", "W3", "W4", "W5", "W6", "W7"]
NAMES = ("ours", "ideal", "dbos", "langgraph")


class Result(NamedTuple):
    """One measurement."""

    contestant: str
    work: str
    round: int
    fields: dict[str, float]


class Line(NamedTuple):
    """One line of the table: a field of a workload, and what we want of it."""

    work: str
    field: str
    title: str
    goal: float | None = None
    more_is_better: bool = False


LINES = (
    Line("W1", "steps_s", "W1 500 runs x 10 steps, steps/s", 10_000, more_is_better=True),
    Line("W1", "cpu_ms_step", "W1 processor ms per step", 0.08),
    Line("W1", "rows_commit", "W1 journal rows per commit"),
    Line("W2", "ms_step", "W2 200 steps in sequence, ms per step", 0.6),
    Line("W2", "cpu_ms_step", "W2 processor ms per step"),
    Line("W3", "wall_s", "W3 500 parallel steps and a join, s", 0.1),
    Line("W4", "steps_s", "W4 as W1 with 20 KB results, steps/s", 2_000, more_is_better=True),
    Line("W4", "cpu_ms_step", "W4 processor ms per step"),
    Line("W5", "s", "W5 1,000 runs, kill -9, all advanced, s", 2.0),
    Line("W6", "kb_run", "W6 10,000 waiting runs, KB per run", 0.2),
    Line("W6", "all_waiting_s", "W6 until all are waiting, s"),
    Line("W7", "import_s", "W7 import, s", 0.15),
    Line("W7", "hello_s", "W7 process start to finished run, s", 0.4),
)
TIMES_BEST_PEER = 20.0


def table(results: Sequence[Result], works: Sequence[str]) -> str:
    """Markdown: one line per number."""
    rows = [["what", *NAMES, "goal", "verdict"]]
    for line in LINES:
        if line.work in works:
            values = {name: _values(results, line, name) for name in NAMES}
            rows.append(_row(line, values))
    if "W1" in works:
        rows.append(_times(results))
    parts = [_align(rows), _canary(results)]
    return "\n\n".join(parts)


def _values(results: Sequence[Result], line: Line, name: str) -> list[float]:
    return sorted(
        result.fields[line.field]
        for result in results
        if result.work == line.work and result.contestant == name and line.field in result.fields
    )


def _row(line: Line, values: dict[str, list[float]]) -> list[str]:
    cells = [_spread(values[name]) for name in NAMES]
    goal = (
        "" if line.goal is None else f"{'>=' if line.more_is_better else '<='} {_show(line.goal)}"
    )
    return [line.title, *cells, goal, _verdict(line, values["ours"])]


def _verdict(line: Line, ours: Sequence[float]) -> str:
    """Met or missed, by the median, and by how much."""
    if line.goal is None or not ours:
        return ""
    ratio = median(ours) / line.goal
    is_met = ratio >= 1 if line.more_is_better else ratio <= 1
    return f"{'met' if is_met else 'missed'} ({(ratio - 1) * 100:+.0f} %)"


def _times(results: Sequence[Result]) -> list[str]:
    """How many times the best peer of this session."""
    line = LINES[0]
    ours = _values(results, line, "ours")
    peers = [median(v) for name in NAMES[2:] if (v := _values(results, line, name))]
    if not ours or not peers:
        return ["W1 times the best peer", "", "", "", "", f">= {TIMES_BEST_PEER:g}", ""]
    times = median(ours) / max(peers)
    verdict = "met" if times >= TIMES_BEST_PEER else "missed"
    return [
        "W1 times the best peer",
        f"{times:.1f}",
        "",
        "",
        "",
        f">= {TIMES_BEST_PEER:g}",
        verdict,
    ]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return _show(values[0])
    return f"{_show(median(values))} [{_show(values[0])}..{_show(values[-1])}]"


def _show(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _canary(results: Sequence[Result]) -> str:
    def spread(name: str) -> str:
        return _spread(sorted(result.fields[name] for result in results))

    if not results:
        return "nothing was measured"
    return (
        f"machine: fdatasync {spread('fsync_us')} us, a loop of 1,000,000 additions "
        f"{spread('loop_ms')} ms, load {spread('load1')}"
    )


def _align(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def pad(row: Sequence[str]) -> str:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        return f"| {' | '.join(cells)} |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([pad(rows[0]), rule, *map(pad, rows[1:])])

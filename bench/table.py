"""From measurements to the table: medians with their range, beside peers, ideal and goals."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from bench.contestants import CONTESTANTS, StoreKind
from bench.lines import LINES, TIMES_BEST_PEER, TIMES_RAW, WAL_B_RUN, WAL_B_STEP, Line
from bench.measure import STEPS, STEPS_LONG


class Result(NamedTuple):
    """One measurement."""

    contestant: str
    work: str
    round: int
    fields: dict[str, float]


def table(results: Sequence[Result], kind: StoreKind) -> str:
    """Markdown: one line per number that was measured."""
    names = [one.name for one in CONTESTANTS[kind]]
    peers = [one.name for one in CONTESTANTS[kind] if one.is_peer]
    rows = [["what", *names, "x best peer", "goal", "verdict"]]
    works = {result.work for result in results}
    for line in LINES[kind]:
        if line.work in works:
            values = {name: _values(results, line, name) for name in names}
            rest = [_times_cell(line, values, peers), _goal(line), _verdict(line, values["ours"])]
            rows.append([line.title, *(_spread(values[name]) for name in names), *rest])
    blank = [""] * (len(names) - 1)
    for line, values_of_it in _derived(results, kind, peers):
        end = ["", _goal(line), _verdict(line, values_of_it)]
        rows.append([line.title, _spread(values_of_it), *blank, *end])
    return f"{align(rows)}\n\n{_canary(results)}"


def _values(results: Sequence[Result], line: Line, name: str) -> list[float]:
    return sorted(
        result.fields[line.field]
        for result in results
        if result.work == line.work and result.contestant == name and line.field in result.fields
    )


def _goal(line: Line) -> str:
    if line.goal is None:
        return ""
    return f"{'>=' if line.more_is_better else '<='} {show(line.goal)}"


def _verdict(line: Line, ours: Sequence[float]) -> str:
    """Met or missed, by the median, and by how much."""
    if line.goal is None or not ours:
        return ""
    ratio = median(ours) / line.goal
    is_met = ratio >= 1 if line.more_is_better else ratio <= 1
    return f"{'met' if is_met else 'missed'} ({(ratio - 1) * 100:+.0f} %)"


def _times_cell(line: Line, values: dict[str, list[float]], peers: Sequence[str]) -> str:
    times = _times(line, values, peers)
    return "" if times is None else show(times)


def _times(line: Line, values: dict[str, list[float]], peers: Sequence[str]) -> float | None:
    """How many times better than the best peer of this session, median by median."""
    others = [median(values[name]) for name in peers if values[name]]
    if not values["ours"] or not others:
        return None
    ours = median(values["ours"])
    if line.more_is_better:
        return ours / max(others) if max(others) else None
    return min(others) / ours if ours else None


def _derived(
    results: Sequence[Result], kind: StoreKind, peers: Sequence[str]
) -> list[tuple[Line, list[float]]]:
    """Lines that are made of several measurements: (line, values in order)."""
    found: list[tuple[Line, list[float]]] = []
    first = LINES[kind][0]
    values = {name: _values(results, first, name) for name in ("ours", *peers)}
    times = _times(first, values, peers)
    if times is not None:
        title, goal = "W1 times the best peer", TIMES_BEST_PEER[kind]
        found.append((first._replace(title=title, goal=goal), [times]))
    if kind == "sqlite":
        return found
    raw = _by_round(results, "W2", "ideal", "ms_step")
    ours = _by_round(results, "W2", "ours", "ms_step")
    ratios = sorted(ours[turn] / raw[turn] for turn in ours if turn in raw)
    if ratios:
        title = "W2 times the raw commit of the same round"
        found.append((Line("W2", "", title, TIMES_RAW), ratios))
    short = _by_round(results, "W1", "ours", "wal_b_step")
    long = _by_round(results, "W1.long", "ours", "wal_b_step")
    per_step, per_run = [], []
    for turn in sorted(set(short) & set(long)):
        a_run, a_long_run = short[turn] * STEPS, long[turn] * STEPS_LONG
        a_step = (a_long_run - a_run) / (STEPS_LONG - STEPS)
        per_step.append(a_step)
        per_run.append(a_run - STEPS * a_step)
    if per_step:
        found.append((Line("W1", "", "WAL bytes of a step alone", WAL_B_STEP), sorted(per_step)))
        title = "WAL bytes of a run beside its steps"
        found.append((Line("W1", "", title, WAL_B_RUN), sorted(per_run)))
    return found


def _by_round(results: Sequence[Result], work: str, name: str, field: str) -> dict[int, float]:
    return {
        result.round: result.fields[field]
        for result in results
        if result.work == work and result.contestant == name and field in result.fields
    }


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return show(values[0])
    return f"{show(median(values))} [{show(values[0])}..{show(values[-1])}]"


def show(value: float) -> str:
    if abs(value) >= 100:
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


def align(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def pad(row: Sequence[str]) -> str:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        return f"| {' | '.join(cells)} |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([pad(rows[0]), rule, *map(pad, rows[1:])])

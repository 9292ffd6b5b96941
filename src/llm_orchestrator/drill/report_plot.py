"""The report's pictures, as SVG: a class of scenarios, a run's marks, the spread of its times.

A class is a file of its own that pages embed: it stays black on white, whatever surrounds it, for
an embedded picture does not learn of its page's colours. The other two stand in the report's own
page, take its colour of text, and use colours that are told apart on white and on black (3:1).
What is late differs by shape, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llm_orchestrator.drill.marks import NAMES

Json = Any
Runs = Sequence[Mapping[str, Json]]
_CHAR = 7.3
"""Width of a character at 12 pixels, on the wide side."""
_WIDTH, _ROW, _LEFT, _RIGHT = 760, 24, 320, 80
_GOOD, _LATE, _GOAL, _INK, _FAINT = "#1f4fa3", "#b3261e", "#146c2e", "#111", "#bbb"
_PAGE_WIDTH, _PAGE_LEFT, _LINE = 720, 60, 15
_PAGE_GOOD, _PAGE_LATE, _PAGE_GOAL = "#5b8def", "#d9534f", "#2e9e4f"


def plot(results: Mapping[str, Mapping[str, Json]], category: str) -> str:
    """All runs of a class: a dot for each that was in time, a diamond for others, a goal's bar."""
    some = {n: r for n, r in results.items() if r["scenario"]["class"] == category}
    goals = {n: float(r["scenario"]["objectives"]["recovery_time_s"]) for n, r in some.items()}
    times = {n: _times(r["runs"]) for n, r in some.items()}
    most = max([*goals.values(), *(t for found in times.values() for t in found)]) * 1.05
    scale = (_WIDTH - _LEFT - _RIGHT) / most
    height = len(some) * _ROW + 44
    box = f'viewBox="0 0 {_WIDTH} {height}" role="img" fill="{_INK}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {box} font-family="sans-serif" font-size="12">',
        f"<title>Recovery times of the class {category}</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
    ]
    for place, name in enumerate(some):
        y = place * _ROW + 20
        shown = f"{max(times[name]):.2f} s" if times[name] else "no time"
        parts += [
            f'<text x="{_LEFT - 12}" y="{y + 4}" text-anchor="end"{_fit(name)}>{name}</text>',
            f'<line x1="{_LEFT}" y1="{y}" x2="{_WIDTH - _RIGHT}" y2="{y}" stroke="{_FAINT}"/>',
            *(_dot(_LEFT + t * scale, y, (_GOOD, _LATE)[t > goals[name]]) for t in times[name]),
            _bar(_LEFT + goals[name] * scale, y, _GOAL),
            f'<text x="{_WIDTH - _RIGHT + 12}" y="{y + 4}">{shown}</text>',
        ]
    said = f"seconds from 0 to {most:.0f}; dot: in time, diamond: late, green bar: the goal"
    parts.append(f'<text x="{_WIDTH - 12}" y="{height - 10}" text-anchor="end">{said}</text></svg>')
    return "".join(parts) + "\n"


def timeline(runs: Runs) -> str:
    """One line for each run, its marks on a common scale of seconds from the fault."""
    most = max((at for run in runs for at in run["marks"].values()), default=0.0) or 1.0
    scale = (_PAGE_WIDTH - _PAGE_LEFT - 10) / most
    parts, y = [], _LINE
    for number, run in enumerate(runs, 1):
        placed = {n: _PAGE_LEFT + max(at, 0.0) * scale for n, at in run["marks"].items()}
        texts = {name: f"{name} {run['marks'][name]:.2f}" for name in placed}
        rows = _rows(placed, texts)
        parts += [
            f"<text x='0' y='{y + 4}'>run {number}</text>",
            f"<line x1='{_PAGE_LEFT}' y1='{y}' x2='{_PAGE_WIDTH}' y2='{y}' stroke='#888'/>",
        ]
        for name, x in placed.items():
            row, start = rows[name]
            parts.append(
                f"<circle cx='{x:.1f}' cy='{y}' r='4' fill='{_PAGE_LATE}'><title>{name} "
                f"{NAMES[name]}: {run['marks'][name]:.3f} s</title></circle>"
                f"<text x='{start:.1f}' y='{y + (row + 1) * _LINE + 4}'>{texts[name]}</text>"
            )
        y += (max((row for row, _ in rows.values()), default=0) + 3) * _LINE
    return _page(y, parts)


def spread(runs: Runs, goal_s: float) -> str:
    """Every recovery time as a dot or a diamond, the goal as a bar."""
    times = _times(runs)
    most = max([*times, goal_s]) * 1.1
    scale = (_PAGE_WIDTH - _PAGE_LEFT - 10) / most
    goal = _PAGE_LEFT + goal_s * scale
    said = f"goal {goal_s:g} s"
    parts = [
        "<text x='0' y='24'>times</text>",
        *(
            _dot(
                _PAGE_LEFT + t * scale, 20, (_PAGE_GOOD, _PAGE_LATE)[t > goal_s], said=f"{t:.3f} s"
            )
            for t in times
        ),
        _bar(goal, 20, _PAGE_GOAL),
        f"<text x='{_start(goal, said):.1f}' y='46'>{said}</text>",
    ]
    return _page(52, parts)


def _times(runs: Runs) -> list[float]:
    return [t for run in runs if (t := run["recovery_time_s"]) is not None]


def _page(height: int, parts: Iterable[str]) -> str:
    box = f"viewBox='0 0 {_PAGE_WIDTH} {height}'"
    return f"<svg {box} role='img' fill='currentColor'>{''.join(parts)}</svg>"


def _fit(name: str) -> str:
    """A name that is wider than its column is drawn narrower."""
    room = _LEFT - 24
    return f' textLength="{room}"' if len(name) * _CHAR > room else ""


def _dot(x: float, y: float, colour: str, *, said: str = "") -> str:
    title = f"<title>{said}</title>" if said else ""
    if colour in (_LATE, _PAGE_LATE):
        points = f"{x:.1f},{y - 6} {x + 6:.1f},{y} {x:.1f},{y + 6} {x - 6:.1f},{y}"
        return f'<polygon points="{points}" fill="{colour}">{title}</polygon>'
    return f'<circle cx="{x:.1f}" cy="{y}" r="5" fill="{colour}">{title}</circle>'


def _bar(x: float, y: float, colour: str) -> str:
    ends = f'x1="{x:.1f}" y1="{y - 9}" x2="{x:.1f}" y2="{y + 9}"'
    return f'<line {ends} stroke="{colour}" stroke-width="2.5"/>'


def _start(x: float, text: str) -> float:
    """Where a text at `x` begins so that it ends inside the picture."""
    return min(x, _PAGE_WIDTH - len(text) * _CHAR)


def _rows(placed: Mapping[str, float], texts: Mapping[str, str]) -> dict[str, tuple[int, float]]:
    """For each label the first row in which it touches none before it, and where it begins."""
    ends: list[float] = []
    found = {}
    for name in sorted(placed, key=placed.__getitem__):
        start = _start(placed[name], texts[name])
        free = (row for row, end in enumerate(ends) if end <= start)
        row = next(free, len(ends))
        ends[row : row + 1] = [start + len(texts[name]) * _CHAR]
        found[name] = (row, start)
    return found

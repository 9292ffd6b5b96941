"""What drills have shown, and what one is doing now, as Prometheus' text for a textfile collector.

A drill is no server that could be scraped, and nodes do not know that they are drilled: so it is
written to a file, whole or not at all. Only results are kept; the age of one is the difference of
its time and now, which Prometheus knows better than a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from llm_orchestrator.clock import RealClock
from llm_orchestrator.errors import ConfigError

Json = Any
Results = Mapping[str, Mapping[str, Json]]
PREFIX = "llm_orchestrator_drill_"
STATUSES = ("passed", "missed", "inconclusive", "lost")


class Metric(NamedTuple):
    """One gauge, its labels and meaning."""

    word: str
    labels: tuple[str, ...]
    meaning: str


RESULTS = (
    Metric(
        "recovery_time_seconds",
        ("scenario",),
        "Recovery time of the last drill, the longest of its repeats",
    ),
    Metric("recovery_time_goal_seconds", ("scenario",), "How long it may be"),
    Metric(
        "recovery_point_seconds",
        ("scenario",),
        "Age of the acknowledged work that the last drill lost",
    ),
    Metric("success_ratio", ("scenario",), "Share of the repeats of the last drill that passed"),
    Metric("last_run_timestamp_seconds", ("scenario",), "When the last drill ended, Unix time"),
)
LAST = Metric(
    "last_result",
    ("scenario", "result"),
    "1 for what came of the last drill: passed, missed, lost or inconclusive; 0 for the others",
)
RUNNING = Metric(
    "phase_start_timestamp_seconds",
    ("scenario", "phase"),
    "While a drill runs: since when it does what it does, Unix time. Phases: start, baseline,"
    " fault, recovery, verdict",
)
LEFT = Metric("runs_left", (), "Runs of scenarios that the command has not finished; 0 at its end")
ALL = (*RESULTS, LAST, RUNNING, LEFT)


def as_text(results: Results) -> str:
    """The results; of an inconclusive one nothing but that it was that."""
    return "\n".join(_of_results(results)) + "\n"


def _of_results(results: Results) -> Iterator[str]:
    for metric in RESULTS:
        values = {name: _value(metric.word, result) for name, result in results.items()}
        yield from _gauge(
            metric, [((name,), value) for name, value in values.items() if value is not None]
        )
    yield from _gauge(
        LAST,
        [
            ((name, status), float(result["summary"]["status"] == status))
            for name, result in results.items()
            for status in STATUSES
        ],
    )


def _gauge(metric: Metric, values: Iterable[tuple[Sequence[str], float]]) -> Iterator[str]:
    name = PREFIX + metric.word
    yield f"# HELP {name} {metric.meaning}"
    yield f"# TYPE {name} gauge"
    for given, value in values:
        labels = ",".join(f'{k}="{v}"' for k, v in zip(metric.labels, given, strict=True))
        yield f"{name}{{{labels}}} {_number(value)}" if labels else f"{name} {_number(value)}"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def _value(word: str, result: Mapping[str, Json]) -> float | None:
    summary = result["summary"]
    found: float | None
    if summary["status"] == "inconclusive":
        return None
    match word:
        case "recovery_time_seconds":
            found = summary["recovery_time_s"]["max"] if summary["recovery_time_s"] else None
        case "recovery_time_goal_seconds":
            found = result["scenario"]["objectives"]["recovery_time_s"]
        case "recovery_point_seconds":
            found = summary["recovery_point_s_max"]
        case "success_ratio":
            found = summary["passed"] / summary["n"]
        case _:
            found = datetime.fromisoformat(result["finished_at"]).timestamp()
    return found


class Board:
    """The file that says how it stands. None: nobody wants to know.

    When it cannot be written at the beginning, that is the operator's problem; later the drill is
    more important than its display.
    """

    def __init__(self, path: Path | None, clock: RealClock) -> None:
        self._path = path
        self._clock = clock
        self._results: Results = {}
        self._left = 0

    def begin(self, results: Results, left: int) -> None:
        """`left` runs are to be done. Raises ConfigError when the file cannot be written."""
        try:
            self.stand(results, left)
        except OSError as error:
            raise ConfigError(f"--metrics {self._path}: {error.strerror}") from error

    def stand(self, results: Results, left: int) -> None:
        """What is known between two runs. Raises OSError."""
        self._results, self._left = results, left
        self._write([])

    def phase(self, scenario: str, word: str) -> None:
        """What a run begins to do now. Raises OSError."""
        self._write(list(_gauge(RUNNING, [((scenario, word), self._clock.now_us() // 10**6)])))

    def _write(self, running: Sequence[str]) -> None:
        if self._path is None:
            return
        lines = [*_of_results(self._results), *_gauge(LEFT, [((), self._left)]), *running]
        draft = self._path.with_name(f"{self._path.name}.draft")
        draft.write_text("\n".join(lines) + "\n")
        draft.replace(self._path)

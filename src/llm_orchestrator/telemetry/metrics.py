"""What a process counts while it works: plain numbers, made into a page only when somebody asks.

Hot paths meet only this module: what is counted once per step (`step_done`) keeps its numbers at
hand, everything else costs a dictionary access. Everything here belongs to the event loop's thread;
nothing locks. The library that writes Prometheus' format is loaded by metrics_page.py, at the first
request for the page.

A process has one `Metrics`, made by the composition root and handed down; parts that are given none
count into one of their own that nobody shows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from llm_orchestrator.telemetry.metrics_names import ERRORS, METRICS, Metric

OTHER = "other"
WORKFLOWS_MAX = 200
MODELS_MAX = 100
NAMES_MAX = 50
CHARACTERS_MAX = 100
Labels = tuple[str, ...]
EMPTY: Mapping[str, int] = MappingProxyType({})


class Sample(NamedTuple):
    """One value of a gauge at this moment. `word`: its name without the prefix."""

    word: str
    labels: Labels
    value: float


Gauges = Callable[[], Iterable[Sample]]
"""Asked whenever the page is made. Must be quick and touch nothing but memory."""


class Bounded:
    """Label values that users can choose: the first so many are themselves, the rest `other`."""

    __slots__ = ("_limit", "_seen")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._seen: set[str] = set()

    def __call__(self, value: str) -> str:
        """The value, if it has a place or gets one."""
        seen = self._seen
        if value in seen:
            return value
        if len(seen) >= self._limit or not value or len(value) > CHARACTERS_MAX:
            return OTHER
        seen.add(value)
        return value


class Cell:
    """One number that only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0


class Counter:
    """Numbers that only grow, by labels. Without labels it is there from the start, as 0."""

    __slots__ = ("_cells", "metric")

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self._cells: dict[Labels, Cell] = {} if metric.labels else {(): Cell()}

    @property
    def values(self) -> dict[Labels, float]:
        """What was counted."""
        return {labels: cell.value for labels, cell in self._cells.items()}

    def cell(self, labels: Labels) -> Cell:
        """The number under these labels: for those who count again and again."""
        return self._cells.get(labels) or self._cells.setdefault(labels, Cell())

    def add(self, amount: float = 1.0, labels: Labels = ()) -> None:
        """Count `amount` (not negative)."""
        self.cell(labels).value += amount


class Distribution:
    """What one histogram has seen under one set of labels: how many up to each bound."""

    __slots__ = ("counts", "total")

    def __init__(self, bounds: int) -> None:
        self.counts = [0] * (bounds + 1)
        self.total = 0.0


class Histogram:
    """Distributions, by labels."""

    __slots__ = ("metric", "seen")

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.seen: dict[Labels, Distribution] = {}
        if not metric.labels:
            self._begin(())

    def of(self, labels: Labels) -> Distribution:
        """The distribution under these labels."""
        return self.seen.get(labels) or self._begin(labels)

    def observe(self, value: float, labels: Labels = ()) -> None:
        """Count one value, in the metric's own unit."""
        found = self.of(labels)
        found.counts[bisect_left(self.metric.buckets, value)] += 1
        found.total += value

    def _begin(self, labels: Labels) -> Distribution:
        found = self.seen[labels] = Distribution(len(self.metric.buckets))
        return found


class _Done(NamedTuple):
    """What a step that has succeeded adds to."""

    attempts: Cell
    steps: Cell
    seen: Distribution
    bounds: Sequence[float]


class Metrics:
    """See the module's docstring. `started_at` is when the process began, Unix seconds."""

    def __init__(self, *, started_at: float = 0.0, version: str = "") -> None:
        self.started_at = started_at
        self.version = version
        self.workflows = Bounded(WORKFLOWS_MAX)
        self.models = Bounded(MODELS_MAX)
        self.routes = Bounded(WORKFLOWS_MAX)
        self.queues = Bounded(MODELS_MAX)
        self.names = Bounded(NAMES_MAX)
        """Step types, providers."""
        self.words = Bounded(NAMES_MAX)
        """Kinds of errors, actions."""
        self.counters = {
            word: Counter(metric) for word, metric in METRICS.items() if metric.kind == "counter"
        }
        self.histograms = {
            word: Histogram(metric)
            for word, metric in METRICS.items()
            if metric.kind == "histogram"
        }
        self.errors = Counter(ERRORS)
        self._gauges: list[Gauges] = []
        self._done: dict[str, _Done] = {}
        self._steps = self.counters["steps_total"]
        self._attempts = self.counters["step_attempts_total"]
        self._durations = self.histograms["step_duration_seconds"]
        self._finished = self.counters["runs_finished_total"]
        self._run_times = self.histograms["run_duration_seconds"]
        self._commits = self.counters["commits_total"]
        self._batches = self.histograms["commit_batch_entries"]
        self._commit_times = self.histograms["commit_duration_seconds"]

    # -- gauges --------------------------------------------------------------------------------

    def watch(self, gauges: Gauges) -> None:
        """Ask `gauges` whenever the page is made."""
        self._gauges.append(gauges)

    def unwatch(self, gauges: Gauges) -> None:
        """No more: what it told of is gone."""
        if gauges in self._gauges:
            self._gauges.remove(gauges)

    def read_gauges(self) -> list[Sample]:
        """What all of them say now, and what this process is."""
        return [
            Sample("process_start_time_seconds", (), self.started_at),
            Sample("build_info", (self.version,), 1.0),
            *(sample for gauges in self._gauges for sample in gauges()),
        ]

    # -- what happens --------------------------------------------------------------------------

    def count(self, word: str, *labels: str, amount: float = 1.0) -> None:
        """Add to the counter of that name (without the prefix). For paths that are not hot."""
        self.counters[word].add(amount, labels)

    def observe(self, word: str, value: float, *labels: str) -> None:
        """The same for a histogram."""
        self.histograms[word].observe(value, labels)

    def step_done(self, step_type: str, seconds: float) -> None:
        """An attempt of a step has succeeded, and so has the step."""
        attempts, steps, seen, bounds = self._done.get(step_type) or self._begin_done(step_type)
        attempts.value += 1.0
        steps.value += 1.0
        seen.counts[bisect_left(bounds, seconds)] += 1
        seen.total += seconds

    def _begin_done(self, step_type: str) -> _Done:
        name = self.names(step_type)
        done = _Done(
            self._attempts.cell((name, "ok")),
            self._steps.cell((name, "completed")),
            self._durations.of((name,)),
            self._durations.metric.buckets,
        )
        if name == step_type:
            self._done[step_type] = done
        return done

    def attempt_failed(
        self, step_type: str, kind: str, seconds: float, *, is_final: bool = True
    ) -> None:
        """An attempt of a step has failed with an error of that kind. `is_final`: so has it."""
        step_type, outcome = self.names(step_type), self.words(kind)
        self._durations.observe(seconds, (step_type,))
        self._attempts.add(1.0, (step_type, outcome))
        self.errors.add(1.0, (outcome, step_type))
        if is_final:
            self._steps.add(1.0, (step_type, "failed"))

    def step_skipped(self, step_type: str) -> None:
        """A step was not wanted."""
        self._steps.add(1.0, (self.names(step_type), "skipped"))

    def run_ended(self, workflow: str, state: str, seconds: float) -> None:
        """A run has ended, so many seconds after it was accepted."""
        workflow = self.workflows(workflow)
        self._finished.add(1.0, (workflow, state))
        self._run_times.observe(max(0.0, seconds), (workflow,))

    def committed(
        self,
        outcome: str,
        seconds: float,
        *,
        entries: int = 0,
        fenced: int = 0,
        accepted: Mapping[str, int] = EMPTY,
    ) -> None:
        """A commit has ended. `accepted`: how many runs it made durable, by workflow."""
        self._commits.add(1.0, (outcome,))
        self._commit_times.observe(seconds)
        if entries:
            self._batches.observe(entries)
        if fenced:
            self.count("fenced_writes_total", amount=fenced)
        for workflow, number in accepted.items():
            self.count("runs_accepted_total", self.workflows(workflow), amount=number)

    def asked(self, provider: str, model: str, *, outcome: str, seconds: float | None) -> None:
        """A question to a model has ended. `seconds` None: nothing was sent."""
        labels = self._asked(provider, model)
        self.count("llm_requests_total", *labels, "ok" if outcome == "ok" else self.words(outcome))
        if seconds is not None:
            self.observe("llm_request_duration_seconds", seconds, *labels)

    def used(self, provider: str, model: str, *, tokens: tuple[int, int], cost_usd: float) -> None:
        """What an answer used: input and output tokens, and its price."""
        labels = self._asked(provider, model)
        for direction, number in zip(("input", "output"), tokens, strict=True):
            self.count("llm_tokens_total", *labels, direction, amount=number)
        self.count("llm_cost_usd_total", *labels, amount=max(0.0, cost_usd))

    def respent(self, provider: str, model: str, *, tokens: int, cost_usd: float) -> None:
        """Paid again, because a crash left it unknown whether the first time was answered."""
        labels = self._asked(provider, model)
        self.count("respent_tokens_total", *labels, amount=tokens)
        self.count("respent_usd_total", *labels, amount=max(0.0, cost_usd))

    def _asked(self, provider: str, model: str) -> Labels:
        """Bounded as a pair, or there could be as many as the product of both bounds."""
        provider, pair = self.names(provider), f"{provider}/{model}"
        return provider, model if model and self.models(pair) == pair else OTHER

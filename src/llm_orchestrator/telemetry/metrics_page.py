"""The page `/metrics`: everything a process counts, in Prometheus' text or in OpenMetrics.

Each page has a registry of its own (prometheus_client's default one would join the engines of one
process). Metrics that have no value yet stand there with their meaning alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.utils import floatToGoString

from llm_orchestrator.telemetry.metrics import Counter, Histogram, Labels, Metrics, Sample
from llm_orchestrator.telemetry.metrics_names import (
    ACTIVE,
    GROUPS,
    METRICS,
    OLD,
    PREFIX,
    Metric,
)


class _Once:
    """A collector for one page."""

    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterable[Family]:
        return self._families


def write_page(metrics: Metrics, samples: Iterable[Sample], accept: str) -> tuple[bytes, str]:
    """The page and its content type. `samples`: the gauges; `accept`: the request's header."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Once(list(families(metrics, samples))))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


def families(metrics: Metrics, samples: Iterable[Sample]) -> Iterator[Family]:
    """Every metric with its values, in the order of metrics_names.py, then the old names."""
    gauges: dict[str, dict[Labels, float]] = defaultdict(dict)
    for sample in samples:
        gauges[sample.word][sample.labels] = sample.value
    for group in GROUPS.values():
        for metric in group:
            yield _family(metric, metrics, gauges)
    for alias in OLD:
        of = METRICS[alias.of]
        meaning = f"The same as {PREFIX}{alias.of}"
        old = of._replace(name=alias.name, labels=alias.labels, meaning=meaning)
        yield _family(old, metrics, gauges, word=alias.of)
    yield _counter(metrics.errors)
    yield _gauge(ACTIVE, gauges[ACTIVE.word])


def _family(
    metric: Metric,
    metrics: Metrics,
    gauges: Mapping[str, Mapping[Labels, float]],
    *,
    word: str = "",
) -> Family:
    word = word or metric.word
    if metric.kind == "counter":
        return _counter(metrics.counters[word], metric, gauges.get(word))
    if metric.kind == "histogram":
        return _histogram(metrics.histograms[word], metric)
    return _gauge(metric, gauges.get(word, {}))


def _counter(
    counter: Counter, shown: Metric | None = None, read: Mapping[Labels, float] | None = None
) -> Family:
    """`read`: numbers that are counted in the store, in place of this process's own."""
    metric = shown or counter.metric
    family = CounterMetricFamily(metric.name, metric.meaning, labels=metric.labels)
    for labels, value in (read or counter.values).items():
        family.add_metric(labels, value)
    return family


def _gauge(metric: Metric, values: Mapping[Labels, float]) -> Family:
    family = GaugeMetricFamily(metric.name, metric.meaning, labels=metric.labels)
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family


def _histogram(histogram: Histogram, metric: Metric) -> Family:
    family = HistogramMetricFamily(metric.name, metric.meaning, labels=metric.labels)
    bounds = [*map(floatToGoString, metric.buckets), "+Inf"]
    for labels, found in histogram.seen.items():
        buckets = list(zip(bounds, accumulate(found.counts), strict=True))
        family.add_metric(labels, buckets, sum_value=found.total)
    return family

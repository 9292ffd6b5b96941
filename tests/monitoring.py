"""What deploy/ and docs/disaster_recovery/ say, read for the tests of alerts and dashboards.

Queries are not parsed here (promtool does that): names and labels are found by their shape, which
the house style of alerts.yml and the dashboards keeps simple.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from llm_orchestrator import errors
from llm_orchestrator.model import RunState
from llm_orchestrator.recovery.tally import Outcome
from llm_orchestrator.store.base import NodeState
from llm_orchestrator.telemetry.metrics_names import ACTIVE, ERRORS, METRICS, OLD

ROOT = Path(__file__).resolve().parents[1]
PROMETHEUS = ROOT / "deploy/prometheus"
RULES = PROMETHEUS / "alerts.yml"
CASES = sorted((PROMETHEUS / "tests").glob("*.yml"))
ALERTMANAGER = ROOT / "deploy/alertmanager/alertmanager.yml"
DASHBOARDS = sorted((ROOT / "deploy/grafana").glob("*.json"))
PROCEDURES = "docs/disaster_recovery/DR_PROCEDURES.md"

TARGET = frozenset({"job", "instance"})
"""Labels that Prometheus itself gives to whatever it scrapes."""
ITS_OWN: Mapping[str, frozenset[str]] = {
    "up": TARGET,
    "ALERTS": TARGET | {"alertname", "alertstate", "severity"},
}
"""Series that Prometheus makes."""
PRODUCT: Mapping[str, frozenset[str]] = {
    **{metric.name: frozenset(metric.labels) for metric in (*METRICS.values(), ACTIVE, ERRORS)},
    **{alias.name: frozenset(alias.labels) for alias in OLD},
}
HISTOGRAMS = {
    name: metric
    for name, metric in [
        *((metric.name, metric) for metric in METRICS.values()),
        *((alias.name, METRICS[alias.of]) for alias in OLD),
    ]
    if metric.kind == "histogram"
}
"""By the names of both systems."""


def _kinds() -> set[str]:
    """What `outcome` may say of something that failed."""
    found = [thing for thing in vars(errors).values() if isinstance(thing, type)]
    return {thing.kind for thing in found if issubclass(thing, errors.OrchestratorError)}


_ENDS = {RunState.COMPLETED, RunState.FAILED, RunState.CANCELLED}
VALUES: Mapping[tuple[str, str], frozenset[str]] = {
    (f"llm_orchestrator_{metric}", label): frozenset(map(str, values))
    for metric, label, values in (
        ("runs", "state", RunState),
        ("runs_finished_total", "state", _ENDS),
        ("steps_total", "outcome", ("completed", "failed", "skipped")),
        ("step_attempts_total", "outcome", ("ok", *_kinds())),
        ("llm_requests_total", "outcome", ("ok", *_kinds())),
        ("llm_tokens_total", "direction", ("input", "output", "cached")),
        ("commits_total", "outcome", ("landed", "refused", "failed")),
        ("pool_connections", "state", ("idle", "busy")),
        ("replication_standbys", "sync", ("true", "false")),
        ("nodes", "state", NodeState),
        ("backup_runs_total", "outcome", Outcome),
        (
            "recovery_point_exposure_seconds",
            "mechanism",
            ("replica", "archive", "wal", "backup"),
        ),
        ("breaker_state", "provider", ("store",)),
        ("breaker_openings_total", "provider", ("store",)),
    )
}
"""Values of labels that a query may ask for. Anything else would never be found."""
_FREE = frozenset({"job", "route", "status", "alertname", "alertstate", "severity"})

NAME = re.compile(r"\b(?:llm_orchestrator_\w+|orchestrator_\w+|up\b|ALERTS\b)")
SELECTOR = re.compile(rf"({NAME.pattern})(?:\{{(.*?)\}})?", re.DOTALL)
MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
GROUPING = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """One of the tools, with everything that it prints in `stdout`."""
    return subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=110,
    )


def load(path: Path) -> Any:
    """A YAML file."""
    return YAML(typ="safe").load(path.read_text())


@dataclass(frozen=True)
class Alert:
    """One rule. `expr` on one line; `waits`: it must hold for some time before it fires."""

    name: str
    group: str
    expr: str
    severity: str
    annotations: Mapping[str, str]
    waits: bool = False

    @property
    def metrics(self) -> set[str]:
        """The metrics of the product and of Prometheus that it reads."""
        return {metric_of(name) for name in NAME.findall(self.expr)}

    @property
    def scenarios(self) -> list[str]:
        """The drills that make it fire."""
        return re.findall(r"[^,\s]+", self.annotations.get("scenario", ""))


@dataclass(frozen=True)
class Case:
    """One promtool test of one alert. `labels`: of what fires in it; none: it is silent.

    `is_early_silent`: before it fires, the test also looked when it must not fire yet.
    """

    alert: str
    name: str
    series: Sequence[str]
    labels: Sequence[str]
    is_early_silent: bool = False


def alerts() -> list[Alert]:
    """All of them, in the file's order."""
    return [
        Alert(
            rule["alert"],
            group["name"],
            " ".join(rule["expr"].split()),
            rule["labels"].get("severity", ""),
            rule["annotations"],
            "for" in rule,
        )
        for group in load(RULES)["groups"]
        for rule in group["rules"]
    ]


def cases() -> Iterator[Case]:
    """All in deploy/prometheus/tests. A test asks for one alert, at last when it fires."""
    for file in CASES:
        for test in load(file)["tests"]:
            series = [one["series"] for one in test["input_series"]]
            *early, last = test["promql_expr_test"]
            (asked,) = {each["expr"] for each in (*early, last)}
            found = re.fullmatch(r'ALERTS\{alertname="(\w+)",alertstate="firing"\}', asked)
            assert found, f"{file.name}: {asked}"
            assert not any(each["exp_samples"] for each in early), test["name"]
            labels = [sample["labels"] for sample in last["exp_samples"]]
            yield Case(found[1], test["name"], series, labels, bool(labels and early))


def metric_of(name: str) -> str:
    """The metric to which a series belongs: histograms have three kinds of them."""
    base = re.sub(r"_(?:bucket|count|sum)$", "", name)
    return base if base in HISTOGRAMS else name


def labels_of(name: str) -> frozenset[str]:
    """What a series may be selected by. Raises KeyError for one that nobody exports."""
    if name in ITS_OWN:
        return ITS_OWN[name]
    if name in HISTOGRAMS:
        raise KeyError(name)  # only its _bucket, _count and _sum are series
    return PRODUCT[metric_of(name)] | TARGET | ({"le"} if name.endswith("_bucket") else set())


def mistakes(query: str) -> list[str]:
    """Names and labels in a query that no process shows."""
    wrong: list[str] = []
    usable: set[str] = set()
    for name, matchers in SELECTOR.findall(query):
        try:
            known = labels_of(name)
        except KeyError:
            wrong.append(f"no metric {name}")
            continue
        usable |= known
        for label, _, value in MATCHER.findall(matchers):
            if label not in known:
                wrong.append(f"{name} has no label {label}")
            elif label not in _FREE:
                possible = VALUES.get((metric_of(name), label), frozenset())
                never = sorted(set(value.split("|")) - possible)
                wrong += [f"{name} never has {label}={one}" for one in never]
    for group in GROUPING.findall(query):
        wrong += [
            f"nothing here has a label {label}"
            for label in re.findall(r"\w+", group)
            if label not in usable
        ]
    return wrong


def headings(page: Path) -> dict[str, str]:
    """The anchors of a page, each with the text below its heading (up to the next one)."""
    parts = re.split(r"^(#+ .*)$", page.read_text(), flags=re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", head.lstrip("# ").lower()).replace(" ", "-"): text
        for head, text in zip(parts[1::2], parts[2::2], strict=True)
    }

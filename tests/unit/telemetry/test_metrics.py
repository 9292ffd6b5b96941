"""The list of names, the instruments, and the page that is made of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from llm_orchestrator.telemetry.metrics import (
    CHARACTERS_MAX,
    MODELS_MAX,
    NAMES_MAX,
    OTHER,
    WORKFLOWS_MAX,
    Bounded,
    Metrics,
    Sample,
)
from llm_orchestrator.telemetry.metrics_names import ACTIVE, ERRORS, METRICS, OLD, Metric
from llm_orchestrator.telemetry.metrics_page import write_page

ROOT = Path(__file__).resolve().parents[3]
PROMTOOL = shutil.which("promtool", path=f"{ROOT}/.tools/bin{os.pathsep}{os.environ['PATH']}")
LAW = """
runs{state,workflow} runs_accepted_total{workflow} runs_finished_total{workflow,state}
run_duration_seconds{workflow} steps_total{type,outcome} step_duration_seconds{type}
step_attempts_total{type,outcome} llm_requests_total{provider,model,outcome}
llm_request_duration_seconds{provider,model} llm_tokens_total{provider,model,direction}
llm_cost_usd_total{provider,model} respent_usd_total{provider,model}
respent_tokens_total{provider,model} queue_depth{queue} queue_oldest_age_seconds{queue}
runs_accepted_minus_advanced claim_latency_seconds commit_batch_entries commit_duration_seconds
commits_total{outcome} nodes{state} node_lease_age_seconds{node} node_info{node,version,region}
region_active{region}
takeovers_total fenced_writes_total epoch recovery_time_seconds breaker_state{provider}
breaker_openings_total{provider} pool_connections{state} pool_size pool_wait_seconds
pool_timeouts_total store_reachable store_writable store_latency_seconds
replication_lag_seconds{standby} replication_lag_bytes{standby} replication_standbys{sync}
backup_last_success_timestamp_seconds backup_last_proved_timestamp_seconds
backup_last_failure_timestamp_seconds backup_proof_failed backup_size_bytes backup_duration_seconds
backup_runs_total{outcome}
archive_lag_batches archive_degraded archive_segments archive_bytes
journal_damaged_total journal_mended_total journal_damaged_runs journal_verified_entries_total
journal_verify_last_round_timestamp_seconds journal_verify_progress_ratio
recovery_point_exposure_seconds{mechanism} database_damaged_pages primaries_left_total
http_requests_total{method,route,status} http_request_duration_seconds{method,route} streams_open
memory_bytes memory_limit_bytes memory_shedding maintenance draining process_start_time_seconds
build_info{version} audit_entries_total{action} spool_results spool_bytes
"""
"""What alerts, dashboards and people may rely on."""
EARLIER = """
orchestrator_workflow_executions_total{status,workflow_name}
orchestrator_workflow_duration_seconds{workflow_name} orchestrator_active_workflows
orchestrator_llm_requests_total{provider,model,status}
orchestrator_llm_tokens_total{provider,model,type}
orchestrator_llm_request_duration_seconds{provider,model}
orchestrator_errors_total{error_type,component}
orchestrator_step_executions_total{step_type,status} orchestrator_step_duration_seconds{step_type}
"""


def named(text: str) -> dict[str, set[str]]:
    """Name to labels."""
    pairs = (word.rstrip("}").partition("{") for word in text.split())
    return {name: set(filter(None, labels.split(","))) for name, _, labels in pairs}


def busy() -> Metrics:
    """Something of everything that is counted."""
    metrics = Metrics(started_at=1_700_000_000.0, version="1.2.3")
    metrics.step_done("llm", 0.2)
    metrics.attempt_failed("llm", "timeout", 3.0, is_final=False)
    metrics.step_skipped("action")
    metrics.run_ended("report", "completed", 2.0)
    metrics.committed("landed", 0.004, entries=3, fenced=1, accepted={"report": 1})
    metrics.asked("openai", "gpt", outcome="ok", seconds=1.5)
    metrics.asked("openai", "gpt", outcome="unavailable", seconds=None)
    metrics.used("openai", "gpt", tokens=(10, 4), cost_usd=0.25)
    metrics.respent("openai", "gpt", tokens=14, cost_usd=0.25)
    return metrics


def one_of(metric: Metric) -> Sample:
    return Sample(metric.word, tuple(f"a {label}" for label in metric.labels), 1.5)


def page_of(metrics: Metrics, samples: list[Sample] | None = None) -> str:
    return write_page(metrics, samples or [], "text/plain")[0].decode()


def values_of(page: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of a page, by name and sorted labels. A sample that stands twice fails."""
    found = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def test_every_name_of_the_law_is_there_with_its_labels_and_no_other() -> None:
    assert {word: set(metric.labels) for word, metric in METRICS.items()} == named(LAW)
    old = {alias.name: set(alias.labels) for alias in OLD}
    old |= {metric.name: set(metric.labels) for metric in (ACTIVE, ERRORS)}
    assert old == named(EARLIER)


def test_every_metric_stands_on_the_page_with_type_and_meaning_before_it_has_a_value() -> None:
    page = page_of(Metrics())
    for name in (*(metric.name for metric in METRICS.values()), *named(EARLIER)):
        assert f"\n# HELP {name} " in f"\n{page}"
        assert f"# TYPE {name} " in page


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool here")
def test_promtool_finds_nothing_to_say_about_the_names() -> None:
    gauges = [one_of(metric) for metric in METRICS.values() if metric.kind == "gauge"]
    page = page_of(busy(), gauges)
    assert PROMTOOL is not None
    done = subprocess.run(
        [PROMTOOL, "check", "metrics"], input=page, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_what_the_store_has_counted_stands_in_place_of_what_this_process_has() -> None:
    page = page_of(Metrics(), [Sample("backup_runs_total", ("ok",), 3)])
    assert '\nllm_orchestrator_backup_runs_total{outcome="ok"} 3.0\n' in page


def test_what_was_counted_is_on_the_page() -> None:
    values = values_of(page_of(busy(), [Sample("epoch", (), 3)]))

    def value(name: str, **labels: str) -> float:
        return values[f"llm_orchestrator_{name}", tuple(sorted(labels.items()))]

    assert value("step_attempts_total", type="llm", outcome="timeout") == 1
    assert value("steps_total", type="llm", outcome="completed") == 1
    assert value("steps_total", type="action", outcome="skipped") == 1
    assert ("llm_orchestrator_steps_total", (("outcome", "failed"), ("type", "llm"))) not in values
    assert value("runs_accepted_total", workflow="report") == 1
    assert value("commits_total", outcome="landed") == 1
    assert value("fenced_writes_total") == 1
    assert value("takeovers_total") == 0
    assert value("llm_tokens_total", provider="openai", model="gpt", direction="input") == 10
    assert value("llm_cost_usd_total", provider="openai", model="gpt") == 0.25
    assert value("respent_tokens_total", provider="openai", model="gpt") == 14
    assert value("epoch") == 3


def test_a_histogram_counts_up_to_each_bound_with_the_bound_included() -> None:
    metrics = Metrics()
    for entries in (1, 2, 3, 2_000, 2_001):
        metrics.observe("commit_batch_entries", entries)
    values = values_of(page_of(metrics))
    name = "llm_orchestrator_commit_batch_entries"

    def below(bound: str) -> float:
        return values[f"{name}_bucket", (("le", bound),)]

    assert [below(le) for le in ("1.0", "2.0", "5.0", "2000.0", "+Inf")] == [1, 2, 3, 4, 5]
    assert (values[f"{name}_count", ()], values[f"{name}_sum", ()]) == (5, 4_007)


def test_old_names_show_the_same_values() -> None:
    values = values_of(page_of(busy(), [Sample(ACTIVE.word, (), 7)]))
    for alias in OLD:
        of = METRICS[alias.of]
        new = {
            (name.removeprefix(of.name), tuple(value for _, value in sorted(labels))): number
            for (name, labels), number in values.items()
            if name.startswith(of.name)
        }
        renamed = dict(zip(alias.labels, of.labels, strict=True))
        old = {
            (
                name.removeprefix(alias.name),
                tuple(value for _, value in sorted((renamed.get(k, k), v) for k, v in labels)),
            ): number
            for (name, labels), number in values.items()
            if name.startswith(alias.name)
        }
        assert old == new
        assert old
    assert values["orchestrator_active_workflows", ()] == 7
    error = (("component", "llm"), ("error_type", "timeout"))
    assert values["orchestrator_errors_total", error] == 1


def test_openmetrics_is_written_for_those_who_ask_for_it() -> None:
    page, content_type = write_page(busy(), [], "application/openmetrics-text;version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert page.endswith(b"# EOF\n")
    plain, content_type = write_page(busy(), [], "text/plain")
    assert content_type.startswith("text/plain; version=0.0.4")
    assert b"# EOF" not in plain


def test_two_engines_of_one_process_do_not_meet() -> None:
    first, second = busy(), Metrics()
    assert "report" in page_of(first)
    assert "report" not in page_of(second)


# -- how many series there can be ------------------------------------------------------------------


def test_label_values_beyond_the_bound_are_other_and_the_first_ones_stay() -> None:
    bounded = Bounded(2)
    assert [bounded(word) for word in ("a", "b", "c", "a", "d", "b")] == [
        *("a", "b", OTHER),
        *("a", OTHER, "b"),
    ]
    assert bounded("") == OTHER
    assert Bounded(2)("x" * (CHARACTERS_MAX + 1)) == OTHER
    assert Bounded(2)("x" * CHARACTERS_MAX) != OTHER


def series(metrics: Metrics, word: str) -> int:
    found = metrics.counters if word in metrics.counters else metrics.histograms
    return len(getattr(found[word], "values" if word in metrics.counters else "seen"))


def test_nobody_can_make_more_series_than_the_bounds_allow() -> None:
    metrics = Metrics()
    for number in range(1_000):
        name = f"name-{number}"
        metrics.run_ended(name, "completed", 1.0)
        metrics.committed("landed", 0.1, entries=1, accepted={name: 1})
        metrics.asked("house", name, outcome="ok", seconds=0.1)
        metrics.used("house", name, tokens=(1, 1), cost_usd=0.1)
        metrics.respent("house", name, tokens=1, cost_usd=0.1)
        metrics.attempt_failed(name, name, 0.1)
        metrics.step_done(name, 0.1)
        metrics.step_skipped(name)
    for word in ("runs_accepted_total", "runs_finished_total", "run_duration_seconds"):
        assert series(metrics, word) == WORKFLOWS_MAX + 1
    for word in ("llm_requests_total", "llm_cost_usd_total", "respent_usd_total"):
        assert series(metrics, word) == MODELS_MAX + 1
    assert series(metrics, "step_duration_seconds") == NAMES_MAX  # `house` has a place, too
    assert series(metrics, "step_attempts_total") == 2 * NAMES_MAX + 1
    assert metrics.counters["runs_finished_total"].values[OTHER, "completed"] == 800
    assert len(page_of(metrics)) < 2_000_000


def test_models_are_bounded_over_all_providers_together() -> None:
    metrics = Metrics()
    for number in range(1_000):
        metrics.asked(f"house-{number % 20}", f"model-{number // 20}", outcome="ok", seconds=1.0)
    assert series(metrics, "llm_requests_total") == MODELS_MAX + 20
    assert ("house-3", OTHER, "ok") in metrics.counters["llm_requests_total"].values


def test_gauges_can_be_taken_off_the_page_again() -> None:
    metrics = Metrics()

    def gauges() -> list[Sample]:
        return [Sample("pool_size", (), 4)]

    metrics.watch(gauges)
    assert Sample("pool_size", (), 4) in metrics.read_gauges()
    metrics.unwatch(gauges)
    assert Sample("pool_size", (), 4) not in metrics.read_gauges()


def test_counting_loads_no_library() -> None:
    code = (
        "import sys, llm_orchestrator.telemetry.metrics as m; m.Metrics();"
        "print([name for name in sys.modules if name.startswith('prometheus')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

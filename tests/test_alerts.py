"""The alerts fire when they must, are silent when they nearly must, and lead to a procedure.

promtool and amtool judge what they can: syntax, the cases in deploy/prometheus/tests, the routing.
Here stands what they cannot know: that each alert has cases, that what it reads is exported, that
what it says can be said, and that its procedure exists.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest

from llm_orchestrator.server.app import make_app
from tests.monitoring import (
    ALERTMANAGER,
    CASES,
    HISTOGRAMS,
    MATCHER,
    PROCEDURES,
    PROMETHEUS,
    ROOT,
    RULES,
    SELECTOR,
    TARGET,
    Alert,
    Case,
    alerts,
    cases,
    headings,
    labels_of,
    load,
    metric_of,
    mistakes,
    run,
)

ALERTS = alerts()
NAMES = [alert.name for alert in ALERTS]
ALL_CASES = list(cases())
BASE = "{{ $externalLabels.runbook_base }}"
SEVERITIES = {"P0": "pager", "P1": "pager-quiet", "P2": "chat", "P3": "tickets"}
PARTS = ("Means", "See", "By itself", "You", "Validate", "Worse")
CLASSES = ("database", "application", "network", "data", "backup", "region", "provider")
EARLIER = [
    *("ServiceDown", "HighErrorRate", "DatabaseDown", "DiskSpaceCritical", "HighLatency"),
    *("LowSuccessRate", "HighMemoryUsage", "DatabaseConnectionPoolExhausted", "ModerateErrorRate"),
    *("WorkflowsStuck", "CertificateExpiringSoon", "DiskSpaceWarning", "PodRestarts"),
    *("WorkflowTimeout", "LLMProviderDown", "HighWorkflowLatency"),
]
"""The alerts of the earlier system; two of its seventeen were called HighErrorRate."""

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool here")
needs_amtool = pytest.mark.skipif(shutil.which("amtool") is None, reason="no amtool here")
each_alert = pytest.mark.parametrize("alert", ALERTS, ids=NAMES)


# -- what the tools say ---------------------------------------------------------------------------


@needs_promtool
def test_prometheus_takes_the_rules_and_the_example() -> None:
    done = run("promtool", "check", "rules", "--lint-fatal", RULES)
    assert done.returncode == 0, done.stdout
    assert f"{len(ALERTS)} rules found" in done.stdout
    done = run("promtool", "check", "config", PROMETHEUS / "prometheus.yml")
    assert done.returncode == 0, done.stdout
    assert "1 rule files found" in done.stdout


@needs_promtool
@pytest.mark.parametrize("file", CASES, ids=lambda file: file.stem)
def test_each_alert_fires_and_is_silent_as_its_cases_say(file: Path, tmp_path: Path) -> None:
    """With the rules that the file is about: promtool works on all others for nothing, for long."""
    text = file.read_text()
    assert load(file)["rule_files"] == ["../alerts.yml"]
    asked = set(re.findall(r'ALERTS\{alertname="(\w+)"', text))
    rules = [rule for group in load(RULES)["groups"] for rule in group["rules"]]
    chosen = [rule for rule in rules if rule["alert"] in asked]
    (tmp_path / "alerts.yml").write_text(
        json.dumps({"groups": [{"name": file.stem, "rules": chosen}]})
    )
    (tmp_path / "cases.yml").write_text(text.replace("../alerts.yml", "alerts.yml"))
    done = run("promtool", "test", "rules", tmp_path / "cases.yml")
    assert done.returncode == 0, done.stdout
    assert len(chosen) == len(asked) > 0


@needs_promtool
def test_what_a_person_reads_is_filled_in(tmp_path: Path) -> None:
    """The text of one alert with its link, under the base that prometheus.yml names."""
    base = load(PROMETHEUS / "prometheus.yml")["global"]["external_labels"]["runbook_base"]
    alert = next(alert for alert in ALERTS if alert.name == "StoreSlow")
    text = f"""
rule_files: ["{RULES}"]
tests:
  - interval: 1m
    external_labels: {{runbook_base: "{base}"}}
    input_series:
      - {{series: 'llm_orchestrator_store_latency_seconds{{job="j",instance="a"}}', values: 1x20}}
    alert_rule_test:
      - alertname: StoreSlow
        eval_time: 15m
        exp_alerts:
          - exp_labels: {{job: j, instance: a, severity: P2}}
            exp_annotations:
              summary: The database answers a after 1s
              description: {alert.annotations["description"]}
              scenario: {alert.annotations["scenario"]}
              runbook_url: {base}{PROCEDURES}#storeslow
"""
    file = tmp_path / "text.yml"
    file.write_text(text)
    done = run("promtool", "test", "rules", file)
    assert done.returncode == 0, done.stdout


# -- every alert has its cases --------------------------------------------------------------------


def lacks(alert: Alert, of: list[Case]) -> list[str]:
    """The cases that an alert should have and has not."""
    own = [case for case in of if case.alert == alert.name]
    silent = [case for case in own if not case.labels]
    wanted = {
        "a case in which it fires": any(case.labels for case in own),
        "a case in which it is silent": bool(silent),
        "a silent case that shows one of its metrics": any(
            metric_of(series.partition("{")[0]) in alert.metrics
            for case in silent
            for series in case.series
        ),
    }
    if alert.waits:
        wanted["a moment before it fires"] = any(case.is_early_silent for case in own)
    if re.search(r" / |histogram_quantile", alert.expr):
        quiet = any("with no traffic" in case.name for case in silent)
        wanted["a silent case with no traffic, for it compares a share"] = quiet
    return [what for what, has in wanted.items() if not has]


@each_alert
def test_an_alert_has_a_firing_and_a_silent_case(alert: Alert) -> None:
    assert lacks(alert, ALL_CASES) == []


def test_a_missing_case_is_noticed() -> None:
    alert = Alert("X", "g", "sum(up) / count(up) > 1", "P0", {}, waits=True)
    fires = Case("X", "X fires", ["up{}"], ["ALERTS{}"], is_early_silent=True)
    quiet = Case("X", "X is silent with no traffic", ["up{}"], [])
    assert lacks(alert, [fires, quiet]) == []
    assert len(lacks(alert, [])) == 5
    assert len(lacks(alert, [quiet])) == 2
    assert len(lacks(alert, [fires])) == 3
    assert len(lacks(alert, [fires, Case("X", "is silent", ["other{}"], [])])) == 2
    assert len(lacks(alert, [fires, Case("Y", quiet.name, ["up{}"], [])])) == 3
    assert lacks(alert, [Case("X", "", ["up{}"], ["ALERTS{}"]), quiet]) == [
        "a moment before it fires"
    ]


def test_every_case_is_about_an_alert_that_there_is() -> None:
    assert {case.alert for case in ALL_CASES} == set(NAMES)
    assert len(NAMES) == len(set(NAMES))


def test_the_cases_show_series_as_the_product_does() -> None:
    """The same labels, and buckets that exist: else a rule is proved with what never comes."""
    for case in ALL_CASES:
        for series in case.series:
            ((name, matchers),) = SELECTOR.findall(series)
            values = {label: value for label, _, value in MATCHER.findall(matchers)}
            assert set(values) == labels_of(name), f"{case.name}: {series}"
            if name.endswith("_bucket"):
                bounds = {str(float(bound)) for bound in HISTOGRAMS[metric_of(name)].buckets}
                assert values["le"] in bounds | {"+Inf"}, f"{case.name}: {series}"


# -- what an alert reads --------------------------------------------------------------------------


@each_alert
def test_an_alert_reads_what_is_exported(alert: Alert) -> None:
    assert mistakes(alert.expr) == []
    assert alert.metrics


def test_a_name_that_nobody_exports_is_noticed() -> None:
    assert mistakes("up == 0 and llm_orchestrator_store_reachable") == []
    assert mistakes("llm_orchestrator_backups > 1") == ["no metric llm_orchestrator_backups"]
    assert mistakes('up{node="a"}') == ["up has no label node"]
    assert mistakes("sum by (job, le) (up)") == ["nothing here has a label le"]
    assert mistakes("llm_orchestrator_store_reachable_bucket") != []
    assert mistakes("llm_orchestrator_commit_duration_seconds") != []
    assert mistakes("sum by (le) (llm_orchestrator_commit_duration_seconds_bucket)") == []
    assert mistakes('llm_orchestrator_commits_total{outcome=~"failed|refused"}') == []
    assert mistakes('llm_orchestrator_commits_total{outcome=~"failed|lost"}') == [
        "llm_orchestrator_commits_total never has outcome=lost"
    ]
    assert mistakes("sum by (le) (llm_orchestrator_commit_duration_seconds_count)") != []


@each_alert
def test_a_quantile_can_pass_its_threshold(alert: Alert) -> None:
    """`histogram_quantile` never says more than the last bound."""
    for name, threshold in re.findall(
        r"^histogram_quantile.*?(llm_orchestrator_\w+)_bucket.*?> ([\d.]+)", alert.expr
    ):
        assert float(threshold) < HISTOGRAMS[name].buckets[-1]


def patient_routes() -> set[str]:
    """The paths whose answers may take long on purpose: they wait for a run, or stream."""
    surface = Mock(version="0")  # only requests ask it anything
    found = set()
    for path, operations in make_app(surface).openapi()["paths"].items():
        for operation in operations.values():
            asked = {one["name"] for one in operation.get("parameters", ())}
            answers = operation["responses"].values()
            kinds = {kind for one in answers for kind in one.get("content", ())}
            if "wait" in asked or "text/event-stream" in kinds:
                found.add(path)
    return found


def test_slow_answers_are_not_those_that_were_asked_to_be_late() -> None:
    alert = next(alert for alert in ALERTS if alert.name == "ApiSlow")
    (excluded,) = re.findall(r'route!~"([^"]*)"', alert.expr)
    patient = patient_routes()
    assert "/api/v1/workflows/{name}/execute" in patient
    assert [path for path in patient if not re.fullmatch(excluded, path)] == []
    for path in ("/health/ready", "/metrics"):
        assert re.fullmatch(excluded, path)
    for path in ("/api/v1/runs", "/api/v1/workflows/{name}"):
        assert not re.fullmatch(excluded, path)


# -- what an alert says ---------------------------------------------------------------------------


@each_alert
def test_an_alert_says_how_bad_what_and_where_to_read(alert: Alert) -> None:
    assert alert.severity in SEVERITIES
    assert set(alert.annotations) - {"scenario"} == {"summary", "description", "runbook_url"}
    assert alert.annotations["runbook_url"] == f"{BASE}{PROCEDURES}#{alert.name.lower()}"
    for scenario in alert.scenarios:
        assert re.fullmatch(rf"({'|'.join(CLASSES)})(_[a-z0-9]+)+", scenario)


@each_alert
def test_what_an_alert_mentions_is_on_what_fires(alert: Alert) -> None:
    mentioned = set(re.findall(r"\$labels\.(\w+)", " ".join(alert.annotations.values())))
    for case in ALL_CASES:
        if case.alert == alert.name:
            for fired in case.labels:
                assert mentioned <= set(re.findall(r"(\w+)=", fired)), case.name


@each_alert
def test_an_alert_keeps_the_cluster_apart(alert: Alert) -> None:
    """Everything that is summed up is summed up per job, so two clusters do not mix."""
    for aggregated in re.findall(
        r"\b(?:sum|max|min|count|avg)\b(?!_)\s*(\w*\s*\([^)]*\))", alert.expr
    ):
        assert re.match(r"by \(job\b", aggregated), aggregated


@each_alert
def test_the_procedure_of_an_alert_has_every_part(alert: Alert) -> None:
    section = headings(ROOT / PROCEDURES).get(alert.name.lower())
    assert section is not None, f"no heading {alert.name} in {PROCEDURES}"
    assert section.strip().startswith(f"{alert.severity}.")
    found = re.findall(r"^- \*\*([^*]+)\.\*\*", section, re.MULTILINE)
    assert tuple(found) == PARTS
    assert [name for name in alert.scenarios if f"`{name}`" not in section] == []


def test_the_procedures_are_grouped_as_the_rules_are() -> None:
    """Same groups, same order, and nothing about an alert that is gone."""
    heads = re.findall(r"^### (\w+)$", (ROOT / PROCEDURES).read_text(), re.MULTILINE)
    assert heads == NAMES


def test_every_alert_of_the_earlier_system_is_replaced_or_declined() -> None:
    text = RULES.read_text()
    assert len(EARLIER) == 16
    assert [
        name for name in EARLIER if not re.search(rf"^ *# .*\b{name}\b", text, re.MULTILINE)
    ] == []


# -- who hears of it ------------------------------------------------------------------------------


@needs_amtool
def test_alertmanager_takes_the_example() -> None:
    done = run("amtool", "check-config", ALERTMANAGER)
    assert done.returncode == 0, done.stdout
    assert f"{len(SEVERITIES)} receivers" in done.stdout


@needs_amtool
@pytest.mark.parametrize(("severity", "receiver"), [*SEVERITIES.items(), ("none", "chat")])
def test_a_severity_reaches_its_receiver(severity: str, receiver: str) -> None:
    done = run(
        "amtool", "config", "routes", "test", f"--config.file={ALERTMANAGER}",
        f"--verify.receivers={receiver}", f"severity={severity}", "job=llm-orchestrator",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert receiver in done.stdout.splitlines()


def test_the_example_names_no_real_address_and_holds_no_credential() -> None:
    text = ALERTMANAGER.read_text() + (PROMETHEUS / "prometheus.yml").read_text()
    hosts = re.findall(r"https?://([^/:\s]+)", text)
    assert hosts
    assert [h for h in hosts if h != "127.0.0.1" and not h.endswith(".example.invalid")] == []
    for line in text.splitlines():
        for word in re.findall(r"(\w*(?:credential|password|secret|token|key)\w*):", line):
            assert word.endswith("_file"), line


def inhibitions() -> list[tuple[list[str], list[str], list[str]]]:
    """Sources, targets, and the labels in which both must agree."""

    def names(matchers: list[str]) -> list[str]:
        (one,) = matchers
        found = re.fullmatch(r'alertname=~?"([\w|]+)"', one)
        assert found, one
        return found[1].split("|")

    return [
        (names(rule["source_matchers"]), names(rule["target_matchers"]), rule["equal"])
        for rule in load(ALERTMANAGER)["inhibit_rules"]
    ]


def test_only_a_larger_trouble_hides_a_smaller_one() -> None:
    severity = {alert.name: alert.severity for alert in ALERTS}
    for sources, targets, equal in inhibitions():
        assert set(equal) <= TARGET
        assert max(severity[name] for name in sources) <= min(severity[name] for name in targets)
        assert not set(sources) & set(targets)


def test_what_hides_and_what_is_hidden_bear_the_labels_in_which_they_must_agree() -> None:
    """A label that both lack counts as equal: then one cluster's trouble would hide another's."""
    fired: dict[str, set[str]] = {}
    for case in ALL_CASES:
        for labels in case.labels:
            fired.setdefault(case.alert, set()).update(re.findall(r"(\w+)=", labels))
    for sources, targets, equal in inhibitions():
        for name in (*sources, *targets):
            assert set(equal) <= fired[name], name

"""The dashboards of deploy/grafana draw: each query is one, and what it asks for is exported."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llm_orchestrator.telemetry.metrics_names import METRICS
from tests.monitoring import (
    DASHBOARDS,
    NAME,
    PROCEDURES,
    ROOT,
    alerts,
    metric_of,
    mistakes,
    run,
)

BOARDS: dict[str, Any] = {file.stem: json.loads(file.read_text()) for file in DASHBOARDS}
each_board = pytest.mark.parametrize("name", sorted(BOARDS))
WIDTH = 24
VARIABLES = {"$__rate_interval": "5m", "$__range": "6h", "$job": "llm-orchestrator.*"}


class Query(NamedTuple):
    """One query of a panel, as Prometheus gets it."""

    panel: str
    text: str


def panels(name: str) -> list[Any]:
    return [panel for panel in BOARDS[name]["panels"] if panel["type"] != "row"]


def queries(name: str) -> Iterator[Query]:
    for panel in panels(name):
        for target in panel["targets"]:
            yield Query(panel["title"], filled(target["expr"]))
    for annotation in BOARDS[name]["annotations"]["list"]:
        yield Query(annotation["name"], filled(annotation["expr"]))


def filled(query: str) -> str:
    """A query with Grafana's variables replaced; another variable than ours is a mistake."""
    for variable, value in VARIABLES.items():
        query = query.replace(variable, value)
    assert "$" not in query, query
    return query


def test_there_are_four_and_they_are_told_apart() -> None:
    assert sorted(BOARDS) == ["disaster-recovery", "llm-cost", "overview", "runs"]
    assert len({board["uid"] for board in BOARDS.values()}) == len(BOARDS)
    assert len({board["title"] for board in BOARDS.values()}) == len(BOARDS)


@each_board
def test_a_dashboard_asks_whichever_prometheus_the_reader_chooses(name: str) -> None:
    board = BOARDS[name]
    variables = {one["name"]: one for one in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    assert variables["job"]["datasource"] == chosen
    for panel in panels(name):
        assert panel["datasource"] == chosen, panel["title"]
        assert all(target["datasource"] == chosen for target in panel["targets"]), panel["title"]
    assert all(one["datasource"] == chosen for one in board["annotations"]["list"])


@each_board
def test_panels_have_ids_of_their_own_and_do_not_overlap(name: str) -> None:
    everything = BOARDS[name]["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    places = [(panel["title"], panel["gridPos"]) for panel in everything]
    for title, place in places:
        assert place["x"] >= 0, title
        assert place["x"] + place["w"] <= WIDTH, title
    for (one, a), (other, b) in itertools.combinations(places, 2):
        assert not overlap(a, b), f"{one} and {other}"


def overlap(a: dict[str, int], b: dict[str, int]) -> bool:
    return (
        a["x"] < b["x"] + b["w"]
        and b["x"] < a["x"] + a["w"]
        and a["y"] < b["y"] + b["h"]
        and b["y"] < a["y"] + a["h"]
    )


def test_an_overlap_is_noticed() -> None:
    a = {"x": 0, "y": 0, "w": 8, "h": 8}
    assert overlap(a, {"x": 7, "y": 7, "w": 8, "h": 8})
    assert not overlap(a, {"x": 8, "y": 0, "w": 8, "h": 8})
    assert not overlap(a, {"x": 0, "y": 8, "w": 8, "h": 8})


@each_board
def test_each_target_of_a_panel_has_a_letter_and_each_panel_a_title(name: str) -> None:
    for panel in panels(name):
        letters = [target["refId"] for target in panel["targets"]]
        assert letters, panel["title"]
        assert len(set(letters)) == len(letters), panel["title"]
    titles = [panel["title"] for panel in panels(name)]
    assert all(titles)
    assert len(set(titles)) == len(titles)


@each_board
def test_a_query_names_what_is_exported_and_keeps_to_the_chosen_cluster(name: str) -> None:
    for panel, text in queries(name):
        assert mistakes(text) == [], f"{panel}: {text}"
        selected = text.count('job=~"llm-orchestrator.*"')
        assert selected == len(NAME.findall(text)) > 0, f"{panel}: {text}"
    for variable in BOARDS[name]["templating"]["list"]:
        if variable["type"] == "query":
            asked = variable["query"]["query"]
            assert asked == variable["definition"]
            metric, label = re.findall(r"\w+", asked.removeprefix("label_values"))
            assert mistakes(f"sum by ({label}) ({metric})") == []


@each_board
def test_a_legend_shows_labels_that_the_query_keeps(name: str) -> None:
    for panel in panels(name):
        for target in panel["targets"]:
            grouped = re.findall(r"\bby \(([^)]*)\)", target["expr"])
            kept = set(re.findall(r"\w+", grouped[0])) if grouped else {"instance", "job"}
            shown = set(re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", "")))
            assert shown <= kept, f"{panel['title']}: {target['expr']}"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool here")
@each_board
def test_prometheus_parses_every_query(name: str, tmp_path: Path) -> None:
    found = list(queries(name))
    rules = [
        {"record": f"panel:{number}", "expr": query.text} for number, query in enumerate(found)
    ]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": name, "rules": rules}]}))
    done = run("promtool", "check", "rules", file)
    assert done.returncode == 0, done.stdout
    assert f"{len(found)} rules found" in done.stdout


def test_everything_that_is_exported_is_watched_or_drawn() -> None:
    """A metric that nobody looks at is either superfluous or a hole."""
    texts = [query.text for name in BOARDS for query in queries(name)]
    texts += [alert.expr for alert in alerts()]
    seen = {metric_of(name) for text in texts for name in NAME.findall(text)}
    assert {metric.name for metric in METRICS.values()} - seen == set()


def test_the_dashboards_that_the_procedures_name_are_there() -> None:
    text = (ROOT / PROCEDURES).read_text()
    named = set(re.findall(r"[Dd]ashboard\s+\*([^*]+)\*", text))
    titles = {board["title"].removeprefix("LLM Orchestrator: ") for board in BOARDS.values()}
    assert named == titles

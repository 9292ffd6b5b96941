"""What the drills have shown, from their result files: Markdown, HTML, JUnit, metrics.

Every number is read from a result file; nothing is typed in. A result older than the last change of
the sources is stale, one that was made with overrides is a trial, and both say so in their row.
What no result of these sources speaks of is listed as not tested, with the reason.
"""

from __future__ import annotations

import html
import json
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_orchestrator.drill import report_detail as detail
from llm_orchestrator.drill import report_plot as plots
from llm_orchestrator.drill.campaign import SCHEMA, summary
from llm_orchestrator.drill.marks import disorder_of
from llm_orchestrator.drill.metrics import as_text
from llm_orchestrator.drill.scenario import load_all, load_one
from llm_orchestrator.errors import ConfigError

Json = Any
NOTE = "<!-- Written by `llmo drill report`. Run the drills again to change it. -->"
_INTRODUCTION = """\
Each row is a drill: a real failure of real processes under load, judged by a witness that stands
outside. The recovery time runs from the moment at which the fault is confirmed (or from its end,
where that is said) to the first run that was accepted, executed and checked afterwards, and the
first step forward of a run that the fault had stopped; the later of the two. A drill passes only if
all its repeats pass. Reproduce a row: `llmo drill run NAME`; all of them: `make drill`."""


@dataclass(frozen=True, slots=True)
class Report:
    """All results of a folder, and the digest of the sources that are here now."""

    results: Mapping[str, dict[str, Json]]
    digest: str

    @property
    def not_tested(self) -> dict[str, str]:
        """Scenarios without a measurement of these sources, and why they have none."""
        reasons = {name: self._why_not(name) for name in load_all()}
        return {name: why for name, why in reasons.items() if why}

    def _why_not(self, name: str) -> str:
        found = self.results.get(name)
        if found is None:
            root = "; needs root" if "root" in load_one(name).needs else ""
            return f"never carried out{root}"
        if found["summary"]["status"] == "inconclusive":
            reasons = [
                reason
                for run in found["runs"]
                if run["status"] == "inconclusive"
                for reason in run["reasons"]
            ]
            return "inconclusive: " + "; ".join(dict.fromkeys(reasons))
        if found["overrides"]:
            return f"only a trial ({' '.join(found['overrides'])})"
        if found["digest"] != self.digest:
            return f"stale: the sources have changed since {found['finished_at']}"
        return ""

    def remark(self, result: Mapping[str, Json]) -> str:
        """`stale`, `trial`, what was not judged, or nothing."""
        words = []
        if result["digest"] != self.digest:
            words.append("stale")
        if result["overrides"]:
            words.append("trial: " + " ".join(result["overrides"]))
        unseen = dict.fromkeys(text for run in result["runs"] for text in run.get("not_judged", ()))
        if unseen:
            words.append("not judged: " + "; ".join(unseen))
        return ", ".join(words)


def read(folder: Path, digest: str) -> Report:
    """Every result file of `folder`. Raises ConfigError for one that is of another schema."""
    found = {}
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        result = json.loads(path.read_text())
        if result.get("schema") != SCHEMA:
            raise ConfigError(f"{path.name} is no result of {SCHEMA}", hint="llmo drill run NAME")
        found[result["scenario"]["id"]] = _checked(result)
    return Report(found, digest)


def _checked(result: dict[str, Json]) -> dict[str, Json]:
    """The result; where a run's marks contradict each other, that run is none."""
    runs = [_checked_run(run) for run in result["runs"]]
    if runs == result["runs"]:
        return result
    return result | {"runs": runs, "summary": summary(runs)}


def _checked_run(run: dict[str, Json]) -> dict[str, Json]:
    disorder = disorder_of(run["marks"])
    if not disorder or run["status"] in ("inconclusive", "lost"):
        return run
    reason = f"a fault of the drill: {'; '.join(disorder)}"
    return run | {"status": "inconclusive", "reasons": [*run["reasons"], reason]}


def write(report: Report, folder: Path, markdown: Path) -> list[Path]:
    """All forms of the report; the files."""
    folder.mkdir(parents=True, exist_ok=True)
    markdown.parent.mkdir(parents=True, exist_ok=True)
    files = {
        markdown: as_markdown(report),
        folder / "report.html": as_html(report),
        folder / "junit.xml": as_junit(report),
        folder / "drill.prom": as_text(report.results),
    }
    for category in _classes(report):
        files[markdown.parent / f"recovery_{category}.svg"] = plots.plot(report.results, category)
    for path, text in files.items():
        path.write_text(text)
    return list(files)


def _classes(report: Report) -> list[str]:
    return list(dict.fromkeys(each["scenario"]["class"] for each in report.results.values()))


# --- Markdown ---


def as_markdown(report: Report) -> str:
    """docs/disaster_recovery/RECOVERY_METRICS.md."""
    parts = [
        NOTE,
        "# Recovery, as measured",
        _INTRODUCTION,
        detail.verdict(report.results),
        "## The recovery objectives",
        "The limits are those that we inherit; our own goals are the scenarios'.",
        detail.table(detail.objectives(report.results)),
        "## By class",
        detail.table(detail.classes(report.results)),
        *(f"![{each}](recovery_{each}.svg)" for each in _classes(report)),
        "## All scenarios",
        detail.table(_rows(report)),
        "## What would be next",
        "\n".join(detail.recommendations(report.results)) or "Nothing was later than its goal.",
        "## How it was measured",
        *_environments(report),
        "## Each scenario",
        *detail.details(report.results),
        "## Not tested",
        "\n".join(f"- `{name}`: {why}" for name, why in report.not_tested.items()) or "Nothing.",
    ]
    return "\n\n".join(parts) + "\n"


def _rows(report: Report) -> Iterable[Sequence[object]]:
    yield (
        "scenario",
        "what happens",
        "result",
        "runs",
        "recovery time, median / max",
        "goal",
        "recovery point",
        "remark",
    )
    for name, result in report.results.items():
        summary, scenario = result["summary"], result["scenario"]
        times = summary["recovery_time_s"]
        point = summary["recovery_point_s_max"]
        since = ", from healing" if scenario["measure_from"] == "heal" else ""
        yield (
            f"`{name}`",
            scenario["title"],
            summary["status"],
            f"{summary['passed']} of {summary['n']}",
            f"{times['median']:.2f} / {times['max']:.2f} s{since}" if times else "-",
            f"{scenario['objectives']['recovery_time_s']:g} s",
            "-" if point is None else f"{point:.1f} s",
            report.remark(result),
        )


def _environments(report: Report) -> Iterable[str]:
    seen = {}
    for result in report.results.values():
        host = result["host"]
        key = (result["target"], result["commit"], *(str(host[word]) for word in sorted(host)))
        seen[key] = (
            f"- target `{result['target']}`, commit `{result['commit'] or 'unknown'}`, digest of "
            f"the sources `{result['digest']}`, {host['processors']} processors, "
            f"{host['memory_mb']} MiB, Linux {host['kernel']}, Python {host['python']}"
        )
    return ["\n".join(seen.values())] if seen else ["No result yet."]


# --- HTML ---


def as_html(report: Report) -> str:
    """One page that needs nothing else: table, timeline of each run, spread of the times."""
    parts = [_html_table(_rows(report))]
    for name, result in report.results.items():
        parts += [
            f"<h2 id='{name}'>{name}</h2><p>{html.escape(result['scenario']['title'])}</p>",
            plots.timeline(result["runs"]),
            plots.spread(
                result["runs"], float(result["scenario"]["objectives"]["recovery_time_s"])
            ),
            *(f"<p>{html.escape(r)}</p>" for run in result["runs"] for r in run["reasons"]),
        ]
    missing = "".join(
        f"<li>{name}: {html.escape(why)}</li>" for name, why in report.not_tested.items()
    )
    parts.append(f"<h2>Not tested</h2><ul>{missing or '<li>nothing</li>'}</ul>")
    style = (
        "body{font:15px system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse}td,th{border:1px solid #8886;padding:.3rem .5rem;"
        "text-align:left}svg{max-width:100%;height:auto;font:12px system-ui}"
        "@media(prefers-color-scheme:dark){body{background:#111;color:#eee}}"
    )
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Recovery, as measured</title>"
        f"<meta name='viewport' content='width=device-width'><style>{style}</style>"
        f"<h1>Recovery, as measured</h1>{''.join(parts)}</html>\n"
    )


def _html_table(rows: Iterable[Sequence[object]]) -> str:
    lines = []
    for number, row in enumerate(rows):
        tag = "td" if number else "th"
        cells = "".join(f"<{tag}>{html.escape(str(cell).strip('`'))}</{tag}>" for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


# --- for programs ---


def as_junit(report: Report) -> str:
    """One case for each repeat; what is inconclusive is skipped, never passed."""
    suite = ET.Element("testsuite", name="llmo drill")
    for name, result in report.results.items():
        for run in result["runs"]:
            case = ET.SubElement(
                suite,
                "testcase",
                classname=result["scenario"]["class"],
                name=f"{name}[{run['repeat']}]",
                time=str(run["recovery_time_s"] or 0),
            )
            if run["status"] == "inconclusive":
                ET.SubElement(case, "skipped", message="; ".join(run["reasons"]))
            elif run["status"] != "passed":
                ET.SubElement(case, "failure", type=run["status"]).text = "\n".join(run["reasons"])
    for name, why in report.not_tested.items():
        if name not in report.results:
            case = ET.SubElement(suite, "testcase", classname="not_tested", name=name)
            ET.SubElement(case, "skipped", message=why)
    ET.indent(suite)
    return ET.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"

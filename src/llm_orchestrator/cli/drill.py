"""`llmo drill`: inject a disaster for real, measure the recovery, keep the evidence.

A drill against `single` makes a system of its own in the data folder and touches nothing else. One
against a file breaks the staging system that the file describes, by the file's commands only.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_orchestrator.cli.options import Format, ObjectFormat, ObjectOutput, Output, make_app
from llm_orchestrator.cli.output import emit, print_object, print_rows
from llm_orchestrator.cli.session import Session, session_of
from llm_orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_orchestrator.clock import RealClock
    from llm_orchestrator.drill.scenario import Scenario, System
    from llm_orchestrator.drill.staging_file import Staging
    from llm_orchestrator.drill.target import Target

app = make_app("Inject a disaster for real and measure the recovery.")
_OWN = ("single", "lab")
_LISTED = ("scenario", "class", "title", "needs", "goal_s")
_PAST = ("finished_at", "scenario", "target", "status", "n", "passed", "recovery_time_s", "digest")
Results = Annotated[
    Path | None, typer.Option("--results", help="Result files. (drills/results in --data)")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PART.FIELD=VALUE", help="For trials: load.in_flight=20."),
]


@app.command("list")
def show_all(
    context: typer.Context,
    *,
    against: Annotated[
        str, typer.Option(metavar="TARGET", help="Say what it lacks: single, lab, or a file.")
    ] = "",
    output: Output = Format.TABLE,
) -> None:
    """The scenarios; of a staging system's file, what it lacks for each ("": nothing)."""
    from llm_orchestrator.drill.scenario import load_all, parse

    staging, rows = _staging(against), []
    for name, text in load_all().items():
        found = parse(text, name)
        rows.append(
            {
                "scenario": name,
                "class": found.category,
                "title": found.title,
                "needs": " ".join(found.needs),
                "goal_s": found.objectives.recovery_time_s,
            }
            | ({"lacks": _lacks(found, against, staging)} if against else {})
        )
    columns = (*_LISTED, "lacks") if against else _LISTED
    print_rows(rows, output.value, columns=columns, key="scenario")


@app.command()
def show(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A scenario, by name.")],
    *,
    output: ObjectOutput = ObjectFormat.YAML,
) -> None:
    """One scenario, with everything that its file leaves to the defaults."""
    from llm_orchestrator.drill.scenario import load_one

    print_object(load_one(name).plain(), output)


@app.command()
def run(
    context: typer.Context,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="Scenarios, by name.")
    ] = None,
    *,
    is_all: Annotated[
        bool, typer.Option("--all", help="Every one, or every one that --against can do.")
    ] = False,
    category: Annotated[
        str | None, typer.Option("--class", help="All of a class, such as application.")
    ] = None,
    repeat: Annotated[
        int, typer.Option(min=0, help="All of so many runs must pass; 0: as its file says.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Decides at which moment each fault comes.")] = 0,
    against: Annotated[
        str,
        typer.Option(
            metavar="TARGET",
            help="single, lab (as root), or the file of a staging system, which is broken for"
            " real; without it, what each is made for.",
        ),
    ] = "",
    overrides: Set = None,
    is_fresh: Annotated[
        bool, typer.Option("--fresh", help="Do not go on where the same command has stopped.")
    ] = False,
    results: Results = None,
    metrics: Annotated[
        Path | None,
        typer.Option(
            help="Keep this file of metrics up to date, for a textfile collector: FOLDER/drill.prom"
        ),
    ] = None,
) -> int:
    """Carry out scenarios. Exit code 6: an objective missed, 7: inconclusive, 8: work lost."""
    from llm_orchestrator.drill.campaign import Campaign, Plan

    session = session_of(context)
    staging = _staging(against)
    chosen = _chosen(
        names or [], is_all=is_all, category=category, against=against, staging=staging
    )
    plan = Plan(chosen, repeat, seed, against, tuple(overrides or ()))
    if staging is not None:
        plan = replace(plan, against=staging.name, staging=_digest(staging))
    campaign = Campaign(
        plan,
        _folder(session),
        results or _folder(session) / (f"results-{staging.name}" if staging else "results"),
        make_target=_maker(session, against, staging),
        tell=session.note,
        metrics=metrics,
    )
    return session.run(campaign.run(is_fresh=is_fresh))


def _folder(session: Session) -> Path:
    return session.config.data_dir / "drills"


def _staging(against: str) -> Staging | None:
    """The system that the file `against` describes; None for a target of the drill's own."""
    if against in ("", *_OWN):
        return None
    from llm_orchestrator.drill.staging_file import read

    if not Path(against).is_file():
        raise ConfigError(
            f"no target {against!r}: it is neither {' nor '.join(_OWN)}, nor a file",
            hint="llmo drill run NAME --against lab",
        )
    return read(Path(against))


def _digest(staging: Staging) -> str:
    from llm_orchestrator.drill.campaign import digest_of

    return digest_of(staging.model_dump_json())


def _maker(
    session: Session, against: str, staging: Staging | None
) -> Callable[[Path, Scenario], Target]:
    from llm_orchestrator.drill.cluster import ClusterTarget
    from llm_orchestrator.drill.single import SingleTarget
    from llm_orchestrator.drill.staging import StagingTarget

    if staging is not None:
        return lambda folder, scenario: StagingTarget(
            folder, session.clock, staging, scenario=scenario
        )
    kinds: dict[str, Callable[[Path, RealClock, System], Target]]
    kinds = {"single": SingleTarget, "lab": ClusterTarget}
    return lambda folder, scenario: kinds[against or scenario.needs[0]](
        folder, session.clock, scenario.system
    )


def _lacks(scenario: Scenario, against: str, staging: Staging | None) -> str:
    """What is not there for it, in words; "" when it can be carried out."""
    if staging is not None:
        return "; ".join(staging.missing(scenario))
    return "" if not against or against in scenario.needs else f"needs {' '.join(scenario.needs)}"


def _chosen(
    names: list[str],
    *,
    is_all: bool,
    category: str | None,
    against: str,
    staging: Staging | None,
) -> list[str]:
    from llm_orchestrator.drill.scenario import CLASSES, load_all, load_one

    if bool(names) + is_all + (category is not None) != 1:
        raise typer.BadParameter("give names, or --all, or --class CLASS")
    if category is not None and category not in CLASSES:
        raise typer.BadParameter(f"there is no class {category!r}: {', '.join(CLASSES)}")
    found = [load_one(name) for name in names or load_all()]
    able = [each for each in found if not _lacks(each, against, staging)]
    if names and staging is not None:
        return [each.id for each in found]  # what one lacks is its result: inconclusive
    if names and len(able) < len(found):
        wrong = next(each.id for each in found if each not in able)
        raise ConfigError(f"{wrong} cannot be carried out against {against}")
    chosen = [each.id for each in able if category in (None, each.category)]
    if not chosen:
        raise ConfigError(
            f"{against} can carry out none of them", hint=f"llmo drill list --against {against}"
        )
    return chosen


@app.command()
def report(
    context: typer.Context,
    *,
    results: Results = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder of HTML, JUnit and metrics.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="The Markdown page. (RECOVERY_METRICS.md in --output)")
    ] = None,
) -> None:
    """Write the report of all results: Markdown, HTML, JUnit, metrics."""
    from llm_orchestrator.drill.campaign import source_digest
    from llm_orchestrator.drill.report import read, write

    session = session_of(context)
    folder = _folder(session)
    place = output or folder / "report"
    found = read(results or folder / "results", source_digest())
    for path in write(found, place, markdown or place / "RECOVERY_METRICS.md"):
        emit(str(path))
    for name, why in found.not_tested.items():
        session.note(f"not tested: {name}, {why}")


@app.command()
def judge(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The evidence of one run.")],
) -> int:
    """Judge the evidence of a drill again; exit code 8 when a promise was broken."""
    from dataclasses import asdict

    from llm_orchestrator.drill.judge import judge as compare
    from llm_orchestrator.drill.judge import read
    from llm_orchestrator.drill.outcome import EXIT_CODES, LOST, PASSED
    from llm_orchestrator.errors import NotFound

    ledger, llm_ledgers = folder / "witness.jsonl", sorted(folder.glob("llm*.jsonl"))
    if not ledger.exists() or not llm_ledgers:
        raise NotFound(f"{folder} holds no evidence of a drill", hint="llmo drill history")
    verdict = compare(read(ledger, llm_ledgers))
    print_object(asdict(verdict), "json")
    return EXIT_CODES[PASSED if verdict.is_whole else LOST]


@app.command()
def history(context: typer.Context, *, output: Output = Format.TABLE) -> None:
    """Every drill that was carried out from this data folder, oldest first."""
    path = _folder(session_of(context)) / "history.jsonl"
    rows: list[dict[str, Any]] = []
    if path.exists():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    if output is Format.TABLE:
        for row in rows:
            times = row["recovery_time_s"]
            row["recovery_time_s"] = times["max"] if times else None
    print_rows(rows, output.value, columns=_PAST, key="scenario")


@app.command("abort-all")
def abort_all(context: typer.Context) -> int:
    """End every drill of this data folder and take its faults away."""
    from llm_orchestrator.drill.deadman import run_commands

    session = session_of(context)
    troubles = []
    for path in sorted((_folder(session) / "live").glob("*.json")):
        live = json.loads(path.read_text())
        if _is_drill(live["pid"]):
            os.kill(live["pid"], signal.SIGINT)
            session.note(f"drill {live['pid']} is told to end")
        troubles += run_commands(live["commands"])
        path.unlink(missing_ok=True)
    for trouble in troubles:
        session.warn(trouble)
    return 1 if troubles else 0


def _is_drill(pid: int) -> bool:
    """A process id may have gone to somebody else."""
    try:
        return b"\0drill\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False

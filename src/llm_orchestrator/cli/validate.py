"""`llmo validate`: every mistake in workflow files, each with its line and column, all at once."""

from __future__ import annotations

from typing import Annotated

import typer

from llm_orchestrator.cli.options import ObjectFormat, make_app
from llm_orchestrator.cli.output import emit, print_object
from llm_orchestrator.cli.report import report, say
from llm_orchestrator.cli.session import Session, session_of
from llm_orchestrator.errors import DefinitionError, OrchestratorError, Problem
from llm_orchestrator.model import Json

app = make_app(
    "Check workflow files. Mistakes and warnings go to stderr as PATH:LINE:COL: message; "
    "exit code 2 when a file cannot run."
)


@app.command()
def validate(
    context: typer.Context,
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="YAML or JSON files.")],
    *,
    output: Annotated[ObjectFormat, typer.Option("--output", "-o", help="How to print.")] = (
        ObjectFormat.TABLE
    ),
    is_strict: Annotated[
        bool, typer.Option("--strict", help="Warnings count as mistakes.")
    ] = False,
) -> int:
    """Check workflow files without running anything."""
    session = session_of(context)
    code, found = 0, []
    for file in files:
        facts, failed = _check(session, file)
        if is_strict and facts["warnings"]:
            failed = failed or 2
        found.append(facts)
        code = code or failed
        if output is ObjectFormat.TABLE and not failed:
            emit(f"{file}: ok, {facts['name']} {facts['version']}, {facts['steps']} steps")
    if output is not ObjectFormat.TABLE:
        print_object(found, output)
    return code


def _check(session: Session, file: str) -> tuple[dict[str, Json], int]:
    """What is to say of one file, and the exit code for it."""
    from llm_orchestrator.cli.target import of_file
    from llm_orchestrator.language.definition import walk

    facts: dict[str, Json] = {"file": file, "ok": False, "errors": [], "warnings": []}
    try:
        definition = of_file(file, session.config).definition
    except DefinitionError as error:
        facts["errors"] = [_facts(problem) for problem in error.problems]
        return facts, report(DefinitionError(error.problems), is_debug=session.flags.is_debug)
    except OrchestratorError as error:
        facts["errors"] = [{"line": 0, "column": 0, "message": error.message}]
        return facts, report(error, is_debug=session.flags.is_debug)
    assert definition is not None
    for warning in definition.warnings:
        say(f"{warning.path}:{warning.line}:{warning.column}: warning: {warning.message}")
    facts.update(
        ok=True,
        name=definition.name,
        version=definition.version,
        digest=definition.digest,
        steps=sum(1 for _ in walk(definition.steps)),
        warnings=[_facts(problem) for problem in definition.warnings],
    )
    return facts, 0


def _facts(problem: Problem) -> dict[str, Json]:
    return {"line": problem.line, "column": problem.column, "message": problem.message}

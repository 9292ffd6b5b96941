"""From a workflow file to a `Definition`, or to every problem in it at once, each with its place.

Reads one file, decides nothing about runs, and never stops at the first mistake unless the text
itself cannot be parsed.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llm_orchestrator.errors import DefinitionError, NotFound, Problem
from llm_orchestrator.language.build import STEPS_MAX, Issue, build
from llm_orchestrator.language.definition import Definition, StepTypes
from llm_orchestrator.language.source import BYTES_MAX, Source, SourceError, read
from llm_orchestrator.language.templates import Templates
from llm_orchestrator.language.validate import KNOWN_DATABASES, KNOWN_PROVIDERS, Known, validate

_HINT = "correct the lines above, then run `llmo validate FILE`"


def load_file(
    path: str | Path,
    *,
    step_types: StepTypes | None = None,
    known_providers: Iterable[str] | None = None,
    known_databases: Iterable[str] | None = None,
    templates: Templates | None = None,
) -> Definition:
    """Read a workflow file (YAML or JSON). Raises NotFound or DefinitionError."""
    file = Path(path)
    try:
        with file.open("rb") as stream:
            content = stream.read(BYTES_MAX + 1)
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {path}", hint="check the path") from error
    except OSError as error:
        raise NotFound(f"cannot read {path}: {error.strerror or error}") from error
    return load_text(
        content,
        str(path),
        step_types=step_types,
        known_providers=known_providers,
        known_databases=known_databases,
        templates=templates,
    )


def load_text(
    text: str | bytes,
    source: str = "workflow",
    *,
    step_types: StepTypes | None = None,
    known_providers: Iterable[str] | None = None,
    known_databases: Iterable[str] | None = None,
    templates: Templates | None = None,
) -> Definition:
    """Read a workflow from text; `source` names it in problems. Raises DefinitionError."""
    templates = templates or Templates()
    try:
        parsed = read(text, is_json=source.lower().endswith(".json"))
    except SourceError as error:
        problem = Problem(source, error.line or 1, error.column or 1, error.message)
        raise DefinitionError([problem], hint=_HINT) from error
    built = build(parsed.data, templates=templates, step_types=step_types, steps_max=STEPS_MAX)
    if isinstance(built, list):
        raise DefinitionError(_problems(built, parsed, source), hint=_HINT)
    known = Known(
        frozenset(KNOWN_PROVIDERS if known_providers is None else known_providers),
        frozenset(KNOWN_DATABASES if known_databases is None else known_databases),
    )
    issues = [*built.issues, *validate(built, templates=templates, known=known)]
    errors = [issue for issue in issues if not issue.is_warning]
    if errors:
        raise DefinitionError(_problems(errors, parsed, source), hint=_HINT)
    built.definition.warnings.extend(_problems(issues, parsed, source))
    return built.definition


def _problems(issues: list[Issue], parsed: Source, source: str) -> list[Problem]:
    """In the order of the file, each said once."""
    found = {Problem(source, *parsed.find(issue.loc), issue.message): None for issue in issues}
    return sorted(found, key=lambda problem: (problem.line, problem.column))

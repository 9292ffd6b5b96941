"""From a workflow file to a `Definition`, or to every problem in it at once, each with its place.

Reads one file, decides nothing about runs, and never stops at the first mistake unless the text
itself cannot be parsed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llm_orchestrator.errors import DefinitionError, NotFound, Problem
from llm_orchestrator.language import sandbox
from llm_orchestrator.language.build import STEPS_MAX, Issue, build
from llm_orchestrator.language.definition import Definition, StepTypes
from llm_orchestrator.language.sandbox import TooMuch
from llm_orchestrator.language.source import BYTES_MAX, Source, SourceError, read
from llm_orchestrator.language.templates import Templates
from llm_orchestrator.language.validate import KNOWN_DATABASES, KNOWN_PROVIDERS, Known, validate
from llm_orchestrator.model import Json

CPU_S_MAX = 1.0
STEP_CPU_S_MAX = 0.002
LARGEST_CPU_S_MAX = 10.0
LARGE_BYTES = 20_000
LARGE_SIZE = 5_000
"""A file above one of these is checked in a child process, which may take CPU_S_MAX
and STEP_CPU_S_MAX for each step."""
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
    known = Known(
        frozenset(KNOWN_PROVIDERS if known_providers is None else known_providers),
        frozenset(KNOWN_DATABASES if known_databases is None else known_databases),
    )
    if step_types:  # a child does not have them
        return _load(text, source, known, templates=templates, step_types=step_types)
    if len(text) <= LARGE_BYTES:
        with contextlib.suppress(_Large):
            return _load(text, source, known, templates=templates, is_small=True)
    return _load_aside(text, source, known)


class _Large(Exception):
    """Checking it may be much."""


def _load(
    text: str | bytes, source: str, known: Known, *, templates: Templates | None = None,
    step_types: StepTypes | None = None, is_small: bool = False,
) -> Definition:  # fmt: skip
    """In this process. Raises _Large, if it is to be small and is not."""
    templates = templates or Templates()
    try:
        parsed = read(text, is_json=source.lower().endswith(".json"))
    except SourceError as error:
        problem = Problem(source, error.line or 1, error.column or 1, error.message)
        raise DefinitionError([problem], hint=_HINT) from error
    if is_small and (parsed.size > LARGE_SIZE or _has_patterns(parsed.data)):
        raise _Large
    built = build(parsed.data, templates=templates, step_types=step_types, steps_max=STEPS_MAX)
    if isinstance(built, list):
        raise DefinitionError(_problems(built, parsed, source), hint=_HINT)
    issues = [*built.issues, *validate(built, templates=templates, known=known)]
    errors = [issue for issue in issues if not issue.is_warning]
    if errors:
        raise DefinitionError(_problems(errors, parsed, source), hint=_HINT)
    built.definition.warnings.extend(_problems(issues, parsed, source))
    return built.definition


def _has_patterns(data: Any) -> bool:
    """True for more regular expressions than can be compiled and tried in no time."""
    inputs = data.get("inputs") if isinstance(data, dict) else None
    specs = inputs.values() if isinstance(inputs, dict) else ()
    found = [str(spec["pattern"]) for spec in specs if isinstance(spec, dict) and "pattern" in spec]
    return len(found) > 3 or sum(map(len, found)) > 500


def _load_aside(text: str | bytes, source: str, known: Known) -> Definition:
    """In a child. A text in UTF-8 stays what it is, and so do bytes that are none."""
    plain = text if isinstance(text, str) else text.decode("utf-8", "surrogateescape")
    question = {
        "text": plain,
        "is_text": isinstance(text, str),
        "source": source,
        "known": [sorted(known.providers), sorted(known.databases)],
    }
    try:
        said = sandbox.ask(f"{__name__}:answer", question, cpu_s=_allowed_s(plain))
    except TooMuch as error:
        problem = Problem(source, 1, 1, f"checking this file is too much: {error.message}")
        raise DefinitionError([problem], hint="split it: `type: workflow` calls another") from error
    problems = [Problem(*problem) for problem in said["problems"]]
    if "definition" not in said:
        raise DefinitionError(problems, hint=_HINT)
    definition = Definition.from_canonical(said["definition"].encode())
    definition.warnings.extend(problems)
    return definition


def _allowed_s(text: str) -> float:
    """More for a file of thousands of steps than for one that is only large."""
    return min(CPU_S_MAX + STEP_CPU_S_MAX * text.count("type"), LARGEST_CPU_S_MAX)


def answer(question: Mapping[str, Any]) -> Json:
    """In the child: {"problems", and "definition" if none of them is an error}."""
    text, (providers, databases) = question["text"], question["known"]
    content = text if question["is_text"] else text.encode("utf-8", "surrogateescape")
    try:
        known = Known(frozenset(providers), frozenset(databases))
        definition = _load(content, question["source"], known)
    except DefinitionError as error:
        return {"problems": [list(problem) for problem in error.problems]}
    problems: Json = [list(problem) for problem in definition.warnings]
    return {"problems": problems, "definition": definition.canonical().decode()}


def _problems(issues: list[Issue], parsed: Source, source: str) -> list[Problem]:
    """In the order of the file, each said once."""
    found = {Problem(source, *parsed.find(issue.loc), issue.message): None for issue in issues}
    return sorted(found, key=lambda problem: (problem.line, problem.column))

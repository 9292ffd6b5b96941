"""Loading workflow text in tests, and its problems as short lines."""

from __future__ import annotations

from textwrap import dedent, indent
from typing import Any

from llm_orchestrator.errors import DefinitionError
from llm_orchestrator.language.definition import Definition
from llm_orchestrator.language.load import load_text


def load(text: str, source: str = "w.yaml", **options: Any) -> Definition:
    return load_text(dedent(text).lstrip("\n"), source, **options)


def problems(text: str, source: str = "w.yaml", **options: Any) -> list[str]:
    """Every problem as `LINE:COLUMN: message`; empty when there is none."""
    try:
        load(text, source, **options)
    except DefinitionError as error:
        return [f"{p.line}:{p.column}: {p.message}" for p in error.problems]
    return []


def workflow(*steps: str, top: str = "") -> str:
    """A file of these steps, each a flow mapping or block without its dash, from line 2 + top."""
    body = "".join(f"- {indent(dedent(step).strip(), '  ').lstrip()}\n" for step in steps)
    return f"name: w\n{dedent(top).lstrip()}steps:\n{body}"


def messages(*steps: str, top: str = "", **options: Any) -> list[str]:
    """The messages of a file of these steps, without their places."""
    found = problems(workflow(*steps, top=top), **options)
    return [line.split(": ", 1)[1] for line in found]


LLM = "provider: echo, model: m, prompt: hello"

"""Definitions as the server needs them: read from a request, and made into runs."""

from __future__ import annotations

import json
from contextlib import suppress

from llm_orchestrator.config import Config
from llm_orchestrator.engine.flows import is_code
from llm_orchestrator.errors import DefinitionError, InputError, Problem
from llm_orchestrator.language.definition import Definition
from llm_orchestrator.language.load import load_text
from llm_orchestrator.model import Json, NewRun, Workflow
from llm_orchestrator.server.surface import Parsed
from llm_orchestrator.wire.tools import as_workflow, checked_inputs, child_steps, known_providers

_KEPT = 500


class Definitions:
    """See server.surface.Catalogue. Parsed definitions are kept by digest."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._known: list[str] | None = None
        self._parsed: dict[str, Definition | None] = {}

    def parse(self, content: bytes, *, is_json: bool) -> Parsed:
        """The server reads no files: a step that names one is a mistake."""
        if self._known is None:
            self._known = known_providers(self._config)
        source = "workflow.json" if is_json else "workflow.yaml"
        definition = load_text(content, source, known_providers=self._known)
        for step in child_steps(json.loads(definition.canonical())):
            message = f"`file: {step['file']}`: name a registered workflow instead"
            raise DefinitionError([Problem(source, 1, 1, message)])
        return Parsed(as_workflow(definition), [str(each) for each in definition.warnings])

    def new_run(self, stored: Workflow, inputs: Json, run_id: str) -> NewRun:
        """Queue, priority and labels as the definition says."""
        definition = self._definition(stored)
        if definition is None:
            value = {} if inputs is None else inputs
            if not isinstance(value, dict):
                raise InputError(f"inputs must be an object, not {type(value).__name__}")
            return NewRun(run_id, stored.name, stored.version, stored.digest, input=value)
        return NewRun(
            run_id,
            stored.name,
            stored.version,
            stored.digest,
            priority=definition.priority,
            queue=definition.queue,
            labels=dict(definition.labels or {}),
            input=checked_inputs(definition, inputs),
        )

    def _definition(self, stored: Workflow) -> Definition | None:
        """None for a Python workflow. Threads may ask at the same time."""
        with suppress(KeyError):
            return self._parsed[stored.digest]
        if len(self._parsed) >= _KEPT:
            self._parsed.clear()
        found = None if is_code(stored) else Definition.from_canonical(stored.definition)
        self._parsed[stored.digest] = found
        return found

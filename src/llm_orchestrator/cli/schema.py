"""`llmo schema`: the workflow language as a JSON Schema, for editors."""

from __future__ import annotations

from llm_orchestrator.cli.options import make_app
from llm_orchestrator.cli.output import print_object

app = make_app("Print the JSON Schema of workflow files, for editors.")


@app.command()
def schema() -> None:
    """Print the JSON Schema (draft 2020-12) of workflow files."""
    from llm_orchestrator.language.schema import json_schema

    print_object(json_schema(), "json")

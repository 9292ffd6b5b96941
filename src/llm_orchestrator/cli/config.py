"""`llmo config`: every setting, and with --origin where it comes from. Secrets are not settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from llm_orchestrator.cli.options import Format, Output, make_app
from llm_orchestrator.cli.output import print_rows
from llm_orchestrator.cli.session import session_of
from llm_orchestrator.model import Json

_SECRET = re.compile("key|token|secret|password", re.IGNORECASE)
_PASSWORD = re.compile(r"(//[^/@:]*):[^/@]*@")

app = make_app("Show the settings and where they come from.")


@app.callback()
def config() -> None:
    """Show the settings and where they come from."""


@app.command()
def show(
    context: typer.Context,
    *,
    has_origin: Annotated[
        bool, typer.Option("--origin", help="Where each comes from: flag, variable, file.")
    ] = False,
    output: Output = Format.TABLE,
) -> None:
    """Print every setting."""
    session = session_of(context)
    rows: list[dict[str, Json]] = []
    for setting in session.config.settings():
        value = setting.value
        if setting.name == "store" and not value:
            value = session.store_url
        row: dict[str, Json] = {"name": setting.name, "value": _plain(value)}
        if has_origin:
            row["origin"] = setting.origin
        rows.append(row)
    columns = ("name", "value", "origin") if has_origin else ("name", "value")
    print_rows(rows, output, columns=columns, key="name")


def _plain(value: object, name: str = "") -> Json:
    """A value that may be shown: what looks like a secret in the file is not."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, str(key)) for key, item in value.items()}
    is_reference = name.endswith("_env")
    if isinstance(value, str) and not is_reference and _SECRET.search(name):
        return "(hidden)"
    if isinstance(value, str | Path):
        return _PASSWORD.sub(r"\1:(hidden)@", str(value))
    return value

"""Options that several verbs share, and how a group of verbs is made."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

EVERYWHERE = "Before or after any verb: --store URL, --data DIR, --debug, --quiet."


class Format(StrEnum):
    """How data is printed."""

    TABLE = "table"
    JSON = "json"
    JSONL = "jsonl"
    YAML = "yaml"
    IDS = "ids"


class ObjectFormat(StrEnum):
    """How one thing is printed."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


Output = Annotated[Format, typer.Option("--output", "-o", help="How to print. Ids are never cut.")]
ObjectOutput = Annotated[ObjectFormat, typer.Option("--output", "-o", help="How to print.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, change nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="The same as -o json.")]
RunId = Annotated[str, typer.Argument(metavar="RUN", help="A run's id.")]
RunOrStdin = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's id; `-` reads ids from stdin.")
]
RunIds = Annotated[
    list[str], typer.Argument(metavar="RUN...", help="Runs; `-` reads ids from stdin.")
]


def make_app(text: str) -> typer.Typer:
    """A verb, or a group of verbs, without what typer adds of its own."""
    return typer.Typer(
        help=text,
        epilog=EVERYWHERE,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )

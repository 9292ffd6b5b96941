"""Printing data on stdout: tables for people, the other formats for programs.

A table cuts long texts, never an id; with a terminal it gets a little colour (rich minds NO_COLOR),
without one it is plain text in columns. Programs get every field: fields may be added in later
versions, never renamed.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

from llm_orchestrator.cli.report import printable
from llm_orchestrator.model import Json

Row = Mapping[str, Json]
CELL_MAX = 60
CUT = frozenset({"note", "labels", "payload", "value"})
"""Columns whose texts a table may cut, unless they hold an id."""
_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-")
_STYLES = {
    "completed": "green",
    "ok": "green",
    "running": "cyan",
    "waiting": "yellow",
    "pending": "yellow",
    "warning": "yellow",
    "paused": "magenta",
    "failed": "red",
    "error": "red",
    "damaged": "red",
    "cancelled": "dim",
    "skipped": "dim",
}


def print_rows(
    rows: Sequence[Row], kind: str, *, columns: Sequence[str], key: str = "run_id"
) -> None:
    """A list of things. `columns` are those of the table; `key` names the id."""
    if kind == "ids":
        for row in rows:
            emit(str(row[key]))
    elif kind == "jsonl":
        for row in rows:
            emit(to_json(row, indent=None))
    elif kind == "json":
        emit(to_json(list(rows)))
    elif kind == "yaml":
        emit(to_yaml([dict(row) for row in rows]).rstrip("\n"))
    else:
        print_table(rows, columns)


def print_object(value: Json, kind: str) -> None:
    """One thing, as JSON or YAML."""
    emit(to_yaml(value).rstrip("\n") if kind == "yaml" else to_json(value))


def print_table(rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Columns as wide as their content. Prints nothing at all for no rows."""
    if not rows:
        return
    table = [[_cell(row.get(name), is_whole=name not in CUT) for name in columns] for row in rows]
    heads = [name.removesuffix("_id").replace("_", " ").upper() for name in columns]
    widths = [max(map(len, column)) for column in zip(heads, *table, strict=True)]
    write = _Colour() if sys.stdout.isatty() else None
    for number, cells in enumerate([heads, *table]):
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        padded[-1] = cells[-1]
        if write is None:
            emit("  ".join(padded).rstrip())
        else:
            write.line(padded, is_head=number == 0)


class _Colour:
    """Writes the cells of a line with the colours of their words."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False)

    def line(self, cells: Sequence[str], *, is_head: bool) -> None:
        from rich.text import Text

        text = Text()
        for number, cell in enumerate(cells):
            style = "bold" if is_head else _STYLES.get(cell.strip(), "")
            text.append(("  " if number else "") + cell, style)
        self._console.print(text, soft_wrap=True)


def _cell(value: Json, *, is_whole: bool) -> str:
    if value is None or value == "":
        return "-"
    text: str
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        text = ",".join(f"{name}={item}" for name, item in value.items()) or "-"
    else:
        text = value if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False)
    text = printable(" ".join(text.split()))
    if is_whole or len(text) <= CELL_MAX or _ID.search(text):
        return text
    return text[: CELL_MAX - 1] + "…"


def emit(text: str) -> None:
    """One line of data. What the terminal's encoding cannot say is escaped, never lost."""
    try:
        sys.stdout.write(text + "\n")
    except UnicodeEncodeError:
        sys.stdout.write(text.encode("ascii", "backslashreplace").decode() + "\n")


def to_json(value: Json, *, indent: int | None = 2) -> str:
    """JSON that every parser takes: no NaN, and no half of a surrogate pair."""
    separators = None if indent else (",", ":")
    data = plain(value)
    text = json.dumps(data, indent=indent, ensure_ascii=False, separators=separators)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(data, indent=indent, separators=separators)
    return text


def to_yaml(value: Json) -> str:
    """YAML in block style, in the order of the data."""
    from ruamel.yaml import YAML

    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.allow_unicode = True
    writer.width = 100
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    stream = StringIO()
    writer.dump(plain(value), stream)
    return stream.getvalue().removesuffix("...\n")


def plain(value: Any) -> Json:
    """`value` as JSON knows it; numbers that JSON lacks become their names."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str):
        return str(value)
    return value


def duration(milliseconds: float | None) -> str:
    """A length of time for people."""
    if milliseconds is None:
        return "-"
    if milliseconds < 1000:
        return f"{milliseconds:.0f} ms"
    seconds = milliseconds / 1000
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m{seconds:02d}s" if hours else f"{minutes}m{seconds:02d}s"


def count(number: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def dollars(amount: float) -> str:
    """A price for people: enough digits for a fraction of a cent."""
    return "-" if not amount else f"${amount:.4f}" if amount >= 0.0001 else f"${amount:.2g}"

"""Loads `queries.sql`: every statement by name, its parameters numbered in order of appearance.

SQLite and PostgreSQL share the text. Where one of them needs other words, a name line with
`@sqlite` or `@postgres` says whose they are. PostgreSQL's commit is one statement put together
from parts (`compose`), so that a batch is one round trip whatever it holds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

_ROWS = re.compile(r"\bunnest\(([^()]*)\)")
_PARAMETER = re.compile(r"(?<!:):([a-z_]+)")
Dialect = Literal["sqlite", "postgres"]
_SIGNS: dict[Dialect, str] = {"sqlite": "?", "postgres": "$"}


@dataclass(frozen=True, slots=True)
class Query:
    """One statement. `sql` uses ?1, ?2, ... or $1, $2, ...; `parameters` names them in order."""

    name: str
    sql: str
    parameters: tuple[str, ...]

    def bind(self, /, **values: object) -> tuple[object, ...]:
        """The values in the statement's order. A missing or unknown name raises KeyError."""
        if len(values) != len(self.parameters):
            raise KeyError(f"{self.name} takes {self.parameters}, not {tuple(values)}")
        return tuple(values[name] for name in self.parameters)


@cache
def load_queries(dialect: Dialect = "sqlite") -> dict[str, Query]:
    """All statements of queries.sql, by name."""
    return {name: _number(name, body, dialect) for name, body in _bodies(dialect).items()}


@cache
def compose(
    parts: tuple[str, ...], checks: tuple[str, ...], *, has_single_rows: bool = False
) -> Query:
    """One PostgreSQL statement: `append`, then `parts`, each a CTE; it fails unless `checks` hold.

    Its one row: the runs whose entries went in, a 1, and what the parts answer. With
    `has_single_rows` it takes values where it takes arrays else: a commit of one row costs the
    server and us a quarter less.
    """
    bodies = _bodies("postgres")
    conditions = "\n  AND ".join(bodies[name] for name in checks) or "true"
    answers = "".join(bodies.get(f"{name}_answer", "") for name in parts)
    ends = bodies["append_end"].replace("CHECKS", conditions).replace("ANSWERS", answers)
    text = ",\n".join(bodies[name] for name in ("append", *parts)) + "\n" + ends
    if has_single_rows:
        text = _ROWS.sub(lambda found: f"(VALUES ({found[1].replace('[]', '')}))", text)
    return _number("+".join(parts), text, "postgres")


@cache
def _bodies(dialect: Dialect) -> dict[str, str]:
    text = Path(__file__).with_name("queries.sql").read_text()
    found: dict[str, str] = {}
    for part in text.split("-- name: ")[1:]:
        title, _, body = part.partition("\n")
        name, _, whose = title.strip().partition(" @")
        if whose in ("", dialect):
            lines = [line for line in body.splitlines() if not line.startswith("--")]
            found[name] = "\n".join(lines).strip().rstrip(";")
    return found


def _number(name: str, body: str, dialect: Dialect) -> Query:
    order: list[str] = []

    def place(match: re.Match[str]) -> str:
        if match[1] not in order:
            order.append(match[1])
        return f"{_SIGNS[dialect]}{order.index(match[1]) + 1}"

    return Query(name, _PARAMETER.sub(place, body), tuple(order))

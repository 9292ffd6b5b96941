"""Loads `queries.sql`: every statement by name, its parameters numbered in order of appearance."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_PARAMETER = re.compile(r"(?<!:):([a-z_]+)")


@dataclass(frozen=True, slots=True)
class Query:
    """One statement. `sql` uses ?1, ?2, ...; `parameters` names them in that order."""

    name: str
    sql: str
    parameters: tuple[str, ...]

    def bind(self, /, **values: object) -> tuple[object, ...]:
        """The values in the statement's order. A missing or unknown name raises KeyError."""
        if len(values) != len(self.parameters):
            raise KeyError(f"{self.name} takes {self.parameters}, not {tuple(values)}")
        return tuple(values[name] for name in self.parameters)


@cache
def load_queries() -> dict[str, Query]:
    """All statements of queries.sql, by name."""
    text = Path(__file__).with_name("queries.sql").read_text()
    queries = {}
    for part in text.split("-- name: ")[1:]:
        name, _, body = part.partition("\n")
        lines = [line for line in body.splitlines() if not line.startswith("--")]
        queries[name.strip()] = _number(name.strip(), "\n".join(lines).strip().rstrip(";"))
    return queries


def _number(name: str, body: str) -> Query:
    order: list[str] = []

    def place(match: re.Match[str]) -> str:
        if match[1] not in order:
            order.append(match[1])
        return f"?{order.index(match[1]) + 1}"

    return Query(name, _PARAMETER.sub(place, body), tuple(order))

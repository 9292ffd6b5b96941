"""Statements by name, parameters in the order in which they first appear."""

from __future__ import annotations

import re
import sqlite3
from importlib.resources import files

import pytest

from llm_orchestrator.store.queries import Query, compose, load_queries

TEXT = files("llm_orchestrator.store").joinpath("queries.sql").read_text()


def test_every_statement_is_loaded_once_under_its_own_name() -> None:
    names = re.findall(r"^-- name: (\w+)(?: @sqlite)?$", TEXT, re.MULTILINE)
    assert sorted(names) == sorted(set(names))
    assert set(load_queries()) == set(names)


def test_every_statement_fits_the_schema() -> None:
    schema = files("llm_orchestrator.store").joinpath("schema_sqlite.sql").read_text()
    database = sqlite3.connect(":memory:")
    database.executescript(schema)
    for query in load_queries().values():
        database.execute(f"EXPLAIN {query.sql}", [None] * len(query.parameters))
    database.close()


def test_a_parameter_that_appears_twice_is_bound_once() -> None:
    append = load_queries()["append"]
    assert len(append.parameters) == len(set(append.parameters)) == 11
    number = append.parameters.index("run_id") + 1
    assert len(re.findall(rf"\?{number}\b", append.sql)) == 2


def test_binding_takes_exactly_the_parameters() -> None:
    query = Query("q", "SELECT ?1, ?2", ("b", "a"))
    assert query.bind(a=1, b=2) == (2, 1)
    with pytest.raises(KeyError, match="takes"):
        query.bind(a=1)
    with pytest.raises(KeyError):
        query.bind(a=1, c=2)


def test_few_statements_differ_between_databases() -> None:
    assert TEXT.count("Differs because") <= 12


def test_every_statement_is_used() -> None:
    source = "".join(
        path.read_text()
        for path in files("llm_orchestrator.store").iterdir()
        if path.name.endswith(".py")
    )
    unused = [
        name
        for name in load_queries()
        if f'"{name}"' not in source and not name.startswith("expire_")
    ]
    assert unused == []


def test_a_lone_entry_takes_the_same_values_as_many_without_arrays() -> None:
    many, one = compose((), ()), compose((), (), has_single_rows=True)
    assert one.parameters == many.parameters
    assert "unnest" in many.sql
    assert "unnest" not in one.sql
    assert "[]" not in one.sql
    assert one.sql.count("VALUES") == many.sql.count("VALUES") + many.sql.count("unnest")

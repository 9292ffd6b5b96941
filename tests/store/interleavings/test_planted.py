"""Planted bugs change something, and are gone afterwards."""

from __future__ import annotations

import pytest

from llm_orchestrator.store.queries import load_queries
from tests.store.interleavings.planted import edit, edited


def test_a_bug_that_changes_nothing_cannot_be_planted() -> None:
    assert edit("SELECT a,\n  b FROM c", ("a, b", "b, a")) == "SELECT b, a FROM c"
    for old, new in (("x", "y"), ("a, b", "a,\n b")):
        with pytest.raises(ValueError, match="changes nothing"):
            edit("SELECT a,\n  b FROM c", (old, new))


def test_a_planted_bug_ends_with_its_trial() -> None:
    was = load_queries("postgres")["pick"].sql
    with edited("pick", ("SKIP LOCKED", "NOWAIT"))():
        assert "NOWAIT" in load_queries("postgres")["pick"].sql
    assert load_queries("postgres")["pick"].sql == was

"""What `status` and `doctor` say of backups, from the records alone."""

from __future__ import annotations

from typing import Any

import pytest

from llm_orchestrator.cli.backup_findings import record_findings
from llm_orchestrator.model import MICROSECONDS

HOUR = 3_600 * MICROSECONDS
NOW = 1_000_000 * HOUR
LAST = {"backup_id": "b", "taken_at": NOW - HOUR}
PROVED = {"backup_id": "b", "at": NOW - HOUR}


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ({}, [("backups", "warning", "there is none")]),
        (
            {"last": LAST, "proved": PROVED},
            [("backups", "ok", "b, 60 min old"), ("proof", "ok", "b was proved 60 min ago")],
        ),
        (
            {"last": {**LAST, "taken_at": NOW - 27 * HOUR}, "proved": PROVED},
            [("backups", "warning", "b, 27 h old"), ("proof", "ok", "b was proved 60 min ago")],
        ),
        ({"last": LAST}, [("backups", "ok", ""), ("proof", "warning", "none was ever proved")]),
        (
            {"last": LAST, "proved": {**PROVED, "at": NOW - 200 * HOUR}},
            [("backups", "ok", ""), ("proof", "warning", "b was proved 200 h ago")],
        ),
        (
            {"last": LAST, "proved": PROVED, "disproved": {"backup_id": "c", "at": NOW}},
            [("backups", "ok", ""), ("proof", "error", "c is no good")],
        ),
        (
            {"last": LAST, "proved": PROVED, "tally": {"failed_at": NOW, "error": "disk"}},
            [
                ("backups", "ok", ""),
                ("backups", "warning", "the last one failed: disk"),
                ("proof", "ok", ""),
            ],
        ),
        (
            {"last": LAST, "proved": PROVED, "tally": {"failed_at": NOW - 2 * HOUR}},
            [("backups", "ok", ""), ("proof", "ok", "")],
        ),
    ],
)
def test_the_state_of_backups_in_words(records: Any, said: list[tuple[str, str, str]]) -> None:
    found = record_findings(records, NOW)
    assert [(each.check, each.state) for each in found] == [each[:2] for each in said]
    for each, (_, _, words) in zip(found, said, strict=True):
        assert words in each.finding
        assert bool(each.hint) == (each.state != "ok")

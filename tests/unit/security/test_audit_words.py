"""What gets into an entry, and what its digest covers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llm_orchestrator.cli.given import read_moment
from llm_orchestrator.errors import DefinitionError, InputError, Problem, Refused, StoreDamaged
from llm_orchestrator.model import MICROSECONDS, Json
from llm_orchestrator.security.audit import (
    DETAIL_BYTES_MAX,
    digest_of,
    facts_of,
    head_of,
    pack,
    reason,
    tidy,
)
from llm_orchestrator.server.auditing import _action, _target
from llm_orchestrator.store.audit import AuditEntry

ENTRY = AuditEntry("n", 2, 3, "ann", "runs.cancel", "r", "success", b"{}", "q", bytes(32), b"")
OTHER: dict[str, Any] = {"number": 9, "recorded_at": 9, "detail": b"[]", "previous": b"x" * 32}


@pytest.mark.parametrize("field", [name for name in AuditEntry._fields if name != "digest"])
def test_the_digest_covers_every_field(field: str) -> None:
    changed = ENTRY._replace(**{field: OTHER.get(field, "other")})
    assert digest_of(changed) != digest_of(ENTRY)


def test_nothing_can_be_moved_from_one_field_to_the_next() -> None:
    moved = ENTRY._replace(actor="annr", action="uns.cancel")
    assert digest_of(moved) != digest_of(ENTRY)


def test_texts_are_short_and_printable() -> None:
    assert tidy("a b ü") == "a b ü"
    assert tidy("a\0b\nc\ud800\x1b[2J") == "a\\x00b\\nc\\ud800\\x1b[2J"
    assert len(tidy("x" * 1_000)) == 200


@pytest.mark.parametrize(
    "detail",
    [
        {"a": "x" * 100_000},
        {str(number): "y" * 400 for number in range(1_000)},
        {"a": [["z" * 400] * 1_000] * 1_000},
        {"a": {"b": {"c": {"d": {"e": {"f": "deep" * 2_000}}}}}},
        {"a": float("nan"), "b": float("inf"), "c": b"bytes", "d": object()},
    ],
)
def test_details_are_small_whatever_they_are(detail: dict[str, Json]) -> None:
    packed = pack(detail)
    assert len(packed) <= DETAIL_BYTES_MAX
    assert isinstance(json.loads(packed), dict)


def test_details_hold_no_secrets() -> None:
    detail: dict[str, Json] = {"password": "planted", "deep": [{"api_key": "planted"}], "by": "ann"}
    assert b"planted" not in pack(detail)
    assert json.loads(pack(detail))["by"] == "ann"


def test_mistakes_of_authors_are_named_and_not_quoted() -> None:
    quoting = DefinitionError([Problem("f", 1, 1, "planted is no step")])
    assert reason(quoting) == "definition"
    assert reason(Refused("run r is over")) == "refused: run r is over"


def test_a_damaged_entry_can_still_be_shown() -> None:
    assert facts_of(ENTRY._replace(detail=b"\xff"))["detail"] is None


@pytest.mark.parametrize("value", [1, {}, {"number": 1, "digest": "no", "at": 1}, {"number": None}])
def test_a_head_that_makes_no_sense_is_damage(value: Json) -> None:
    with pytest.raises(StoreDamaged):
        head_of("n", value)


class _Route:
    def __init__(self, operation_id: str | None) -> None:
        self.operation_id = operation_id


@pytest.mark.parametrize(
    ("operation", "action"),
    [
        ("runs_cancel", "runs.cancel"),
        ("earlier_pause", "runs.pause"),
        ("earlier_state_restore", "runs.rewind"),
        ("workflows_execute", "runs.start"),
        ("workflows_delete", "workflows.delete"),
        ("admin_node_drain", "nodes.drain"),
    ],
)
def test_the_api_and_the_command_line_use_one_word_for_one_action(
    operation: str, action: str
) -> None:
    scope = {"route": _Route(operation), "path_params": {"run_id": "r", "other": "o"}}
    assert _action(scope) == action
    assert _target(scope) == "r"


def test_a_time_is_an_age_or_a_moment() -> None:
    now = 1_800_000_000 * MICROSECONDS
    assert read_moment("90s", "--since", now_us=now) == now - 90 * MICROSECONDS
    assert read_moment("2h", "--since", now_us=now) == now - 7_200 * MICROSECONDS
    first = read_moment("1970-01-01T00:00:01Z", "--since", now_us=now)
    assert first == read_moment("1970-01-01T00:00:01", "--since", now_us=now) == MICROSECONDS
    for text in ("", "h", "-2h", "yesterday", "2x"):
        with pytest.raises(InputError):
            read_moment(text, "--since", now_us=now)

"""Rows and columns, whatever database they come from: what they mean, and whether they are whole.

Damage may put anything into any column, so each is looked at before it is believed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

from llm_orchestrator.errors import StoreDamaged
from llm_orchestrator.model import Json, NewRun, Run, RunState
from llm_orchestrator.store.base import Member, RunFilter, RunRow, StateChange
from llm_orchestrator.store.journal import decode

Row = Sequence[Any]
_UUID_CHARACTERS = 36
_WHOLE, _TEXT, _MAYBE_WHOLE, _MAYBE_TEXT = (int,), (str,), (int, type(None)), (str, type(None))
_RUN_COLUMNS: tuple[tuple[type, ...], ...] = (
    *(_TEXT,) * 6,
    _MAYBE_TEXT,
    _WHOLE,
    _WHOLE,
    _TEXT,
    _MAYBE_TEXT,
    _MAYBE_TEXT,
    _WHOLE,
    _WHOLE,
    _TEXT,
    _WHOLE,
    _MAYBE_WHOLE,
    _MAYBE_WHOLE,
)
"""The types of the columns of statement `run`: damage may put anything anywhere."""


def json_text(text: str) -> str:
    """A string as it stands in a JSON column."""
    return json.dumps(text, ensure_ascii=False)


def filtered(runs: list[Run], wanted: RunFilter) -> list[Run]:
    """What statement `runs` gives, of rows that had to be read by themselves."""

    def fits(run: Run) -> bool:
        return (
            (not wanted.states or run.state in wanted.states)
            and wanted.workflow in (None, run.workflow)
            and wanted.parent_run_id in (None, run.parent_run_id)
            and wanted.queue in (None, run.queue)
            and (wanted.label is None or run.labels.get(wanted.label[0]) == wanted.label[1])
            and (wanted.since is None or run.created_at >= wanted.since)
            and (wanted.until is None or run.created_at < wanted.until)
            and (wanted.before is None or run.run_id < wanted.before)
        )

    chosen = [run for run in runs if fits(run)]
    return sorted(chosen, key=lambda run: run.run_id, reverse=True)[: wanted.limit]


def listed(words: Sequence[str]) -> str:
    """Words for `instr`, each between commas; empty for none."""
    return f",{','.join(words)}," if words else ""


def run_of(row: Row) -> Run:
    """The columns of statement `run`. Raises StoreDamaged when they make no sense."""
    values: list[Any] = list(row)
    try:
        for value, types in zip(values, _RUN_COLUMNS, strict=True):
            if not isinstance(value, types):
                raise TypeError(f"a column holds {type(value).__name__}")
            if isinstance(value, str):
                value.encode()
        values[4] = RunState(values[4])
        values[14] = json.loads(values[14])
        if not isinstance(values[14], dict):
            raise TypeError("labels are no object")
    except (ValueError, TypeError) as error:
        raise StoreDamaged(
            f"the row of run {values[0]} is damaged: {error}",
            run_id=str(values[0]),
            hint=f"llmo journal repair {values[0]}",
        ) from error
    return Run(*values)


def run_row_of(run_id: str, row: Row) -> RunRow:
    """The columns of statement `run_row`. Raises StoreDamaged when they make no sense."""
    origin, labels, value = row[8:11]
    state, reason, owner, wake_at, inbox_seq, output, error = row[11:18]
    accepted: list[Any] = [*row[:8], parse(origin), parse(labels), parse_value(value)]
    accept = NewRun(run_id, *accepted)
    change = StateChange(state, reason, owner, wake_at, inbox_seq, output, error)
    epoch, head_seq, head_digest, *times, own_id = row[18:]
    if own_id != run_id:
        raise StoreDamaged(f"the row of run {run_id} has another id", run_id=run_id)
    return RunRow(accept, change, epoch, head_seq, head_digest or b"", *times)


def row_digest(*columns: object) -> bytes:
    """What the digest of a row beside the journal must be: over all that it means, with lengths."""
    parts = [
        column if isinstance(column, bytes) else json.dumps(column).encode() for column in columns
    ]
    lengths = json.dumps([len(part) for part in parts]).encode()
    return blake2b(b"".join([lengths, *parts]), digest_size=32).digest()


def state_columns(change: StateChange) -> dict[str, object]:
    """The columns of `runs` that a state change sets."""
    values = change._asdict()
    del values["inbox_seen"]
    return values


def row_columns(row: RunRow) -> dict[str, object]:
    """The parameters of statement `set_row` but the run's id."""
    values = row._asdict()
    del values["accept"], values["change"], values["created_at"]
    return {**state_columns(row.change), **values}


def parse(value: object) -> Json:
    """A JSON column. Raises StoreDamaged when it is none."""
    if value is None:
        return None
    if not isinstance(value, bytes | str):
        raise StoreDamaged("a stored value is neither text nor bytes")
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise StoreDamaged(f"a stored value is no JSON: {error}") from error


def parse_value(value: object) -> Json:
    """A column that holds `{"value": ...}` as the journal encodes it."""
    if value is None:
        return None
    if not isinstance(value, bytes):
        raise StoreDamaged("a stored value is no bytes")
    return decode(value).get("value")


def member_of(row: Row) -> Member:
    """A row of statement `members` or `nodes`."""
    node_id, region, state, beat, is_connected, started_at, heartbeat_at, info = row
    try:
        known = json.loads(info)
    except ValueError:
        known = None
    return Member(node_id, region, state, beat, bool(is_connected), started_at, heartbeat_at, known)


def is_run_id(text: str) -> bool:
    """True for what a column of type uuid takes and gives back as it is."""
    if len(text) != _UUID_CHARACTERS or text != text.lower():
        return False
    parts = text.split("-")
    if [len(part) for part in parts] != [8, 4, 4, 4, 12]:
        return False
    try:
        bytes.fromhex("".join(parts))
    except ValueError:
        return False
    return True

"""What a dump says, read without restoring it: rows of each table, and where journals end.

A dump of SQLite is opened to be read only; one of PostgreSQL is streamed through `pg_restore`. It
may be anything: nothing is written, memory is bounded, and what makes no sense is StoreDamaged.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from urllib.parse import quote

from llm_orchestrator.errors import StoreDamaged
from llm_orchestrator.model import RunState
from llm_orchestrator.store.copying import Cut, RunHead

_LINE_BYTES = 64 * 1024
"""So much of a row is looked at: what is asked for stands before the long columns."""
_TABLE = re.compile(r"[a-z_]{1,63}")
_COPY = re.compile(rb"COPY (?:[a-z_0-9]+\.)?([a-z_]+) \(([a-z_, ]*)\) FROM stdin;\n?")
_FINAL = tuple(str(state) for state in RunState if state.is_final)


@dataclass(slots=True)
class Facts:
    """What was found in a dump."""

    counts: dict[str, int] = field(default_factory=dict)
    ends: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Of the runs that were asked for: last seq and its digest, hex."""
    states: dict[str, str] = field(default_factory=dict)
    """Of the runs that are not final."""
    identity: tuple[str, int] | None = None
    """Incarnation and generation."""


def differences(facts: Facts, cut: Cut, *, is_every_head: bool = True) -> list[str]:
    """What a dump has other than `cut` says. `is_every_head`: `cut.heads` names every run."""
    flaws = []
    if facts.identity != (cut.incarnation, cut.generation):
        flaws.append(f"it is of another store: {facts.identity}, not {cut.incarnation}")
    for table, wanted in cut.counts.items():
        if facts.counts.get(table) != wanted:
            flaws.append(f"table {table} has {facts.counts.get(table)} rows, not {wanted}")
    for head in cut.heads:
        end, state = facts.ends.get(head.run_id), facts.states.get(head.run_id)
        if end != (head.seq, head.digest):
            at = f"ends at entry {end[0]}, {end[1][:12]}" if end else "has no entry"
            flaws.append(f"run {head.run_id} {at}, not at entry {head.seq}, {head.digest[:12]}")
        elif state != head.state:
            flaws.append(f"run {head.run_id} is {state or 'ended'}, not {head.state}")
    if is_every_head and len(facts.states) != len(cut.heads):
        flaws.append(f"it has {len(facts.states)} unfinished runs, not {len(cut.heads)}")
    return flaws


# -- SQLite ---------------------------------------------------------------------------------------


def read_sqlite(dump: Path, tables: Sequence[str], heads: Sequence[RunHead]) -> Facts:
    """Blocks. Raises StoreDamaged."""
    address = f"file:{quote(str(dump))}?mode=ro&immutable=1"
    try:
        with closing(sqlite3.connect(address, uri=True)) as database:
            database.execute("PRAGMA trusted_schema = OFF")
            return _from_sqlite(database, tables, heads)
    except (sqlite3.Error, ValueError, TypeError) as error:
        raise StoreDamaged(f"{dump.name} cannot be read: {error}") from error


def _from_sqlite(
    database: sqlite3.Connection, tables: Sequence[str], heads: Sequence[RunHead]
) -> Facts:
    facts = Facts()
    there = {name for (name,) in database.execute(_TABLES)}
    if not {"store", "runs", "journal"} <= there:  # a view would run whatever its maker wrote
        raise ValueError("it is no store")
    for table in tables:
        if table in there and _TABLE.fullmatch(table):
            [(count,)] = database.execute(f"SELECT count(*) FROM {table}")  # noqa: S608 (a name)
            facts.counts[table] = int(count)
    for head in heads:
        for seq, digest in database.execute(_END, (head.run_id,)):
            facts.ends[head.run_id] = (int(seq), bytes(digest).hex())
    marks = ",".join("?" * len(_FINAL))
    unfinished = f"SELECT run_id, state FROM runs WHERE state NOT IN ({marks})"  # noqa: S608 (?)
    facts.states = {
        str(run_id): str(state) for run_id, state in database.execute(unfinished, _FINAL)
    }
    for incarnation, generation in database.execute("SELECT incarnation, generation FROM store"):
        facts.identity = (str(incarnation), int(generation))
    return facts


_TABLES = "SELECT name FROM sqlite_master WHERE type = 'table'"
_END = "SELECT seq, digest FROM journal WHERE run_id = ? ORDER BY seq DESC LIMIT 1"


# -- PostgreSQL -----------------------------------------------------------------------------------


def read_postgres(dump: Path, heads: Sequence[RunHead], *, pg_restore: str) -> Facts:
    """Blocks. Raises StoreDamaged, FileNotFoundError when there is no such program."""
    command = [pg_restore, "--data-only", "--file=-", str(dump)]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said)
        assert process.stdout is not None
        try:
            facts = _from_copy(_lines(process.stdout), {head.run_id for head in heads})
            status = process.wait()
        except (ValueError, IndexError) as error:
            raise StoreDamaged(f"{dump.name} makes no sense: {error}") from error
        finally:
            process.stdout.close()
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()
        said.seek(0)
        why = said.read(2_000).decode("utf-8", "replace").strip()
    if status:
        raise StoreDamaged(f"{dump.name} cannot be read: {why or f'pg_restore ended {status}'}")
    return facts


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Lines, of which only the beginning is kept."""
    while line := stream.readline(_LINE_BYTES):
        yield line
        while line and not line.endswith(b"\n"):
            line = stream.readline(_LINE_BYTES)


def _from_copy(lines: Iterator[bytes], wanted: set[str]) -> Facts:
    facts = Facts()
    for line in lines:
        begun = _COPY.fullmatch(line)
        if begun is None:
            continue
        table = begun[1].decode()
        columns = {name: at for at, name in enumerate(begun[2].decode().split(", "))}
        count = 0
        for row in lines:
            if row.rstrip(b"\n") == b"\\.":
                break
            count += 1
            if table in ("journal", "runs", "store"):
                _take(facts, table, _Row(row, columns), wanted=wanted)
        else:
            raise ValueError(f"table {table} has no end")
        facts.counts[table] = facts.counts.get(table, 0) + count
    return facts


class _Row:
    """A line of COPY's text format. Of no column that is asked for is anything escaped."""

    def __init__(self, line: bytes, columns: Mapping[str, int]) -> None:
        self._cells = line.rstrip(b"\n").split(b"\t")
        self._columns = columns

    def text(self, column: str) -> str:
        """Raises ValueError when there is no such column."""
        at = self._columns.get(column, len(self._cells))
        if at >= len(self._cells):
            raise ValueError(f"a row has no {column}")
        return self._cells[at].decode()

    def hexadecimal(self, column: str) -> str:
        return self.text(column).removeprefix("\\\\x")


def _take(facts: Facts, table: str, row: _Row, *, wanted: set[str]) -> None:
    if table == "store":
        facts.identity = (row.text("incarnation"), int(row.text("generation")))
    elif table == "runs":
        state = row.text("state")
        if state not in _FINAL:
            facts.states[row.text("run_id")] = state
    elif (run_id := row.text("run_id")) in wanted:
        seq = int(row.text("seq"))
        if seq > facts.ends.get(run_id, (0, ""))[0]:
            facts.ends[run_id] = (seq, row.hexadecimal("digest"))

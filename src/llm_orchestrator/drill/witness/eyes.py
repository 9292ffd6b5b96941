"""The witness's own look at the database: plain SQL, read only, not through the store.

SQLite is read with the library itself, PostgreSQL with psql. A database that does not answer is no
error here: there is nothing to see then, and it is looked at again.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

_COLUMNS = "run_id, seq, epoch, kind, step"
_PSQL_S = 10.0
_NEWS_S = 1.0
_CONNECT_S = 3.0
_OVERLAP_US = 3_000_000
_END = "--end--"
_PIECE = 1 << 16


class Seen(NamedTuple):
    """One row of the journal."""

    run: str
    seq: int
    epoch: int
    kind: str
    step: str
    digest: str


class Eyes(Protocol):
    """Looks at one database. Blocking: call it from a thread."""

    def news(self) -> list[Seen]:
        """Entries that were not there at the last look; [] also when nobody answers."""
        ...

    def all(self) -> list[Seen]:
        """Every entry. Raises OSError when nobody answers."""
        ...


class NoEyes:
    """No database is in sight."""

    def news(self) -> list[Seen]:
        return []

    def all(self) -> list[Seen]:
        return []


class SqliteEyes:
    """A SQLite file; of it, runs from the id `first_run` on."""

    def __init__(self, path: Path, first_run: str = "") -> None:
        self._path = path
        self._first_run = first_run
        self._known: dict[tuple[str, int], str] = {}
        self._last = 0

    def news(self) -> list[Seen]:
        try:
            with self._open() as database:
                if self._is_restored(database):
                    self._last = 0
                found = list(self._rows(database, self._last))
        except sqlite3.Error:
            return []
        fresh = []
        for rowid, seen in found:
            self._last = max(self._last, rowid)
            if self._known.get((seen.run, seen.seq)) != seen.digest:
                self._known[seen.run, seen.seq] = seen.digest
                fresh.append(seen)
        return fresh

    def all(self) -> list[Seen]:
        try:
            with self._open() as database:
                return [seen for _, seen in self._rows(database, 0)]
        except sqlite3.Error as error:
            raise OSError(f"{self._path}: {error}") from error

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(
            sqlite3.connect(f"file:{self._path}?mode=ro", uri=True, timeout=5)
        ) as database:
            yield database

    def _is_restored(self, database: sqlite3.Connection) -> bool:
        """Rows only come; fewer of them are another copy of the database."""
        (last,) = database.execute("SELECT coalesce(max(rowid), 0) FROM journal").fetchone()
        return int(last) < self._last

    def _rows(self, database: sqlite3.Connection, after: int) -> Iterator[tuple[int, Seen]]:
        columns = f"rowid, {_COLUMNS}, lower(hex(digest))"
        where = "rowid > ? AND run_id >= ?"
        statement = f"SELECT {columns} FROM journal WHERE {where}"  # noqa: S608 - constants
        rows = database.execute(statement, (after, self._first_run))
        for row in rows:
            yield row[0], Seen(*row[1:])


class PostgresEyes:
    """A PostgreSQL database, by a psql that stays connected as long as it answers.

    Where the URL names several hosts, each is tried in its turn: one that is a black hole costs
    the time of its own turn only. Of a store that others use as well, only runs from the id
    `first_run` on are looked at: a range of the journal's key.
    """

    def __init__(self, url: str, first_run: str = "") -> None:
        self._range = f"run_id >= '{first_run}'" if first_run else "true"
        user, at, rest = url.rpartition("@")
        hosts, slash, path = rest.partition("/")
        self._urls = [f"{user}{at}{host}{slash}{path}" for host in hosts.split(",")]
        self._known: dict[tuple[str, int], str] = {}
        self._last_us = 0
        self._psql: subprocess.Popen[bytes] | None = None
        self._turn = threading.Lock()  # a look that was given up goes on in its thread

    def news(self) -> list[Seen]:
        try:
            found = self._ask(f"recorded_at > {self._last_us - _OVERLAP_US}", _NEWS_S)
        except OSError:
            return []
        fresh = []
        for at_us, seen in found:
            self._last_us = max(self._last_us, at_us)
            if self._known.get((seen.run, seen.seq)) != seen.digest:
                self._known[seen.run, seen.seq] = seen.digest
                fresh.append(seen)
        return fresh

    def all(self) -> list[Seen]:
        return [seen for _, seen in self._ask("true", _PSQL_S)]

    def _ask(self, where: str, limit_s: float) -> list[tuple[int, Seen]]:
        row = f"json_build_array(recorded_at, {_COLUMNS}, encode(digest, 'hex'))"
        where = f"{self._range} AND {where}"
        statement = f"SELECT {row} FROM journal WHERE {where}"  # noqa: S608 - constants, numbers
        with self._turn:
            try:
                lines = self._answer(f"{statement};\n\\echo {_END}\n".encode(), limit_s)
            except OSError:
                self._leave()
                raise
        rows = [json.loads(line) for line in lines]
        return [(row[0], Seen(str(row[1]), *row[2:])) for row in rows]

    def _answer(self, order: bytes, limit_s: float) -> list[str]:
        """Its lines before the end's mark. Raises OSError when it ends, or takes too long."""
        psql = self._psql
        if psql is None:
            psql, limit_s = self._connect(), max(limit_s, _CONNECT_S)
        assert psql.stdin is not None
        assert psql.stdout is not None
        psql.stdin.write(order)
        psql.stdin.flush()
        data, end = b"", f"{_END}\n".encode()
        while not data.endswith(end):
            ready, _, _ = select.select([psql.stdout], [], [], limit_s)
            part = os.read(psql.stdout.fileno(), _PIECE) if ready else b""
            if not part:
                raise OSError("psql does not answer" if not ready else "psql has ended")
            data += part
        return data[: -len(end)].decode().splitlines()

    def _connect(self) -> subprocess.Popen[bytes]:
        self._psql = subprocess.Popen(
            ["psql", self._urls[0], "-AtXq", "--set=ON_ERROR_STOP=1"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        return self._psql

    def _leave(self) -> None:
        if self._psql is not None:
            self._psql.kill()
            self._psql.communicate()
            self._psql = None
        self._urls.append(self._urls.pop(0))


def make_eyes(url: str, first_run: str = "") -> Eyes:
    """Eyes for a store's URL; "": none is in sight. Runs before `first_run` are not looked at."""
    if not url:
        return NoEyes()
    if url.startswith("sqlite:///"):
        return SqliteEyes(Path(url.removeprefix("sqlite:///")), first_run)
    return PostgresEyes(url, first_run)

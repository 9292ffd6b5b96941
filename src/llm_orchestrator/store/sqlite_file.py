"""A store file: is it ours, may we use it, and what SQLite's errors mean.

The engine's lock is `flock` on `<file>.lock`, a side file: SQLite's own POSIX locks are dropped
when any descriptor of the database is closed in the process, flock on another file is not. The
lock file's text names the owner, for the message that a second engine prints.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import sqlite3
from pathlib import Path

from llm_orchestrator.errors import (
    StoreAbsent,
    StoreDamaged,
    StoreError,
    StoreForeign,
    StoreFull,
    StoreIsCopy,
    StoreLocked,
    StoreNewer,
    StoreReadOnly,
)

logger = logging.getLogger(__name__)
APPLICATION_ID = 0x4C4C4D4F
"""`LLMO`, in the file's header (SQLite `PRAGMA application_id`)."""

SCHEMA_VERSION = 3
_ADDED = {2: ("CREATE TABLE nodes ",), 3: ("CREATE TABLE audit ", "CREATE INDEX audit_by_time ")}
"""Statements of schema_sqlite.sql, by their beginning, that a version added to the one before."""
_LOG_BYTES = 4 << 20
"""The write-ahead log's length when SQLite checkpoints it (1,000 pages)."""
_PRAGMAS = (
    "PRAGMA synchronous=FULL",
    "PRAGMA temp_store=MEMORY",
)


_NO_ROOM = ("SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE", "SQLITE_IOERR_TRUNCATE")
"""A quota or a limit on a file's size is no `disk full` to SQLite, and is one to us."""


def library_version() -> str:
    """The SQLite library of this process, for `doctor` (law 12)."""
    return sqlite3.sqlite_version


def connect(path: Path, *, is_read_only: bool = False) -> sqlite3.Connection:
    """A connection in manual-commit mode. Raises StoreError's subclasses, never sqlite3's."""
    if is_read_only and not path.exists():
        raise absent(path)
    mode = "ro" if is_read_only else "rwc"
    database = None
    try:
        database = sqlite3.connect(
            f"file:{_quote(path)}?mode={mode}",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=256,
        )
        database.text_factory = _text
        for pragma in ("PRAGMA busy_timeout=5000", "PRAGMA cell_size_check=ON"):
            database.execute(pragma)
        _check_ours(database, path)
    except BaseException as error:
        if database is not None:
            database.close()
        if isinstance(error, sqlite3.Error):
            raise translate(error, path) from error
        if isinstance(error, UnicodeDecodeError):  # SQLite quotes the damaged schema
            raise StoreDamaged(f"the schema of {path} is damaged", hint="llmo doctor") from error
        raise
    return database


def _text(value: bytes) -> str:
    """A flipped bit may leave no UTF-8; such text is read all the same and fits no digest."""
    return value.decode(errors="surrogateescape")


def prepare(path: Path, incarnation: str, now_us: int) -> sqlite3.Connection:
    """Open `path` for the one process that writes; make the schema when the file is new."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _os_error(error, path) from error
    database = connect(path)
    try:
        database.execute("PRAGMA journal_mode=WAL")
        for pragma in _PRAGMAS:
            database.execute(pragma)
        if database.execute("PRAGMA user_version").fetchone()[0] == 0:
            _create(database, incarnation, now_us)
        _migrate(database)
        if _schema_of(database) != _schema():
            raise StoreDamaged(f"the schema of {path} is damaged", hint="llmo doctor")
    except BaseException as error:
        database.close()
        if isinstance(error, sqlite3.Error):
            raise translate(error, path) from error
        raise
    return database


def _schema() -> set[tuple[object, ...]]:
    """What a store's schema must be, as SQLite keeps it."""
    text = Path(__file__).with_name("schema_sqlite.sql").read_text()
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.executescript(text)
        return _schema_of(database)


def _schema_of(database: sqlite3.Connection) -> set[tuple[object, ...]]:
    return set(database.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema"))


def check_role(database: sqlite3.Connection, path: Path, *, may_copy: bool) -> None:
    """Raises StoreIsCopy when an engine must not drive its runs."""
    row = database.execute("SELECT role FROM store").fetchone()
    if row is not None and row[0] != "primary" and not may_copy:
        raise StoreIsCopy(
            f"{path} is a {row[0]}: what runs in it would be done twice",
            hint="llmo runs list looks into it; llmo restore makes it live",
        )


def extend_log(database: sqlite3.Connection) -> None:
    """Give the write-ahead log its usual length at once, in a transaction that is taken back.

    A commit that makes a file longer waits for the file system's own journal, too: a lone step
    takes half as long again. SQLite reuses the log's length after each checkpoint, but an engine
    begins with an empty one.
    """
    try:
        database.execute("PRAGMA cache_size=10")  # so that the pages spill into the log
        database.execute("BEGIN")
        database.execute("CREATE TABLE filler (content)")
        database.execute("INSERT INTO filler VALUES (zeroblob(?))", (_LOG_BYTES,))
    except sqlite3.Error as error:  # a full disk or a damaged page: only speed is lost
        logger.warning("the write-ahead log keeps its length: %s", error)
    if database.in_transaction:
        database.execute("ROLLBACK")
    database.execute("PRAGMA cache_size=-2000")


def _create(database: sqlite3.Connection, incarnation: str, now_us: int) -> None:
    schema = Path(__file__).with_name("schema_sqlite.sql").read_text()
    database.executescript(f"BEGIN IMMEDIATE; {schema}")
    database.execute("INSERT INTO store VALUES (1, ?, 1, 'primary', ?)", (incarnation, now_us))
    database.execute(f"PRAGMA application_id={APPLICATION_ID}")
    database.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
    database.execute("COMMIT")


def _migrate(database: sqlite3.Connection) -> None:
    """Bring an older version's file up to this one, in one transaction. Forward only."""
    version = database.execute("PRAGMA user_version").fetchone()[0]
    if version == SCHEMA_VERSION:
        return
    statements = Path(__file__).with_name("schema_sqlite.sql").read_text().split(";\n")
    added = [begin for number in range(version + 1, SCHEMA_VERSION + 1) for begin in _ADDED[number]]
    database.execute("BEGIN IMMEDIATE")
    for begin in added:
        [statement] = [each for each in statements if each.startswith(begin)]
        try:
            database.execute(statement)
        except sqlite3.Error as error:  # whoever closes the file takes the transaction back
            text = "its schema stays %d, as before, for the release that knows it; %d failed: %s"
            logger.error(text, version, SCHEMA_VERSION, error)
            raise
    database.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
    database.execute("COMMIT")


def _check_ours(database: sqlite3.Connection, path: Path) -> None:
    application = database.execute("PRAGMA application_id").fetchone()[0]
    version = database.execute("PRAGMA user_version").fetchone()[0]
    if application == APPLICATION_ID and version > SCHEMA_VERSION:
        raise StoreNewer(
            f"{path} was made by a newer version (schema {version}, this program knows "
            f"{SCHEMA_VERSION})",
            hint="pip install --upgrade llm-orchestrator",
        )
    is_empty = database.execute("SELECT COUNT(*) FROM sqlite_schema").fetchone()[0] == 0
    if application != APPLICATION_ID and not is_empty:
        raise StoreForeign(
            f"{path} is a database, but not one of ours", hint="llmo --store sqlite:////NEW/PATH.db"
        )


def absent(path: Path) -> StoreAbsent:
    """There is no file."""
    return StoreAbsent(f"there is no store at {path}", hint="llmo run FILE makes one")


def is_damage(error: sqlite3.Error) -> bool:
    """True when the bytes in the file are at fault, not the disk, the lock or the program."""
    name, text = getattr(error, "sqlite_errorname", None) or "", str(error)
    return (
        "CORRUPT" in name
        or "NOTADB" in name
        or "malformed" in text
        or "no such" in text  # its schema lost a table, a column or an index
        or "decode to UTF-8" in text
    )


def translate(error: sqlite3.Error, path: Path) -> StoreError:
    """What a driver's error means to the operator. What may pass by itself is `retryable`."""
    text = str(error)
    name = getattr(error, "sqlite_errorname", "") or ""
    if "FULL" in name or "full" in text or name in _NO_ROOM:
        return StoreFull(
            f"the disk under {path} takes no more ({text}); nothing acknowledged is lost",
            hint=f"df -h '{path.parent}'",
        )
    if "NOTADB" in name or "not a database" in text:
        return StoreForeign(f"{path} is not a database", hint="llmo --store sqlite:////NEW/PATH.db")
    if "READONLY" in name or "CANTOPEN" in name or "readonly" in text:
        return StoreReadOnly(
            f"{path} cannot be opened for writing: {text}", hint=f"ls -ld '{path.parent}' '{path}'"
        )
    if is_damage(error):
        return StoreDamaged(
            f"pages of {path} are damaged: {text}", hint="llmo journal verify --all"
        )
    if "BUSY" in name or "LOCKED" in name:
        locked = StoreLocked(f"{path} is locked by another program: {text}", hint="llmo doctor")
        locked.retryable = True
        return locked
    return StoreError(f"{path}: {text}", hint="llmo doctor")


def _os_error(error: OSError, path: Path) -> StoreError:
    if error.errno == errno.ENOSPC:
        return StoreFull(f"the disk under {path} is full", hint=f"df -h '{path.parent}'")
    return StoreReadOnly(
        f"{path.parent} cannot be written: {error.strerror}", hint=f"ls -ld '{path.parent}'"
    )


def _quote(path: Path) -> str:
    return str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")


class EngineLock:
    """`flock` on a side file: held by the one process that writes, freed when it ends."""

    def __init__(self, database: Path) -> None:
        self.path = database.with_name(database.name + ".lock")
        self._descriptor: int | None = None

    def acquire(self, owner: str) -> bool:
        """Try once; False when somebody else holds it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _os_error(error, self.path) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return False
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, owner.encode(), 0)
        self._descriptor = descriptor
        return True

    def owner(self) -> str:
        """What the holder wrote about itself."""
        try:
            return self.path.read_text().strip()
        except OSError:
            return ""

    def release(self) -> None:
        """Free it. The file stays: removing it would let two processes lock two files."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None

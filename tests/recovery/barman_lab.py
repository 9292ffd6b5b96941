"""A PostgreSQL server of our own whose log a real Barman keeps."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import pytest

from llm_orchestrator.drill.lab_process import account, kill, own
from llm_orchestrator.drill.postgres_lab import PostgresServer, find_binaries
from tests.acceptance.cluster.nodes import until

ROOT = Path(__file__).resolve().parents[2]
NAME = "live"
_CONFIG = """\
[barman]
barman_user = {user}
barman_home = {home}
barman_lock_directory = {home}
configuration_files_directory = {home}/conf.d
log_file = {home}/barman.log

[live]
description = llm-orchestrator
conninfo = host={host} port={port} user=postgres dbname=postgres
streaming_conninfo = host={host} port={port} user=postgres dbname=postgres
backup_method = postgres
streaming_archiver = on
slot_name = barman
path_prefix = {programs}
immediate_checkpoint = true
"""


@contextmanager
def tools_on_path(prefer: Literal["system", "wheel"] = "system") -> Iterator[None]:
    """Barman and rsync are where `make setup` puts them; pg_dump is as new as the server."""
    with pytest.MonkeyPatch.context() as patch:
        places = [str(ROOT / ".tools" / "bin"), str(find_binaries(prefer)), os.environ["PATH"]]
        patch.setenv("PATH", os.pathsep.join(places))
        patch.setenv("LD_LIBRARY_PATH", str(ROOT / ".tools" / "lib"))
        if shutil.which("barman") is None or shutil.which("rsync") is None:
            pytest.skip("no barman or no rsync here")
        yield


class BarmanLab:
    """Use it as a context manager."""

    def __init__(self, prefer: Literal["system", "wheel"] = "system") -> None:
        binaries = find_binaries(prefer)
        settings = {"wal_level": "replica"}
        if prefer == "wheel":
            settings["summarize_wal"] = "on"
        self.server = PostgresServer(binaries=binaries, settings=settings)
        self.home = self.server.folder / "barman"
        self.config = self.home / "barman.conf"
        self._programs = self.server._binaries

    def __enter__(self) -> Self:
        self.server.start()
        self.extra.mkdir()
        own(self.extra)
        self.server.psql(f"CREATE TABLESPACE extra LOCATION '{self.extra}'")
        self.server.psql("CREATE TABLE kept TABLESPACE extra AS SELECT 1 AS one")
        self.home.mkdir()
        own(self.home)
        who = account()
        self.config.write_text(
            _CONFIG.format(
                user=who.pw_name if who else os.environ.get("USER", "postgres"),
                home=self.home,
                host=self.server.folder,
                port=self.server.port,
                programs=self._programs,
            )
        )
        self.call("receive-wal", "--create-slot", NAME)
        self.call("cron")
        until(self._streams, "Barman does not stream")
        self.call("switch-wal", "--force", "--archive", NAME)
        return self

    def _streams(self) -> bool:
        return self.server.psql("SELECT count(*) FROM pg_stat_replication") != "0"

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        kill(self.home)
        self.server.stop()

    @property
    def extra(self) -> Path:
        """Where the server keeps a table outside its own folder."""
        return self.server.folder / "extra"

    def tablespace(self) -> set[tuple[str, int]]:
        """The files there, and which they are: one that is written anew is another one."""
        files = [path for path in self.extra.rglob("*") if path.is_file()]
        return {(str(path), path.stat().st_ino) for path in files}

    def call(self, *words: str) -> str:
        """What Barman says."""
        done = subprocess.run(
            ["barman", "-c", str(self.config), *words],
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def segments(self) -> list[Path]:
        """The log that Barman has, oldest first."""
        found = (self.home / NAME / "wals").rglob("0000*")
        return sorted(path for path in found if path.is_file() and len(path.name) == 24)

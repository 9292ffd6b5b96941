"""The one PostgreSQL of a session: durable, for all contestants, a fresh database per measurement.

While a contestant measures itself, a probe looks at what it costs the server: processor time of
all its processes, and bytes of the write-ahead log since a checkpoint, with and without the images
of whole pages that follow one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from bench.measure import cpu_s_of
from llm_orchestrator.drill.lab_process import LabError
from llm_orchestrator.drill.postgres_lab import PostgresServer

_NS = 1e-9
_LSN = "SELECT pg_current_wal_flush_lsn()"
_WAL = """SELECT sum(record_size), sum(fpi_size) FROM pg_get_wal_stats(:'since', :'until')"""
_STANDBY_S = 30.0


class Database:
    """A server and its fresh databases."""

    def __init__(self) -> None:
        self.server = PostgresServer(is_durable=True)
        self._numbers = count(1)
        self._has_inspector = False

    def start(self) -> None:
        """Raises LabError when there is no PostgreSQL here."""
        self.server.start()
        with suppress(LabError):  # a package of its own with some
            self.server.psql("CREATE EXTENSION pg_walinspect")
            self._has_inspector = True

    def version(self) -> str:
        """Of the server, as it says it."""
        return self.server.psql("SHOW server_version").split()[0]

    @contextmanager
    def fresh(self) -> Iterator[str]:
        """The URL of an empty database, dropped afterwards whoever is still connected."""
        name = f"bench_{next(self._numbers)}"
        yield self.server.create_database(name)
        self.server.psql('DROP DATABASE :"name" WITH (FORCE)', name=name)

    def probe(self) -> Probe:
        """Begin to look, right behind a checkpoint."""
        self.server.psql("CHECKPOINT")
        return Probe(self.server, has_inspector=self._has_inspector)

    @contextmanager
    def standby(self) -> Iterator[None]:
        """While it lasts, no commit is acknowledged before a second server has it on its disk."""
        copy = self.server.standby()
        try:
            copy.start()
            self._set_standbys("*")
            self._wait_for_standby()
            yield
        finally:
            self._set_standbys("")
            copy.stop()

    def _set_standbys(self, names: str) -> None:
        self.server.psql("ALTER SYSTEM SET synchronous_standby_names = :'names'", names=names)
        self.server.psql("SELECT pg_reload_conf()")

    def _wait_for_standby(self) -> None:
        asked = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"
        deadline = time.monotonic() + _STANDBY_S
        while self.server.psql(asked) != "1":
            if time.monotonic() > deadline:
                raise LabError("the standby does not follow")
            time.sleep(0.05)


class Probe:
    """What the server spends from now on."""

    def __init__(self, server: PostgresServer, *, has_inspector: bool) -> None:
        self._server = server
        self._has_inspector = has_inspector
        self._since = server.psql(_LSN)
        self._cpu_s = _server_cpu_s(server.pid)

    def per_step(self, steps: float) -> dict[str, float]:
        """Fields of a result: `pg_ms_step`, `wal_b_step` and, of it, `fpi_b_step`."""
        cpu_s = _server_cpu_s(self._server.pid) - self._cpu_s
        until = self._server.psql(_LSN)
        fields = {"pg_ms_step": round(cpu_s / steps * 1e3, 4)}
        written = _bytes(until) - _bytes(self._since)
        fields["wal_b_step"] = round(written / steps, 1)
        if self._has_inspector and written:
            found = self._server.psql(_WAL, since=self._since, until=until)
            _, images = (float(one or 0) for one in found.split("|"))
            fields["fpi_b_step"] = round(images / steps, 1)
        return fields


def _bytes(lsn: str) -> int:
    high, _, low = lsn.partition("/")
    return (int(high, 16) << 32) + int(low, 16)


def _server_cpu_s(postmaster: int) -> float:
    """Of the postmaster, its living children to the nanosecond, and its dead ones."""
    total = cpu_s_of(postmaster, has_children=True)
    for pid in Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split():
        with suppress(OSError):  # it has just ended: the postmaster's now
            total += int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) * _NS
    return total

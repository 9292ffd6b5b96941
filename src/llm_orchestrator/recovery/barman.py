"""Barman, which keeps base backups and the write-ahead log of a PostgreSQL server: point in time.

Barman is a program of its own that we call; its configuration is the operator's. A restore never
touches the live server's files: Barman puts a base backup and the log into a folder, a scratch
server replays it up to the wanted point (scratch_server.py), and what is in it then goes the same
way as a backup file (restore.py): put aside, checked, exchanged under a new name.

    wait for the log -> base before the point -> folder -> scratch server -> dump -> restore

Barman runs as whoever owns its home; as root we let its own `barman_user` do that.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import ConfigError, NotFound, StoreDamaged, StoreError
from llm_orchestrator.model import MICROSECONDS
from llm_orchestrator.recovery.catalogue import Finding
from llm_orchestrator.recovery.scratch_server import EndedEarly, ScratchServer
from llm_orchestrator.telemetry.redact import redact

LSN = re.compile(r"[0-9A-Fa-f]{1,8}/[0-9A-Fa-f]{1,8}")
INCREMENTAL_SINCE = 17
"""The first PostgreSQL that can back up what has changed only."""
_SEGMENT = re.compile(r"([0-9A-F]{8})([0-9A-F]{8})([0-9A-F]{8})")
_SEGMENT_BYTES = 16 << 20
_SAID_MAX = 2_000
_PLAIN = ("env", "-u", "PYTHONPATH", "-u", "PYTHONHOME", "-u", "PYTHONUNBUFFERED")
"""It is a Python program with a Python of its own."""


class Target(NamedTuple):
    """A point: a moment (microseconds), a place in the log, or the name of a restore point."""

    at_us: int | None = None
    lsn: str = ""
    name: str = ""

    @property
    def shown(self) -> str:
        """For messages."""
        return self.lsn or self.name or _iso(self.at_us or 0)

    def words(self) -> list[str]:
        """Options of `barman restore`."""
        if self.lsn:  # such a number is where the next record begins: that one is not wanted
            return ["--target-lsn", self.lsn, "--exclusive"]
        if self.name:
            return ["--target-name", self.name]
        return ["--target-time", _iso(self.at_us or 0)]


def _iso(at_us: int) -> str:
    return datetime.fromtimestamp(at_us / MICROSECONDS, UTC).strftime("%Y-%m-%d %H:%M:%S.%f+00:00")


@dataclass(frozen=True, slots=True)
class BaseBackup:
    """One of Barman's."""

    backup_id: str
    kind: str
    """`full` or `incremental`."""
    ended_at: int
    """Unix time, seconds."""
    size_bytes: int


class Barman:
    """The server `server` of Barman's configuration (`config`; "": where Barman looks itself)."""

    def __init__(self, server: str, config: str, clock: Clock) -> None:
        self._server = server
        self._config = config
        self._clock = clock
        self._known: dict[str, Any] = {}

    @property
    def shown(self) -> str:
        """For messages."""
        return f"Barman's server {self._server}"

    # -- making and looking -------------------------------------------------------------------

    async def backup(self, *, is_incremental: bool) -> BaseBackup:
        """Make a base backup, and wait until the log that it needs is there. Raises StoreError."""
        words = ["backup", "--wait"]
        if is_incremental:
            facts = await self._facts()
            version = int(str(facts.get("server_txt_version", "0")).partition(".")[0] or 0)
            if version < INCREMENTAL_SINCE:
                raise ConfigError(
                    f"PostgreSQL {version} cannot back up what has changed only",
                    hint=f"--type full, or PostgreSQL {INCREMENTAL_SINCE} with summarize_wal = on",
                )
            if not await self.backups():
                raise NotFound("there is no full backup yet", hint="--type full")
            words += ["--incremental", "last"]
        await self._say(*words, self._server)
        return (await self.backups())[0]

    async def backups(self) -> list[BaseBackup]:
        """Those that are complete, the newest first. Raises StoreError."""
        listed = await self._call("list-backups", self._server)
        found = [
            BaseBackup(
                str(each["backup_id"]),
                str(each.get("backup_type", "full")),
                int(each["end_time_timestamp"]),
                int(each.get("size_bytes", 0)),
            )
            for each in listed
            if each.get("status") == "DONE"
        ]
        return sorted(found, key=lambda one: one.backup_id, reverse=True)

    async def check(self, *, now_us: int, age_s_max: float) -> list[Finding]:
        """What Barman says of itself, the age of the last base, and gaps in the log.

        Raises nothing: what cannot be asked is a finding.
        """
        try:
            checks = await self._call("check", self._server, may_fail=True)
            bases = await self.backups()
            gaps = await self.gaps(bases[-1].backup_id) if bases else []
        except (StoreError, ConfigError) as error:
            return [Finding("barman", False, error.message)]
        bad = {name: each for name, each in checks.items() if each["status"] != "OK"}
        found = [
            Finding(f"barman {name.replace('_', ' ')}", False, str(each.get("hint") or "failed"))
            for name, each in sorted(bad.items())
        ]
        if not bad:
            found.append(Finding("barman", True, f"{len(checks)} checks of its own"))
        if not bases:
            return [*found, Finding("barman base", False, "none: llmo backup create --type full")]
        age_s = now_us / MICROSECONDS - bases[0].ended_at
        detail = f"{bases[0].backup_id}, {age_s:.0f} s old, at most {age_s_max:.0f} s"
        found.append(Finding("barman base", age_s <= age_s_max, detail))
        detail = f"missing: {', '.join(gaps[:3])}" if gaps else "no gap since the oldest base"
        return [*found, Finding("barman log", not gaps, detail)]

    async def gaps(self, backup_id: str) -> list[str]:
        """Names of the segments of the log that are missing behind a base. Raises StoreError."""
        said = await self._say("list-files", "--target", "wal", self._server, backup_id)
        listed = [Path(line) for line in said.splitlines()]
        return missing(await asyncio.to_thread(lambda: [e.name for e in listed if e.exists()]))

    # -- going back ---------------------------------------------------------------------------

    async def choose(self, target: Target) -> list[BaseBackup]:
        """Bases from which the target can be reached, the best first. Raises NotFound."""
        found = await self.backups()
        if target.at_us is not None:
            found = [one for one in found if one.ended_at * MICROSECONDS <= target.at_us]
        elif target.lsn:
            found = [one for one in found if await self._end(one) <= place(target.lsn)]
        if not found:
            raise NotFound(f"no base backup of {self.shown} was made before {target.shown}")
        return found

    async def sync(self) -> str:
        """Get the log up to now out of the live server; why that could not be, or ""."""
        try:
            await self._say("switch-wal", "--force", "--archive", self._server)
        except StoreError as error:
            return error.message
        return ""

    @asynccontextmanager
    async def at(self, target: Target, *, user: str) -> AsyncIterator[tuple[ScratchServer, bool]]:
        """A scratch server that stands at the target; False when the log ends before it.

        Raises StoreDamaged when the log has a gap, NotFound when no base leads there.
        """
        bases = await self.choose(target)
        for base in bases:
            if gaps := await self.gaps(base.backup_id):
                raise StoreDamaged(
                    f"the log behind base {base.backup_id} has gaps: {', '.join(gaps[:3])}",
                    hint="llmo backup create --type full, so that the next one has none",
                )
            try:
                async with self._replayed(base, target.words(), user) as server:
                    yield server, True
                    return
            except EndedEarly:
                if target.at_us is not None:
                    break  # nothing was committed between the log's end and that moment
        else:
            raise NotFound(f"{target.shown} is in no log of {self.shown}")
        async with self._replayed(bases[0], [], user) as server:
            yield server, False

    @asynccontextmanager
    async def _replayed(
        self, base: BaseBackup, words: Sequence[str], user: str
    ) -> AsyncIterator[ScratchServer]:
        facts = await self._facts()
        home = Path(str(facts["backup_directory"])).parent
        server = ScratchServer(home, self._clock, programs=str(facts.get("path_prefix") or ""))
        async with server.folder():
            told = ["--target-tli", "latest", *words, "--target-action", "promote"]
            if not words:
                told = ["--target-tli", "latest"]
            if base.kind == "incremental":
                told += ["--local-staging-path", str(server.staging)]
            told += await self._relocated(base, server)
            await self._say("restore", *told, self._server, base.backup_id, str(server.data))
            async with server.running(user=user):
                yield server

    async def _relocated(self, base: BaseBackup, server: ScratchServer) -> list[str]:
        """Options that put tablespaces beside the scratch server, never into the live one's."""
        shown = await self._call("show-backup", self._server, base.backup_id)
        return [
            word
            for each in shown.get("tablespaces") or ()
            for word in ("--tablespace", f"{each['name']}:{server.tablespaces / str(each['oid'])}")
        ]

    # -- how ----------------------------------------------------------------------------------

    async def _facts(self) -> dict[str, Any]:
        """The server's configuration, and what Barman sees of it."""
        if not self._known:
            self._known = await self._call("show-servers", self._server)
        return self._known

    async def _end(self, base: BaseBackup) -> int:
        shown = await self._call("show-backup", self._server, base.backup_id)
        return place(str(shown["base_backup_information"]["end_lsn"]))

    async def _call(self, *words: str, may_fail: bool = False) -> Any:
        """What it says of the server, as JSON."""
        said = await self._say(*words, is_json=True, may_fail=may_fail)
        try:
            return json.loads(said)[self._server]
        except (ValueError, KeyError) as error:
            what = f"barman {words[0]} knows no {self._server}: {said[:200]!r}"
            raise StoreError(what) from error

    async def _say(self, *words: str, is_json: bool = False, may_fail: bool = False) -> str:
        program = shutil.which("barman")
        if program is None:
            raise ConfigError("there is no program barman", hint="apt-get install barman")
        command = [*_PLAIN, program, *(["-c", self._config] if self._config else [])]
        command += [*(["-f", "json"] if is_json else []), *words]
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd="/",
            start_new_session=True,
        )
        try:
            out, err = await process.communicate()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
            await process.wait()
            raise
        if process.returncode and not may_fail:
            text = redact((err or out).decode(errors="replace").strip())[-_SAID_MAX:]
            raise StoreError(f"barman {words[0]} failed: {text or process.returncode}")
        return out.decode(errors="replace")


def place(lsn: str) -> int:
    """`16/B374D848` as a number."""
    high, _, low = lsn.partition("/")
    return int(high, 16) << 32 | int(low, 16)


def missing(names: Sequence[str], *, segment_bytes: int = _SEGMENT_BYTES) -> list[str]:
    """Which segments of the log are not among those of `names` that are segments.

    Each timeline is one row without holes; a new one begins at or before the end of the last one.
    """
    per_id = (1 << 32) // segment_bytes
    lines: dict[int, list[int]] = {}
    for name in names:
        if found := _SEGMENT.fullmatch(name):
            line, high, low = (int(part, 16) for part in found.groups())
            lines.setdefault(line, []).append(high * per_id + low)
    lost: list[tuple[int, int]] = []
    end = None
    for line in sorted(lines):
        there = set(lines[line])
        first = min(there) if end is None else min(*there, end + 1)
        lost += [(line, number) for number in range(first, max(there)) if number not in there]
        end = max(there)
    return [f"{line:08X}{number // per_id:08X}{number % per_id:08X}" for line, number in lost]

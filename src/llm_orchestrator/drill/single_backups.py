"""Where a SingleTarget's copies go: an object store beside it and the key that opens backups.

The object store is a process of its own: rclone's for backups, which keeps a folder, so that what
it was given is there again when it comes back; moto's for the stream archive, which refuses a store
that takes a thing twice, as rclone's does. That one keeps its memory only, so it is frozen, not
killed. The other fault: the file of the key is gone.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp

from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill.child import Child, ChildError
from llm_orchestrator.drill.scenario import System
from llm_orchestrator.drill.target import NotPossible

if TYPE_CHECKING:
    from collections.abc import Mapping

_BUCKET, _REGION = "drill", "us-east-1"
_READY_S = 60.0
_POLL_S = 0.02
_ACCESS, _SECRET = "DRILLDRILL", "drill-drill-drill-drill"


class Copies:
    """What `system` asks for, in `folder`; `port` is the object store's."""

    def __init__(self, folder: Path, system: System, *, port: int, clock: RealClock) -> None:
        self._folder = folder
        self._system = system
        self._clock = clock
        self._has_bucket = False
        self.url = f"http://127.0.0.1:{port}"
        self.identity = folder / "backup-identity.txt"
        self.store: Child | None = None
        if system.object_store:
            self.store = self._object_store(port, clock)

    def _object_store(self, port: int, clock: RealClock) -> Child:
        home = self._folder / "object-store"
        (home / "data" / _BUCKET).mkdir(parents=True)
        if self._system.object_store == "archive":
            words = [_program("moto_server"), "-H", "127.0.0.1", "-p", str(port)]
        else:
            words = [_program("rclone"), "serve", "s3", "--addr", f"127.0.0.1:{port}"]
            words += ["--auth-key", f"{_ACCESS},{_SECRET}", "--vfs-cache-mode", "writes"]
            words += ["--config", str(home / "none"), str(home / "data")]
        environment = {"HOME": str(home), "XDG_CACHE_HOME": str(home), "PATH": os.defpath}
        log = self._folder / "object-store.log"
        return Child(words, log, environment=environment, clock=clock)

    async def is_reached(self, http: aiohttp.ClientSession, limit_s: float = 10.0) -> bool:
        """Whether the object store answers at all, whatever the answer."""
        limit = aiohttp.ClientTimeout(total=limit_s)
        try:
            async with http.get(self.url, timeout=limit):
                return True
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def ready(self, http: aiohttp.ClientSession) -> None:
        """Wait until the object store answers and has its bucket. Raises ChildError."""
        end_s = self._clock.monotonic() + _READY_S
        while not await self.is_reached(http):
            if self._clock.monotonic() > end_s:
                raise ChildError("the object store does not answer", hint="see object-store.log")
            await self._clock.sleep(_POLL_S)
        await asyncio.to_thread(self._make_bucket)

    def _make_bucket(self) -> None:
        """Where the archive goes; rclone's is there as a folder."""
        if self._system.object_store != "archive" or self._has_bucket:
            return
        import boto3  # noqa: PLC0415 (an extra)

        client = boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name=_REGION,
            aws_access_key_id=_ACCESS,
            aws_secret_access_key=_SECRET,
        )
        client.create_bucket(Bucket=_BUCKET)
        self._has_bucket = True

    def settings(self) -> str:
        """Lines of the settings file."""
        lines = []
        if self.store is not None:
            lines += [f's3_endpoint_url = "{self.url}"', f's3_region = "{_REGION}"']
            lines += ['s3_storage_class = ""']
            lines += ['s3_access_key = "env:DRILL_ACCESS"', 's3_secret_key = "env:DRILL_SECRET"']
            lines += [f'{self._system.object_store}_place = "s3://{_BUCKET}/kept"']
        if self._system.is_sealed:
            lines += [f'backup_recipients = ["{self._make_key()}"]']
            lines += [f'backup_identity = "file:{self.identity}"']
        if self._system.backup_schedule:
            lines += [f'backup_schedule = "{self._system.backup_schedule}"']
        if self._system.archive_on_failure:
            lines += [f'archive_on_failure = "{self._system.archive_on_failure}"']
        return "".join(f"{line}\n" for line in lines)

    def environment(self) -> Mapping[str, str]:
        """What the settings refer to."""
        return {"DRILL_ACCESS": _ACCESS, "DRILL_SECRET": _SECRET} if self.store else {}

    def _make_key(self) -> str:
        """The public key of a new one in `identity`."""
        try:
            from pyrage import x25519  # noqa: PLC0415 (an extra)
        except ImportError as error:
            hint = "pip install 'llm-orchestrator[age]'"
            raise NotPossible("sealed backups need pyrage", hint=hint) from error
        key = x25519.Identity.generate()
        self.identity.touch(mode=0o600)
        self.identity.write_text(f"{key}\n")
        return str(key.to_public())

    @property
    def hidden(self) -> Path:
        """Where the key is while it is lost."""
        return self.identity.with_suffix(".lost")

    def undo(self) -> None:
        """Everything is there again."""
        if self.store is not None:
            self.store.send(signal.SIGCONT)
            self.store.release()
        if self.hidden.exists():
            self.hidden.rename(self.identity)


def _program(name: str) -> str:
    """Beside our own interpreter, else on the path. Raises NotPossible."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise NotPossible(f"there is no {name} to serve an object store", hint="make setup")
    return found

"""Where a SingleTarget's copies go: an object store beside it and the key that opens backups.

The object store is rclone's, a process of its own with a folder behind it, so that what it was
given is there again when it comes back. Its faults: the whole store is gone, the key is gone.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill.child import Child
from llm_orchestrator.drill.scenario import System
from llm_orchestrator.drill.target import NotPossible

if TYPE_CHECKING:
    from collections.abc import Mapping

_BUCKET = "drill"
_ACCESS, _SECRET = "DRILLDRILL", "drill-drill-drill-drill"


class Copies:
    """What `system` asks for, in `folder`; `port` is the object store's."""

    def __init__(self, folder: Path, port: int, system: System, clock: RealClock) -> None:
        self._folder = folder
        self._system = system
        self.url = f"http://127.0.0.1:{port}"
        self.identity = folder / "backup-identity.txt"
        self.store: Child | None = None
        if system.object_store:
            self.store = self._object_store(port, clock)

    def _object_store(self, port: int, clock: RealClock) -> Child:
        beside = Path(sys.executable).with_name("rclone")
        program = str(beside) if beside.exists() else shutil.which("rclone")
        if program is None:
            raise NotPossible("there is no rclone to serve an object store", hint="rclone.org")
        home = self._folder / "object-store"
        (home / "data" / _BUCKET).mkdir(parents=True)
        words = ("serve", "s3", "--addr", self.url.removeprefix("http://"))
        words += ("--auth-key", f"{_ACCESS},{_SECRET}", "--vfs-cache-mode", "writes")
        words += ("--config", str(home / "none"), str(home / "data"))
        environment = {"HOME": str(home), "XDG_CACHE_HOME": str(home), "PATH": os.defpath}
        log = self._folder / "object-store.log"
        return Child((program, *words), log, environment=environment, clock=clock)

    def settings(self) -> str:
        """Lines of the settings file."""
        lines = []
        if self.store is not None:
            lines += [f's3_endpoint_url = "{self.url}"', 's3_region = "us-east-1"']
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
            self.store.release()
        if self.hidden.exists():
            self.hidden.rename(self.identity)

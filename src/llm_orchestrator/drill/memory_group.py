"""A control group that bounds the memory of one process and its children (version 1, as root).

    python -m llm_orchestrator.drill.memory_group FOLDER

takes such a group away, for who comes after a drill that was killed. Only a process that starts
through `command` is in the group, from its first page on: never the drill, never what else it
started. The kernel's own counter says whether it has killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

from llm_orchestrator.drill.lab_process import wait
from llm_orchestrator.errors import OperatorError

ROOT = Path("/sys/fs/cgroup/memory")
_LIMIT, _LIMIT_WITH_SWAP = "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"
_END_S = 20.0


class MemoryGroup:
    """The group of one drill. Raises OperatorError when the kernel does not do as told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def is_possible() -> bool:
        """Whether we may make one here."""
        return os.getuid() == 0 and (ROOT / _LIMIT).exists()

    def make(self, limit: int) -> None:
        """Make it anew, with a limit in bytes; what an earlier drill left goes first."""
        self.remove()
        try:
            self.folder.mkdir()
            for name in (_LIMIT, _LIMIT_WITH_SWAP):
                if (self.folder / name).exists():  # no swap accounting, no second limit
                    (self.folder / name).write_text(str(limit))
        except OSError as error:
            raise OperatorError(f"{self.folder}: {error}", hint="run it as root") from error

    def remove(self) -> None:
        """Kill what is left in it and take it away. Safe to repeat."""
        if self.folder.exists() and not wait(self._is_gone, _END_S):
            raise OperatorError(f"{self.folder} stays", hint=f"rmdir {self.folder}")

    def _is_gone(self) -> bool:
        with contextlib.suppress(OSError):
            for pid in (self.folder / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            self.folder.rmdir()
        return not self.folder.exists()

    def command(self, *words: str) -> tuple[str, ...]:
        """`words` as a command that joins the group before it becomes them."""
        script = 'echo $$ > "$0" && exec "$@"'
        return ("sh", "-c", script, str(self.folder / "cgroup.procs"), *words)

    @property
    def pids(self) -> set[int]:
        """The processes in it."""
        return {int(pid) for pid in (self.folder / "cgroup.procs").read_text().split()}

    @property
    def limit(self) -> int:
        """Bytes."""
        return int((self.folder / _LIMIT).read_text())

    @property
    def used(self) -> int:
        """Bytes that the kernel cannot take back: without the files' pages."""
        return self._number("memory.stat", "total_rss")

    @property
    def kills(self) -> int:
        """How often the kernel has killed in it for want of memory."""
        return self._number("memory.oom_control", "oom_kill")

    def _number(self, file: str, name: str) -> int:
        for line in (self.folder / file).read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
        raise OperatorError(f"{self.folder / file} does not say {name}", hint="uname -r")


if __name__ == "__main__":
    MemoryGroup(Path(sys.argv[1])).remove()

"""The dead-man timer of a drill: a process that takes the fault away when the drill is gone.

    python -m llm_orchestrator.drill.deadman

reads one JSON line {"commands": [[...], ...], "limit_s": N} and then waits. The word `done` ends it
without a deed. When its stdin closes without that word (the drill was killed), or the limit is
over (the drill hangs), it runs the commands, last one first. It is a session of its own, so that
what kills the drill's terminal does not kill it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import Sequence

COMMAND_S = 60.0
"""Beyond that a command has failed."""


class DeadMan:
    """Holds the timer. Without commands there is nothing to hold.

    The commands find our environment: a user's own need what they need in the drill.
    """

    def __init__(self, commands: Sequence[Sequence[str]], limit_s: float) -> None:
        self._told = {"commands": [list(command) for command in commands], "limit_s": limit_s}
        self._process: subprocess.Popen[bytes] | None = None

    def arm(self) -> None:
        """From now on the commands run if we vanish."""
        if not self._told["commands"]:
            return
        self._process = subprocess.Popen(
            [sys.executable, "-m", "llm_orchestrator.drill.deadman"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._say(json.dumps(self._told))

    def disarm(self) -> None:
        """The fault was taken away in the ordinary way."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # its time was over: it has done its work
                self._say("done")
            with contextlib.suppress(BrokenPipeError):  # it closes all the same
                self._process.stdin.close()
            self._process.wait()
            self._process = None

    def _say(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()


async def _wait() -> None:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    told = json.loads(await reader.readline())
    try:
        word = await asyncio.wait_for(reader.readline(), float(told["limit_s"]))
    except TimeoutError:
        word = b""
    if word.strip() != b"done":
        run_commands(told["commands"])


def run_commands(commands: Sequence[Sequence[str]]) -> list[str]:
    """Run each, the last one first; what went wrong, in words."""
    troubles = []
    for command in reversed(commands):
        try:
            done = subprocess.run(command, check=False, timeout=COMMAND_S, capture_output=True)
        except (OSError, subprocess.TimeoutExpired) as error:
            troubles.append(f"{command[0]}: {error}")
            continue
        if done.returncode != 0:
            troubles.append(f"{command[0]}: {done.stderr.decode(errors='replace').strip()}")
    return troubles


if __name__ == "__main__":
    asyncio.run(_wait())

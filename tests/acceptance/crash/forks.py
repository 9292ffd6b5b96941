"""Warm children: a server process that has everything imported forks one child for each order.

    python -m tests.acceptance.crash.forks

reads one JSON order a line on stdin and answers with the child's pid. A child's stdout is the FIFO
that its order names. The server has no threads and no event loop, so that forking it is safe; when
its stdin ends it ends, and the kernel kills its children with it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_SECONDS_MAX = 90.0
_PR_SET_PDEATHSIG = 1


class Child:
    """One forked process. A pidfd names it, so no other process is ever signalled."""

    def __init__(self, pid: int, out: IO[str]) -> None:
        self._pidfd = os.pidfd_open(pid)
        self._out = out

    def lines(self) -> Iterator[dict[str, Any]]:
        """What it says, until it stops at its point or ends."""
        for line in self._out:
            said = json.loads(line)
            yield said
            if said.get("stopped"):
                return

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self.wait()

    def wait(self) -> None:
        """Until it has ended."""
        ready, _, _ = select.select([self._pidfd], [], [], _SECONDS_MAX)
        assert ready, "the child does not end"

    def close(self) -> None:
        self._out.close()
        os.close(self._pidfd)


class Forks:
    """The server, from the outside."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @contextmanager
    def child(self, folder: Path, **order: Any) -> Iterator[Child]:
        """Fork a child that obeys `order`. Gone, whatever happened, when the block ends."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        fifo = folder / f"out-{len(list(folder.glob('out-*')))}"
        os.mkfifo(fifo)
        process.stdin.write(json.dumps({**order, "folder": str(folder), "out": str(fifo)}) + "\n")
        process.stdin.flush()
        with fifo.open() as out:
            child = Child(int(process.stdout.readline()), out)
            try:
                yield child
            finally:
                try:
                    child.kill()
                except ProcessLookupError:
                    pass
                finally:
                    child.close()


@contextmanager
def forks() -> Iterator[Forks]:
    """A warm server until the block ends."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-m", __name__]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # numpy starts none: forking is safe
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", "the fork server did not start"
        yield Forks(process)
        assert process.stdin is not None
        process.stdin.close()
        process.wait(20)


def main() -> None:
    """Serve orders until stdin ends."""
    from tests.acceptance.crash import child  # everything heavy, once

    child.warm_up()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    gc.collect()
    gc.freeze()  # what is shared is not walked, and so not copied, by every child
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become_child(order)
            child.main(order)
            sys.stdout.flush()
            os._exit(0)
        print(pid, flush=True)


def _become_child(order: dict[str, Any]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    random.seed()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    out = os.open(order["out"], os.O_WRONLY)
    os.dup2(out, 1)
    log = os.open(Path(order["folder"]) / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    for number in (null, out, log):
        os.close(number)


if __name__ == "__main__":
    main()

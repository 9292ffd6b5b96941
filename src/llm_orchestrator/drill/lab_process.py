"""Processes of a lab: started as another user, bound to our life, found, frozen, killed.

A server's processes are those that work in its folder: so all of them are found, also those whose
parent is dead already and the shells that they started; and a zombie is none of them. A lab must
never find a process by its name, nor take a dead one for a living one.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path

from llm_orchestrator.errors import OperatorError

_COMMAND_S = 120.0
_POLL_S = 0.01


class LabError(OperatorError):
    """The lab could not do what a test or a drill asked of it; the message says why."""


def account() -> pwd.struct_passwd | None:
    """Whom root starts servers as (`postgres`, else `nobody`); None when we are not root."""
    if os.getuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise LabError("there is neither a user postgres nor nobody: make one, or do not run as root")


def own(path: Path) -> None:
    """Give `path` to whom we start servers as."""
    if who := account():
        os.chown(path, who.pw_uid, who.pw_gid, follow_symlinks=False)


def may(test: str, path: Path) -> bool:
    """Whether whom we start servers as passes `test(1)`, such as "-x", on `path`."""
    return subprocess.run(as_account("test", test, str(path)), check=False, cwd="/").returncode == 0


def as_account(*command: str) -> list[str]:
    """`command`, as whom we start servers as."""
    who = account()
    ids = [f"--reuid={who.pw_uid}", f"--regid={who.pw_gid}", "--clear-groups"] if who else []
    return ["setpriv", *ids, *command]


def run(*command: str, given: str = "") -> str:
    """What `command` prints, told `given`, without our environment. Raises LabError."""
    done = subprocess.run(
        command,
        input=given,
        capture_output=True,
        text=True,
        check=False,
        timeout=_COMMAND_S,
        env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"},
        cwd="/",
    )
    if done.returncode != 0:
        raise LabError(f"{command[0]}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def launch(*command: str, log: Path) -> subprocess.Popen[bytes]:
    """Start a server that gets SIGQUIT when we die, writing to the end of `log`.

    The kernel takes the *thread* that started it for its parent. So that is a thread of its own,
    which lasts as long as the server: a server may be started from any thread, and outlive it.
    """
    started: Future[subprocess.Popen[bytes]] = Future()

    def keep() -> None:
        try:
            with log.open("ab") as output:
                process = subprocess.Popen(
                    as_account("--pdeathsig=QUIT", *command),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"},
                    cwd="/",
                    start_new_session=True,  # Ctrl-C is for us; we stop it in our own order
                )
        except OSError as error:
            started.set_exception(error)
            return
        started.set_result(process)
        process.wait()

    threading.Thread(target=keep, name=f"lab {command[0]}", daemon=True).start()
    return started.result()


def processes_in(folder: Path) -> list[int]:
    """The ids of all living processes that work in `folder`, in order."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it is gone, a zombie, or somebody else's
            if (place / "cwd").readlink() == folder:
                found.append(int(place.name))
    return sorted(found)


def send(number: signal.Signals, pids: Iterable[int]) -> None:
    """Send a signal to each that is still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def freeze(folder: Path) -> None:
    """SIGSTOP all that work in `folder`, also those born meanwhile. Raises LabError."""

    def is_frozen() -> bool:
        pids = processes_in(folder)
        send(signal.SIGSTOP, pids)
        return all(state(pid) in "TZX" for pid in pids) and pids == processes_in(folder)

    if not wait(is_frozen, 20.0):
        raise LabError(f"{folder}: its processes do not freeze")


def kill(folder: Path) -> None:
    """SIGKILL all that work in `folder`, also those born meanwhile. Raises LabError."""

    def are_dead() -> bool:
        pids = processes_in(folder)
        send(signal.SIGKILL, pids)
        return not pids

    if not wait(are_dead, 20.0):
        raise LabError(f"{folder}: its processes do not die")


def state(pid: int) -> str:
    """One letter as in proc(5): R, S, D, T stopped, Z zombie; X where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "X"


def wait(happens: Callable[[], bool], limit_s: float) -> bool:
    """Look every 10 ms, about `limit_s` long, whether it happens."""
    pause = threading.Event()
    for _ in range(int(limit_s / _POLL_S)):
        if happens():
            return True
        pause.wait(_POLL_S)
    return happens()

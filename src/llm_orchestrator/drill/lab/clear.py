"""How a lab goes: everything that it is, was, or was about to be, whoever of it lives.

Nobody is asked. First the supervisor is killed, so that nothing is started again; then everything
that works in the lab's folder; then shared memory, namespaces, mounts and files go. lab.json goes
last: a lab that is half gone is still known as one. The same after a crash of any part.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from pathlib import Path

from llm_orchestrator.drill.lab import state as states
from llm_orchestrator.drill.lab.host import DATA, kill_all
from llm_orchestrator.drill.lab.network import clear as remove_namespaces
from llm_orchestrator.drill.lab.tools import call, find
from llm_orchestrator.drill.lab_process import LabError, send, wait
from llm_orchestrator.drill.postgres_lab import end_cluster

SUPERVISOR = "llm_orchestrator.drill.lab.supervisor"
_DOWN_S = 20.0


def down(folder: Path | None = None) -> bool:
    """Remove a lab, alive or not; False when there is none. Raises LabError."""
    where = (folder or states.default_folder()).resolve()
    if not (where / states.STATE).exists():
        return False
    with contextlib.suppress(FileNotFoundError):  # somebody else was quicker
        check_owner(where)
    clear(where, has_lock=False)
    return True


def clear(folder: Path, *, has_lock: bool) -> None:
    """Remove the lab in `folder`; the folder itself, too, unless its lock is ours already."""
    with contextlib.ExitStack() as stack:
        if not has_lock:
            stack.enter_context(_end_supervisor(folder))
        if not (folder / states.STATE).exists():
            return  # somebody else was about it, too
        kill_all(folder)
        for data in folder.glob(f"*/{DATA}"):
            end_cluster(data)
        remove_namespaces(states.lab_id(folder))
        if has_lock:
            _empty(folder)
        else:
            remove(folder, is_ours=is_folder_ours(folder))


def _end_supervisor(folder: Path) -> contextlib.ExitStack:
    """Kill who keeps the lab alive. The lab is ours then, until the stack is closed.

    Others that have it, to make it or to clear it, are waited for.
    """
    stack = contextlib.ExitStack()

    def is_ours() -> bool:
        is_there = (folder / states.STATE).exists()
        try:
            lock = states.claim(folder, may_create=is_there)
        except FileNotFoundError:
            return True  # somebody else has cleared it, or is about to remove the folder
        if lock is not None:
            stack.enter_context(lock)
            return True
        if _is_supervisor(pid := states.owner(folder), folder):
            send(signal.SIGKILL, [pid])
        return False

    if not wait(is_ours, _DOWN_S):
        raise LabError(f"who owns {folder} does not let go: process {states.owner(folder)}")
    return stack


def _is_supervisor(pid: int, folder: Path) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return SUPERVISOR.encode() in words and os.fsencode(folder) in words


def is_folder_ours(folder: Path) -> bool:
    """Whether the folder goes, too; so it does when nothing says whose it is."""
    try:
        return states.load(folder).is_folder_ours
    except LabError:
        return True


def remove(folder: Path, *, is_ours: bool) -> None:
    """Remove every file, and the folder if it is ours."""
    _empty(folder)
    (folder / states.OWNER).unlink(missing_ok=True)
    if is_ours:
        folder.rmdir()


def _empty(folder: Path) -> None:
    last = folder / states.STATE
    for path in folder.iterdir():
        if path.name == states.OWNER or path == last:
            continue
        if path.is_dir() and not path.is_symlink():
            _unmount(path)
            shutil.rmtree(path)
        else:
            path.unlink()
    last.unlink(missing_ok=True)


def _unmount(folder: Path) -> None:
    """What a drill has mounted below a host's folder, and could not unmount."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [Path(line.split()[4].replace("\\040", " ")) for line in lines]
    for point in sorted((p for p in points if p.is_relative_to(folder)), reverse=True):
        call(find("umount"), "--lazy", str(point))


def check_owner(folder: Path) -> None:
    """Raises LabError for somebody else's folder."""
    if folder.stat().st_uid != os.getuid():
        raise LabError(f"{folder} belongs to somebody else", hint="give another --folder")

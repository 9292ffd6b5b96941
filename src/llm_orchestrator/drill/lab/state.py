"""What a lab leaves on the disk: who owns it, what it is made of, how far it has come.

    lab.json                written before the first thing is made; the last thing removed
    owner                   locked as long as the supervisor (or who starts it) lives; holds its id
    supervisor.log
    HOST/                   where everything that runs on a host works, and nothing else
    HOST/PROCESS.json       of a supervised process: its id, how often it was restarted
    HOST/PROCESS.log
    HOST/PROCESS.hold       while it is there, the supervisor does not start the process again
    HOST/PROCESS.env        JSON: what its next start finds in its environment besides
    HOST/hold               the same for all processes of the host

Names of namespaces come from the folder's own name by a hash: they are known even when lab.json is
lost. Files are replaced whole, never written in place.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from llm_orchestrator.drill.lab.spec import Plan
from llm_orchestrator.drill.lab_process import LabError

STATE, OWNER, LOG = "lab.json", "owner", "supervisor.log"
_VERSION = 1


class NoLab(LabError):
    """There is no lab in that folder."""

    exit_code = 4


def default_folder() -> Path:
    """One lab a user, unless a folder is given: short, because sockets lie below it."""
    return Path(tempfile.gettempdir()) / f"llmo-lab-{os.getuid()}"


def lab_id(folder: Path) -> str:
    """What the names of everything that a lab makes outside its folder begin with."""
    return "llmo" + hashlib.blake2b(os.fsencode(folder), digest_size=4).hexdigest()


@dataclass(slots=True)
class LabState:
    """The content of lab.json. `steps`: what has been done, with seconds since the beginning."""

    plan: Plan
    is_folder_ours: bool
    phase: Literal["making", "ready", "failed"] = "making"
    steps: list[tuple[float, str]] = field(default_factory=list)
    error: str = ""
    binaries: str = ""

    def save(self, folder: Path) -> None:
        """Replace lab.json."""
        data = {
            "version": _VERSION,
            "plan": self.plan.to_json(),
            "is_folder_ours": self.is_folder_ours,
            "phase": self.phase,
            "steps": self.steps,
            "error": self.error,
            "binaries": self.binaries,
        }
        write(folder / STATE, data)


def load(folder: Path) -> LabState:
    """Raises NoLab; LabError when we cannot read it."""
    path = folder / STATE
    try:
        data = json.loads(path.read_text("utf-8"))
        if data.pop("version") != _VERSION:
            raise LabError(f"{path} is of another version of us: remove {folder} by hand")
        return LabState(**{**data, "plan": Plan.from_json(data["plan"])})
    except FileNotFoundError as error:
        raise NoLab(f"there is no lab in {folder}", hint="llmo lab up") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabError(f"{path} cannot be read: {error}", hint="llmo lab down") from error


def write(path: Path, data: Any) -> None:
    """Replace a file by JSON, so that nobody ever reads half of it."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(data, file, indent=1)
    fresh.replace(path)


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote; nothing when it is not there."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# --- who owns it ---


def claim(folder: Path, *, may_create: bool = True) -> IO[str] | None:
    """Own the lab as long as the file is open, here or in a child; None when somebody does.

    Raises FileNotFoundError for a lab that is gone, unless it may be created.
    """
    file = (folder / OWNER).open("a+" if may_create else "r+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    sign(file)
    return file


def sign(file: IO[str]) -> None:
    """Write our process id into the file that we own."""
    file.seek(0)
    file.truncate()
    file.write(f"{os.getpid()}\n")
    file.flush()


def owner(folder: Path) -> int:
    """The process id of the living owner; 0 when there is none."""
    try:
        with (folder / OWNER).open("r+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read().strip() or 0)
            return 0
    except (OSError, ValueError):
        return 0

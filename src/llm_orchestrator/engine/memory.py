"""How much memory this process has, and what to do before the kernel ends it.

Three bounds, of which the tightest counts: the control groups around the process (v2 and v1, with
every parent that has a limit), a configured limit, and, where there is neither, the machine. Use is
the group's charge without the page cache that the kernel can take back, or our own resident pages.

At HIGH of a bound nothing more is claimed and runs are let go, a share of them each second. What
was let go is claimed again below LOW, as many runs as the ceiling allows, which falls to half at
each shedding and grows a little each second that it is reached. What is in flight is paid for, so
it may end.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)
HIGH = 0.80
LOW = 0.70
SHARE = 0.25
"""Of the busy runs, this part is asked to leave each second."""
_NONE_FROM = 1 << 60
"""Version 1 says "no limit" with a number near 2^63."""


class Reading(NamedTuple):
    """Use and limit in bytes, of the bound that is nearest to full. `source` names it."""

    use: int
    limit: int
    source: str

    @property
    def share(self) -> float:
        """0 to 1, more when a limit is soft."""
        return self.use / self.limit if self.limit else 0.0


@dataclass(frozen=True, slots=True)
class Bound:
    """One limit and how to read what counts against it."""

    source: str
    limit: int
    use: Callable[[], int]


class Memory:
    """The bounds of this process. `root` is where /proc and /sys are; `limit` (bytes) 0 is none."""

    def __init__(self, limit: int = 0, *, root: Path = Path("/")) -> None:
        self._root = root
        self.bounds = self._bounds(limit)

    def read(self) -> Reading:
        """The bound that is nearest to full. Raises nothing: what cannot be read counts as 0."""
        readings = [Reading(each.use(), each.limit, each.source) for each in self.bounds]
        return max(readings, key=lambda each: each.share, default=Reading(0, 0, "unknown"))

    def _bounds(self, limit: int) -> Sequence[Bound]:
        found = list(self._groups())
        own = self._resident
        if limit:
            found.append(Bound("memory_limit_mb", limit, own))
        if not found and (total := self._machine()):
            found.append(Bound("the machine's memory", total, own))
        return found

    def _groups(self) -> Sequence[Bound]:
        found: list[Bound] = []
        for line in _text(self._root / "proc/self/cgroup").splitlines():
            number, _, rest = line.partition(":")
            kinds, _, path = rest.partition(":")
            if number == "0" and not kinds:
                base, names = self._root / "sys/fs/cgroup", _V2
            elif "memory" in kinds.split(","):
                base, names = self._root / "sys/fs/cgroup/memory", _V1
            else:
                continue
            found += [
                Bound(f"control group {name}", limit, _user(folder, names))
                for name, folder in _parents(base, path)
                if 0 < (limit := _number(_text(folder / names.limit))) < _NONE_FROM
            ]
        return found

    def _resident(self) -> int:
        fields = _text(self._root / "proc/self/statm").split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if len(fields) > 1 else 0

    def _machine(self) -> int:
        for line in _text(self._root / "proc/meminfo").splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) * 1024
        return 0


class _Names(NamedTuple):
    """The files of one version of control groups."""

    limit: str
    use: str
    cache: str


_V2 = _Names("memory.max", "memory.current", "inactive_file")
_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _parents(base: Path, path: str) -> list[tuple[str, Path]]:
    """A group and everything above it. In a container the path may be the host's: then the root."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    if not (base / Path(*parts)).is_dir():
        parts = []
    return [
        ("/" + "/".join(parts[:count]), base / Path(*parts[:count]))
        for count in range(len(parts), -1, -1)
    ]


def _user(folder: Path, names: _Names) -> Callable[[], int]:
    def use() -> int:
        charged = _number(_text(folder / names.use))
        for line in _text(folder / "memory.stat").splitlines():
            name, _, value = line.partition(" ")
            if name == names.cache:
                return max(0, charged - _number(value))
        return charged

    return use


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(text: str) -> int:
    stripped = text.strip()
    return int(stripped) if stripped.isdigit() else 0


class Pressure:
    """What the last readings mean. Pure, but for `give_back`."""

    def __init__(self, *, runs_max: int) -> None:
        self.is_shedding = False
        self.reading = Reading(0, 0, "unknown")
        self.ceiling = runs_max
        self._runs_max = runs_max

    def resize(self, runs_max: int) -> None:
        """Another bound on the runs here."""
        is_whole = self.ceiling >= self._runs_max
        self._runs_max = runs_max
        self.ceiling = runs_max if is_whole else min(self.ceiling, runs_max)

    def take(self, reading: Reading, *, driven: int) -> None:
        """A reading, with how many runs are here: sets `is_shedding` and `ceiling`."""
        self.reading = reading
        if reading.share >= HIGH:
            if not self.is_shedding:
                self.is_shedding = True
                self.ceiling = max(1, min(self.ceiling, driven) // 2)
                logger.warning("%s; nothing is claimed, runs are let go", self._say())
        elif self.is_shedding and (reading.share < LOW or not driven):
            self.is_shedding = False
            logger.warning("%s; runs are claimed again", self._say())
        elif not self.is_shedding and self.ceiling < self._runs_max and driven >= self.ceiling:
            more = self.ceiling // 10 if reading.share < LOW else 0
            self.ceiling = min(self._runs_max, self.ceiling + 1 + more)

    def _say(self) -> str:
        used, limit, source = self.reading
        return f"memory: {used >> 20} of {limit >> 20} MiB ({self.reading.share:.0%}, {source})"


def give_back() -> None:
    """Return to the system what nobody uses any more; costs some milliseconds."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not
        if trim is not None:
            trim(0)

"""The moments of a drill, on one steady clock, and the lengths between them.

t0 fault confirmed effective, t1 detected, t2 decided, t3 failover started, t4 store writable (the
first request taken after the fault), t5 first verified end-to-end run and the first entry, or end,
of a run that the fault had stopped (the later of the two), t6 backlog drained, t7 redundancy
restored, t8 failed back, where the scenario orders it. `heal` is when the fault was taken away.

    recovery time = t5 - t0, or t5 - heal where the scenario measures from there

A mark that was not seen is absent; it is never guessed. Marks that contradict each other (ORDER)
are a fault of the drill, and no measurement.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

NAMES = {
    "t0": "fault confirmed",
    "heal": "fault taken away",
    "t1": "detected",
    "t2": "decided",
    "t3": "failover started",
    "t4": "store writable",
    "t5": "first verified run",
    "t6": "backlog drained",
    "t7": "redundancy restored",
    "t8": "failed back",
}
PARTS = {
    "detect": ("t0", "t1"),
    "decide": ("t1", "t2"),
    "promote": ("t3", "t4"),
    "verify": ("t4", "t5"),
    "work off": ("t5", "t6"),
    "exposed": ("t0", "t7"),
    "fail back": ("t7", "t8"),
}

ORDER = (("t1", "t2"), ("t2", "t3"), ("t3", "t5"), ("t4", "t5"), ("t5", "t6"))
"""What cannot be the other way round. A run that was verified before the failover began proves
nothing of it; writable and verified say nothing of who noticed what (others may have gone on)."""
APART_S = 2.0
"""Two observers, one of whom looks five times a second, see one moment at most so far apart."""


@dataclass
class Marks:
    """The marks of one run of a scenario; seconds on the steady clock."""

    measure_from: str = "fault"
    at_s: dict[str, float] = field(default_factory=dict)

    def put(self, name: str, at_s: float | None) -> None:
        """Note a mark; the first time counts, None is no time."""
        if name not in NAMES:
            raise ValueError(f"there is no mark {name}")
        if at_s is not None:
            self.at_s.setdefault(name, at_s)

    def take(self, seen: Iterable[tuple[float, str]]) -> None:
        """Note what others saw; what lies before the fault does not count."""
        start = self.at_s["t0"]
        for at_s, name in sorted(seen):
            if at_s >= start:
                self.put(name, at_s)

    def detected(self, at_s: Iterable[float | None]) -> None:
        """Whoever noticed first has detected it: t1 is the earliest of all, from the fault on."""
        start = self.at_s["t0"]
        self.put(
            "t1", min((each for each in at_s if each is not None and each >= start), default=None)
        )

    @property
    def start_s(self) -> float:
        """Where the recovery time begins."""
        return self.at_s["heal" if self.measure_from == "heal" else "t0"]

    @property
    def recovery_time_s(self) -> float | None:
        """The headline; None when nothing recovered. What recovered before healing took 0 s."""
        if "t5" not in self.at_s:
            return None
        return max(0.0, self.at_s["t5"] - self.start_s)

    def relative(self) -> dict[str, float]:
        """Every mark in milliseconds' precision, seconds from t0."""
        start = self.at_s.get("t0", 0.0)
        return {name: round(self.at_s[name] - start, 3) for name in NAMES if name in self.at_s}

    def parts(self) -> dict[str, float]:
        """How long each part took, seconds, where both of its ends were seen."""
        return parts_of(self.relative())


def disorder_of(marks: Mapping[str, float]) -> list[str]:
    """Which marks contradict each other; `marks` are seconds from t0."""
    pairs = [*ORDER, *(("t0", name) for name in marks if name != "t0")]
    return [
        f"{later} ({NAMES[later]}, {marks[later]:.2f} s) lies before "
        f"{earlier} ({NAMES[earlier]}, {marks[earlier]:.2f} s)"
        for earlier, later in pairs
        if earlier in marks and later in marks and marks[later] < marks[earlier] - APART_S
    ]


def parts_of(marks: Mapping[str, float]) -> dict[str, float]:
    """The lengths of PARTS in seconds."""
    return {
        part: round(marks[end] - marks[start], 3)
        for part, (start, end) in PARTS.items()
        if start in marks and end in marks
    }

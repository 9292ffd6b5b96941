"""Was anything lost, done twice, paid twice, wrong? Pure functions of what the witness wrote down.

The books are lines as the witness and the fake LLM server wrote them, each with a wall clock `at`
(us, one machine) where order between the two matters:

    accepted  a run whose acceptance was acknowledged, and what its output must be
    entry     a journal entry that a reader of the database saw (so it was committed)
    effect    a request that the receiver of effects took
    ended     how the API says that a run ended
    final     a journal entry that is there at the end
    terms     which runs' records were damaged, to which moment a restore went back, and which of
              the sources were out of the witness's sight
    window    the time in which a fault worked: what was in flight then may be made again

A repeat is excused only if the call before it did not end whole, or was in flight (no finished
step of it seen) when a window began; or if it was begun before the result was there: as many calls
as intents were committed by then may still arrive while a window is open (a process that was
frozen between its intent and its call goes on where it stood). Whatever is not excused is a
finding, and one finding fails a drill.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Line = Mapping[str, Any]
PROMPT = re.compile(r"drill (\S+) (\w+)")
_SETTLE_US = 0
STORE, LLM = "store", "llm"
UNSEEN = {
    STORE: "each entry and its writer (no store_url): only what runs say themselves was compared",
    LLM: "money (no llm_ledger): whether a call was paid twice, and what was spent again",
}
"""What nobody can say when a source is out of sight."""
_GOOD = "completed"


@dataclass(frozen=True, slots=True)
class Finding:
    """One broken promise. `kind`: lost, twice, effect_twice, paid_twice, wrong, two_writers."""

    kind: str
    run_id: str
    text: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of it. Tokens and calls are of the fake LLM server's own count."""

    findings: Sequence[Finding]
    counts: Mapping[str, int]
    lost_entries: int = 0
    lost_s: float = 0.0
    respent: Mapping[str, int] = field(default_factory=dict)
    respent_by: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Tokens that were paid for again, by PROVIDER/MODEL: input, output."""
    not_judged: Sequence[str] = ()
    """What was out of sight: no finding of that kind says nothing."""

    @property
    def is_whole(self) -> bool:
        """True when no promise was broken."""
        return not self.findings


@dataclass(frozen=True, slots=True)
class Books:
    """Everything written down, and what the fault excuses."""

    lines: Sequence[Line]
    calls: Sequence[Line]
    touched: frozenset[str] = frozenset()
    kept_until_us: int | None = None
    may_pause: bool = False
    """A damaged run may stop, for the reason that it is damaged, until a person decides."""
    unseen: frozenset[str] = frozenset()
    """Of STORE and LLM those that were out of sight."""

    def of(self, event: str) -> list[Line]:
        """The witness's lines of one event, in order."""
        return [line for line in self.lines if line["event"] == event]

    def is_promised(self, at_us: int) -> bool:
        """False for what was acknowledged after the point to which a restore goes back."""
        return self.kept_until_us is None or at_us <= self.kept_until_us


def read(ledger: Path, llm_ledgers: Iterable[Path]) -> Books:
    """The books of a drill that was carried out, with what its fault excused.

    Several LLM servers' books become one, in the order of the requests.
    """
    lines = _lines(ledger)
    calls = sorted((line for path in llm_ledgers for line in _lines(path)), key=_at)
    terms: Line = next((line for line in lines if line["event"] == "terms"), {})
    return Books(
        lines,
        calls,
        touched=frozenset(terms.get("touched", ())),
        kept_until_us=terms.get("kept_until_us"),
        may_pause=terms.get("may_pause", False),
        unseen=frozenset(terms.get("unseen", ())),
    )


def _lines(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def _at(line: Line) -> int:
    return int(line["at"])


def judge(books: Books) -> Verdict:
    """Compare what was acknowledged with what is there."""
    accepted = {line["run"]: line for line in books.of("accepted")}
    beyond = frozenset(run for run, line in accepted.items() if not books.is_promised(line["at"]))
    gone = list(_gone_entries(books))
    findings = [
        *_lost_runs(books, accepted, beyond),
        *(Finding("lost", line["run"], text) for line, text, is_promised in gone if is_promised),
        *_written_twice(books),
        *_effects_twice(books, accepted),
        *_two_writers(books),
        *_wrong(books, accepted, beyond),
    ]
    spent = _Spending(books, accepted)
    findings += spent.findings
    lost = [line for line, _, _ in gone]
    return Verdict(
        findings,
        _counts(books, accepted),
        lost_entries=len(lost),
        lost_s=_age_s(books, lost),
        respent={} if LLM in books.unseen else spent.totals,
        respent_by=spent.by_model,
        not_judged=[text for source, text in UNSEEN.items() if source in books.unseen],
    )


def _counts(books: Books, accepted: Mapping[str, Line]) -> dict[str, int]:
    return {
        "runs_accepted": len(accepted),
        "probes": sum(line["kind"] == "probe" for line in accepted.values()),
        "entries_seen": len(books.of("entry")),
        "entries_final": len(books.of("final")),
        "effects": len({line["key"] for line in books.of("effect")}),
        "effect_deliveries": len(books.of("effect")),
        "llm_calls": sum(line["event"] == "arrived" for line in books.calls),
        "claimed_again": _claimed_again(books, accepted),
    }


def _claimed_again(books: Books, accepted: Mapping[str, Line]) -> int:
    """Runs that did not stay where they were claimed first: let go, parked, or taken over."""
    claims = Counter(line["run"] for line in books.of("final") if line["kind"] == "claimed")
    return sum(claims[run] > 1 for run in accepted)


def _age_s(books: Books, lost: Sequence[Line]) -> float:
    """How old the oldest lost entry was when the first fault began."""
    windows = books.of("window")
    if not lost or not windows:
        return 0.0
    oldest = min(int(line["at"]) for line in lost)
    return max(0.0, (min(int(window["t0"]) for window in windows) - oldest) / 1e6)


# --- lost ---


def _lost_runs(
    books: Books, accepted: Mapping[str, Line], beyond: frozenset[str]
) -> Iterator[Finding]:
    ends = {line["run"]: line for line in books.of("ended")}
    there = {line["run"] for line in books.of("final")}
    for run in accepted.keys() - beyond:
        if run not in there and STORE not in books.unseen:
            yield Finding("lost", run, "it was accepted, and its journal is not there")
        elif run not in ends:
            yield Finding("lost", run, "it was accepted, and it does not end")


def _gone_entries(books: Books) -> Iterator[tuple[Line, str, bool]]:
    final = {(line["run"], line["seq"]): line["digest"] for line in books.of("final")}
    for line in books.of("entry"):
        digest = final.get((line["run"], line["seq"]))
        if digest == line["digest"]:
            continue
        where = f"entry {line['seq']} ({line['kind']} {line['step']})".replace(" )", ")")
        what = "is not there" if digest is None else "is another one now"
        is_promised = books.is_promised(line["at"]) and line["run"] not in books.touched
        yield line, f"{where} was committed and {what}", is_promised


# --- twice ---


def _finished(lines: Iterable[Line]) -> dict[tuple[str, str], list[Line]]:
    found: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for line in lines:
        if line["kind"] == "step_finished":
            found[line["run"], line["step"]].append(line)
    return found


def _written_twice(books: Books) -> Iterator[Finding]:
    rewound = {line["run"] for line in books.of("final") if line["kind"] == "rewound"}
    for (run, step), lines in _finished(books.of("final")).items():
        if len(lines) > 1 and run not in books.touched | rewound:
            yield Finding("twice", run, f"step {step} finished {len(lines)} times")


class _Intents:
    """When each step of each run was about to be issued, as the journal says."""

    def __init__(self, books: Books) -> None:
        self._windows = books.of("window")
        self._at: dict[tuple[str, str], list[int]] = defaultdict(list)
        for line in books.of("entry"):
            if line["kind"] == "intent":
                self._at[line["run"], line["step"]].append(int(line["at"]))

    def late(self, where: tuple[str, str], done: int, times: Sequence[int]) -> int:
        """How many of `times` lie after `done`, and were not begun before it."""
        after = [at for at in times if at > done]
        begun = sum(at <= done for at in self._at[where]) - (len(times) - len(after))
        open_at = [at for at in after if self._is_open(at)]
        return len(after) - max(0, min(begun, len(open_at)))

    def _is_open(self, at: int) -> bool:
        return any(window["from"] <= at <= window["until"] for window in self._windows)


def _effects_twice(books: Books, accepted: Mapping[str, Line]) -> Iterator[Finding]:
    """One effect has one key: a second key would be taken by every receiver as a second effect."""
    intents = _Intents(books)
    runs = {line["key"]: run for run, line in accepted.items()}
    acknowledged = {run: lines[0]["at"] for (run, step), lines in _seen(books) if step == "act"}
    by_key: dict[str, list[Line]] = defaultdict(list)
    for line in books.of("effect"):
        by_key[line["key"]].append(line)
    for key, lines in by_key.items():
        run = runs.get(key, "")
        if run in books.touched or (run and not books.is_promised(accepted[run]["at"])):
            continue
        idents = {line["id"] for line in lines}
        if len(idents) > 1:
            yield Finding("effect_twice", run, f"effect {key} came under {len(idents)} keys")
        after = acknowledged.get(run)
        if after is None or not books.is_promised(after):
            continue
        if intents.late((run, "act"), after, [line["at"] for line in lines]):
            yield Finding("effect_twice", run, f"effect {key} came again after it was recorded")


def _seen(books: Books) -> Iterable[tuple[tuple[str, str], list[Line]]]:
    return _finished(books.of("entry")).items()


def _two_writers(books: Books) -> Iterator[Finding]:
    """Along a journal the epoch only rises, and an epoch is claimed once."""
    by_run: dict[str, list[Line]] = defaultdict(list)
    for line in books.of("final"):
        by_run[line["run"]].append(line)
    for run, lines in by_run.items():
        lines.sort(key=lambda line: int(line["seq"]))
        epochs = [int(line["epoch"]) for line in lines]
        if epochs != sorted(epochs):
            yield Finding("two_writers", run, "an entry of an older epoch follows a newer one")
        claims = [line["epoch"] for line in lines if line["kind"] == "claimed"]
        if len(claims) != len(set(claims)):
            yield Finding("two_writers", run, "an epoch was claimed twice")


# --- money ---


class _Spending:
    """Calls by run and step: which were made again, and what that cost."""

    def __init__(self, books: Books, accepted: Mapping[str, Line]) -> None:
        self._books = books
        self._windows = books.of("window")
        self._intents = _Intents(books)
        self._done = {where: int(lines[0]["at"]) for where, lines in _seen(books)}
        self._ends = {line["id"]: line for line in books.calls if line["event"] == "ended"}
        self.findings: list[Finding] = []
        self.totals = {"calls": 0, "tokens": 0, "refused_calls": 0}
        self.by_model: dict[str, dict[str, int]] = {}
        runs = {line["key"]: line for line in accepted.values()}
        for (key, step), calls in self._by_step().items():
            if key in runs:
                self._look(runs[key], step, calls)

    def _by_step(self) -> dict[tuple[str, str], list[Line]]:
        found: dict[tuple[str, str], list[Line]] = defaultdict(list)
        for line in self._books.calls:
            if line["event"] == "arrived" and (match := PROMPT.match(line["prompt"])):
                found[match.group(1), match.group(2)].append(line)
        return found

    def _look(self, run: Line, step: str, calls: Sequence[Line]) -> None:
        outcomes = [self._ends.get(call["id"], {}) for call in calls]
        paid = [end for end in outcomes if end.get("tokens")]
        served = sum(int(end["tokens"]) for end in paid)
        needed = int(run["tokens"].get(step, 0))
        self.totals["tokens"] += max(0, served - needed)
        self.totals["calls"] += max(0, len(paid) - 1)
        self.totals["refused_calls"] += len(calls) - len(paid)
        self._price([call for call, end in zip(calls, outcomes, strict=True) if end.get("tokens")])
        if run["run"] in self._books.touched:
            return
        where = (run["run"], step)
        done = self._done.get(where)
        is_done = done is not None and self._books.is_promised(done)
        if is_done and self._intents.late(where, done or 0, [call["at"] for call in calls]):
            text = f"step {step} was asked again after its result was recorded"
            self.findings.append(Finding("twice", run["run"], text))
        for before, call, end in zip(calls, calls[1:], outcomes, strict=False):
            if is_done and call["at"] > (done or 0):
                continue
            if end.get("outcome") == "complete" and not self._was_in_flight(before, call, done):
                text = f"step {step} was paid again, and nothing had interrupted it"
                self.findings.append(Finding("paid_twice", run["run"], text))

    def _price(self, paid: Sequence[Line]) -> None:
        """All that was paid for but the last answer: what went before it was given twice."""
        for call in paid[:-1]:
            name = f"{str(call.get('api', '')).partition('.')[0]}/{call.get('model', '')}"
            sums = self.by_model.setdefault(name, {"input": 0, "output": 0})
            sums["input"] += int(call.get("input_tokens", 0))
            sums["output"] += int(self._ends[call["id"]]["tokens"])

    def _was_in_flight(self, before: Line, call: Line, done: int | None) -> bool:
        return any(
            before["at"] <= window["until"] + _SETTLE_US
            and call["at"] >= window["from"]
            and (done is None or done >= window["from"] or not self._books.is_promised(done))
            for window in self._windows
        )


# --- wrong ---


def _wrong(books: Books, accepted: Mapping[str, Line], beyond: frozenset[str]) -> Iterator[Finding]:
    for line in books.of("ended"):
        run = line["run"]
        if run not in accepted or run in beyond:
            continue
        if books.may_pause and run in books.touched and _is_stopped_for_damage(line):
            continue
        if line["state"] != accepted[run].get("state", _GOOD):
            yield Finding("wrong", run, f"it ended {line['state']}: {line.get('error')}"[:300])
        elif line["state"] == _GOOD and line["output"] != accepted[run]["expects"]:
            yield Finding("wrong", run, f"its output is {line['output']!r}"[:300])


def _is_stopped_for_damage(line: Line) -> bool:
    return line["state"] == "paused" and (line.get("error") or {}).get("kind") == "damaged"

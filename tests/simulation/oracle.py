"""What must hold, whatever happens: one function for each invariant.

The oracle sees every transaction the moment it becomes visible on the leader, every acknowledgement
that a process was given, and every request that reached the fake provider. It keeps no code of the
engine but `decode`: what a rewind hides, who may write and what follows what it works out itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llm_orchestrator.engine.machine import TRANSITIONS, Event
from llm_orchestrator.engine.replay import fold
from llm_orchestrator.engine.rows import contradiction
from llm_orchestrator.model import Entry, Kind, RunState
from llm_orchestrator.store.base import Batch, Post, Receipt
from llm_orchestrator.store.journal import GENESIS, chain, decode
from llm_orchestrator.store.rows import run_row_of
from tests.simulation.server import Record, Server
from tests.simulation.statements import _ROW


class Violated(Exception):
    """An invariant does not hold."""


class Issue(NamedTuple):
    """One request that reached the provider."""

    at: float
    process: str
    incarnation: str
    run_id: str
    step: str
    request: str
    key: str = ""
    """The idempotency key under which the engine announced it, if it did."""


@dataclass
class Line:
    """One run as the oracle follows it."""

    seq: int = 0
    digest: bytes = GENESIS
    epoch: int = -1
    state: RunState = RunState.PENDING
    entries: list[Entry] = field(default_factory=list)


class Oracle:
    """See the module's docstring. `note` writes a line of the trace."""

    def __init__(self, note: Callable[..., None], now: Callable[[], float]) -> None:
        self.note = note
        self.now = now
        self.lines: dict[str, Line] = {}
        self.acked: dict[tuple[str, int], bytes] = {}
        self.accepted: dict[str, str] = {}
        """Runs whose acceptance was acknowledged, and the idempotency key they were given."""
        self.keys: dict[tuple[str, str], str] = {}
        """(incarnation, idempotency key of a run): the run id that its callers were told."""
        self.posted: set[str] = set()
        self.issues: list[Issue] = []
        self.violations: list[str] = []
        self.policies: dict[str, str] = {}
        """Step name to `ask`, `retry`, `fail`, `paid` or nothing."""
        self.incarnation = ""

    def violated(self, what: str) -> None:
        """Note a violation; the seed goes on, to show what follows."""
        if len(self.violations) < 20:
            self.violations.append(what)
            self.note("VIOLATED", what)

    # -- what happens ------------------------------------------------------------------------------

    def committed(self, record: Record) -> None:
        """A transaction became visible on the leader."""
        for name, key, row in record:
            if name == "journal" and row is not None:
                self.appended(Entry(*row))
            elif name == "nodes" and row is not None and row["state"] not in ("alive", "leaving"):
                self.note("node", key, row["state"])

    def appended(self, entry: Entry) -> None:
        """One entry more. Checks what can be seen at once."""
        line = self.lines.setdefault(entry.run_id, Line())
        for complaint in (
            *seq_is_dense(line, entry),
            *epoch_never_falls(line, entry),
            *no_stale_result(line, entry),
            *only_known_transitions(line, entry),
        ):
            self.violated(f"{entry.run_id}:{entry.seq} {entry.kind} {entry.step}: {complaint}")
        line.seq, line.digest = entry.seq, entry.digest
        line.epoch = max(line.epoch, entry.epoch)
        line.entries.append(entry)
        self.note("entry", entry.run_id, entry.seq, entry.epoch, entry.kind, entry.step)

    def recovered(self, server: Server, *, is_rewound: bool) -> None:
        """A server came up: look at everything it has. A rewind forgives what it took away."""
        self.note("recovered", server.identity, "rewound" if is_rewound else "")
        self.lines.clear()
        for entry in stored(server):
            self.appended(entry)
        if is_rewound:
            there = {(e.run_id, e.seq): e.digest for e in stored(server)}
            self.acked = {key: own for key, own in self.acked.items() if there.get(key) == own}
            runs = server.tables.table("runs")
            self.accepted = {key: own for key, own in self.accepted.items() if key in runs}

    def acknowledged(self, incarnation: str, batch: Batch, receipt: Receipt) -> None:
        """A process was told that this landed."""
        if incarnation != self.incarnation:
            return  # somebody who does not know of the restore: its store is gone
        for append in batch.appends:
            if append.run_id in receipt.refused:
                continue
            for entry in append.entries:
                self.acked[entry.run_id, entry.seq] = entry.digest
            if append.accept is not None:
                self.accepted[append.run_id] = append.accept.idempotency_key or ""
        for change in batch.changes:
            if isinstance(change, Post) and isinstance(change.payload, dict):
                self.note("posted", change.run_id, change.kind, change.name)

    def told(self, incarnation: str, key: str, run_id: str) -> None:
        """A caller that gave an idempotency key was told a run id."""
        first = self.keys.setdefault((incarnation, key), run_id)
        if first != run_id:
            self.violated(f"idempotency key {key} was answered with {first} and {run_id}")

    def issued(self, issue: Issue, *, lease_ends: float) -> None:
        """A request reached the provider."""
        line = self.lines.get(issue.run_id, Line())
        for entry in reversed(line.entries):
            if entry.kind == Kind.INTENT and entry.step.rpartition("/")[2] == issue.step:
                issue = issue._replace(key=decode(entry.payload)["key"])
                break
        self.issues.append(issue)
        self.note("issue", issue.process, issue.run_id, issue.step)
        for complaint in lease_holds(issue, lease_ends):
            self.violated(complaint)

    # -- at the end --------------------------------------------------------------------------------

    def check(self, server: Server) -> None:
        """Everything that is looked at when all is quiet."""
        entries = stored(server)
        by_run: dict[str, list[Entry]] = {}
        for entry in entries:
            by_run.setdefault(entry.run_id, []).append(entry)
        issues = [issue for issue in self.issues if issue.incarnation == self.incarnation]
        for complaints in (
            nothing_acknowledged_is_lost(self.acked, entries),
            fold_equals_row(server, by_run),
            accepted_runs_end(server, self.accepted, by_run),
            one_request_per_key(issues),
            once_needs_decisions(issues, by_run, self.policies),
            repeats_need_reasons(issues, by_run),
            steps_finish_once(by_run),
            outputs_come_from_the_journal(by_run),
            messages_land_once(server, by_run),
            children_are_unique(server),
            plans_fire_once(server),
        ):
            for complaint in complaints:
                self.violated(complaint)


def stored(server: Server) -> list[Entry]:
    """Every visible entry, in order."""
    cells = server.tables.table("journal")
    rows = [cell.versions[-1][1] for cell in cells.values() if cell.versions]
    return sorted((Entry(*row) for row in rows if row is not None), key=lambda e: (e[0], e[1]))


def visible(server: Server, name: str) -> dict[Any, Any]:
    """Every visible row of a table."""
    cells = server.tables.table(name).items()
    rows = {key: cell.versions[-1][1] for key, cell in cells if cell.versions}
    return {key: row for key, row in rows.items() if row is not None}


# -- invariants, at each entry ------------------------------------------------------------


def seq_is_dense(line: Line, entry: Entry) -> Iterable[str]:
    if entry.seq != line.seq + 1:
        yield f"follows seq {line.seq}"
    elif chain(line.digest, entry) != entry.digest:
        yield "does not fit the chain"


def epoch_never_falls(line: Line, entry: Entry) -> Iterable[str]:
    if entry.epoch < line.epoch:
        yield f"epoch {entry.epoch} after {line.epoch}"
    elif entry.kind in (Kind.CLAIMED, Kind.REWOUND) and entry.epoch == line.epoch and line.seq > 1:
        yield f"a new owner without a new epoch ({entry.epoch})"


def no_stale_result(line: Line, entry: Entry) -> Iterable[str]:
    """Only a claim and a rewind begin an epoch; all else is written under the present one."""
    begins = entry.kind in (Kind.ACCEPTED, Kind.CLAIMED, Kind.REWOUND)
    if not begins and entry.epoch != line.epoch:
        yield f"written under epoch {entry.epoch}, the run is at {line.epoch}"
    is_work = not begins and entry.kind not in (Kind.STATE, Kind.DECISION)
    if is_work and line.state is not RunState.RUNNING:
        yield f"written while the run is {line.state}"


def only_known_transitions(line: Line, entry: Entry) -> Iterable[str]:
    if entry.kind == Kind.CLAIMED:
        event = Event.TAKEOVER if line.state is RunState.RUNNING else Event.CLAIM
    elif entry.kind == Kind.REWOUND:
        event = Event.REWIND
    elif entry.kind == Kind.STATE:
        event = Event(decode(entry.payload)["event"])
    else:
        return
    following = TRANSITIONS[line.state].get(event)
    if following is None:
        yield f"a run that is {line.state} took {event}"
        return
    if entry.kind == Kind.STATE and decode(entry.payload)["state"] != following:
        yield f"{event} led from {line.state} to {decode(entry.payload)['state']}"
    line.state = following


def lease_holds(issue: Issue, lease_ends: float) -> Iterable[str]:
    """At its own lease's end a node starts no new effect."""
    if issue.at > lease_ends:
        over = issue.at - lease_ends
        yield f"{issue.process} began {issue.run_id}/{issue.step} {over:.3f} s after its lease"


# -- invariants, at the end ------------------------------------------------------------


def nothing_acknowledged_is_lost(
    acked: dict[tuple[str, int], bytes], entries: Sequence[Entry]
) -> Iterable[str]:
    there = {(entry.run_id, entry.seq): entry.digest for entry in entries}
    for (run_id, seq), digest in acked.items():
        if there.get((run_id, seq)) != digest:
            what = "changed" if (run_id, seq) in there else "lost"
            yield f"{run_id}:{seq} was acknowledged and is {what}"


def fold_equals_row(server: Server, by_run: dict[str, list[Entry]]) -> Iterable[str]:
    runs = visible(server, "runs")
    for run_id, entries in by_run.items():
        row = runs.get(run_id)
        found = None if row is None else run_row_of(run_id, tuple(row[name] for name in _ROW))
        wrong = contradiction(found, fold(run_id, entries), entries)
        if wrong:
            yield f"{run_id}: {wrong}"


def accepted_runs_end(
    server: Server, accepted: dict[str, str], by_run: dict[str, list[Entry]]
) -> Iterable[str]:
    runs = visible(server, "runs")
    for run_id in dict.fromkeys([*accepted, *by_run]):
        row = runs.get(run_id)
        state = "not there" if row is None else row["state"]
        if state not in ("completed", "failed", "cancelled"):
            why = "" if row is None else f"{row['reason']}, owner {row['owner']}"
            yield f"{run_id} was accepted and does not end: it is {state} {why}"


def one_request_per_key(issues: Sequence[Issue]) -> Iterable[str]:
    requests: dict[str, str] = {}
    for issue in issues:
        if not issue.key:
            continue
        first = requests.setdefault(issue.key, issue.request)
        if first != issue.request:
            yield f"{issue.key} was asked {first} and {issue.request}"


def once_needs_decisions(
    issues: Sequence[Issue], by_run: dict[str, list[Entry]], policies: dict[str, str]
) -> Iterable[str]:
    """Each issue of a `once` or paid step has an intent; each further one of a `once` step has a
    decision: the author's (on_unknown: retry), an operator's, a failure that was recorded."""
    counts = Counter((issue.run_id, issue.step) for issue in issues)
    for (run_id, step), count in counts.items():
        policy = policies.get(step, "")
        if not policy:
            continue
        own = [e for e in by_run.get(run_id, ()) if e.step.rpartition("/")[2] == step]
        intents = sum(entry.kind == Kind.INTENT for entry in own)
        if count > intents:
            yield f"{run_id}/{step} was issued {count} times with {intents} intents"
        if policy not in ("ask", "fail"):
            continue
        decided = sum(
            entry.kind == Kind.ATTEMPT_FAILED
            or (entry.kind == Kind.DECISION and decode(entry.payload)["choose"] == "retry")
            for entry in own
        )
        decided += sum(entry.kind == Kind.REWOUND for entry in by_run.get(run_id, ()))
        if count > 1 + decided:
            yield f"{run_id}/{step} ({policy}) was issued {count} times, {decided} decisions"


def repeats_need_reasons(issues: Sequence[Issue], by_run: dict[str, list[Entry]]) -> Iterable[str]:
    """A step is issued again only after a failure, another claim of its run, or a rewind."""
    counts = Counter((issue.run_id, issue.step) for issue in issues)
    for (run_id, step), count in counts.items():
        entries = by_run.get(run_id, ())
        own = [entry for entry in entries if entry.step.rpartition("/")[2] == step]
        reasons = sum(entry.kind == Kind.ATTEMPT_FAILED for entry in own)
        reasons += sum(entry.kind in (Kind.CLAIMED, Kind.REWOUND) for entry in entries)
        reasons += sum(entry.kind == Kind.INTENT for entry in own)
        if count > reasons:
            yield f"{run_id}/{step} was issued {count} times for {reasons} reasons"


def hidden(entries: Sequence[Entry]) -> set[int]:
    """What rewinds took back, worked out backwards: the last one counts first."""
    gone: set[int] = set()
    for entry in reversed(entries):
        if entry.kind == Kind.REWOUND and entry.seq not in gone:
            target = decode(entry.payload).get("to_seq", entry.seq)
            gone |= set(range(target + 1, entry.seq))
    return gone


def steps_finish_once(by_run: dict[str, list[Entry]]) -> Iterable[str]:
    for run_id, entries in by_run.items():
        gone = hidden(entries)
        done = Counter(
            entry.step
            for entry in entries
            if entry.kind == Kind.STEP_FINISHED and entry.seq not in gone
        )
        for step, count in done.items():
            if count > 1:
                yield f"{run_id}/{step} finished {count} times"


def outputs_come_from_the_journal(by_run: dict[str, list[Entry]]) -> Iterable[str]:
    """A workflow's output names each result it was built of: exactly those that are visible."""
    for run_id, entries in by_run.items():
        last = entries[-1]
        output = decode(last.payload).get("output") if last.kind == Kind.STATE else None
        if not isinstance(output, dict):
            continue
        gone = hidden(entries)
        done = [entry for entry in entries if entry.kind == Kind.STEP_FINISHED]
        names = {entry.step.rpartition("/")[2] for entry in done}
        results = {
            entry.step.rpartition("/")[2]: decode(entry.payload)["result"]
            for entry in done
            if entry.seq not in gone
        }
        for step, result in output.items():
            if step in names and results.get(step) != result:
                yield f"{run_id} ended with {step}={result}, the journal says {results.get(step)}"
        signals = {
            str(decode(entry.payload)["payload"])
            for entry in entries
            if entry.kind == Kind.SIGNAL and entry.seq not in gone
        }
        for step, result in output.items():
            if step.startswith("signal") and result and str(result) not in signals:
                yield f"{run_id} ended with a signal {result} that the journal does not have"


def messages_land_once(server: Server, by_run: dict[str, list[Entry]]) -> Iterable[str]:
    """No mark is in an inbox or in a journal twice: each was posted once."""
    marks: Counter[tuple[str, int]] = Counter()

    def count(run_id: str, payload: Any) -> None:
        if isinstance(payload, dict) and "mark" in payload:
            marks[run_id, payload["mark"]] += 1

    for (run_id, _), row in visible(server, "inbox").items():
        if row[2] is not None:
            count(run_id, decode(row[2])["value"])
    for run_id, entries in by_run.items():
        gone = hidden(entries)
        for entry in entries:
            if entry.kind == Kind.SIGNAL and entry.seq not in gone:
                count(run_id, decode(entry.payload)["payload"])
    for (run_id, mark), times in marks.items():
        if times > 1:
            yield f"{run_id} has message {mark} {times} times"


def children_are_unique(server: Server) -> Iterable[str]:
    rows = visible(server, "runs").values()
    children = Counter((r["parent_run_id"], r["origin"]) for r in rows if r["parent_run_id"])
    for (parent, origin), count in children.items():
        if count > 1:
            yield f"{parent} has {count} children of {origin}"


def plans_fire_once(server: Server) -> Iterable[str]:
    rows = visible(server, "runs").values()
    plans = Counter(row["origin"] for row in rows if "planned_at" in row["origin"])
    for origin, count in plans.items():
        if count > 1:
            yield f"{origin} fired {count} times"

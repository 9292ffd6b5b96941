"""Random operations by drivers that are sometimes stale: every store answers like the model."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from llm_orchestrator.drill.postgres_lab import PostgresServer
from llm_orchestrator.model import Draft, Kind, RunState, Workflow
from llm_orchestrator.store import base
from llm_orchestrator.store.audit import Audit, AuditEntry, AuditFilter, ForgetAudit
from llm_orchestrator.store.base import Batch, RunFilter, Store
from llm_orchestrator.store.check import definition_digest
from llm_orchestrator.store.journal import encode
from llm_orchestrator.store.memory import MemoryStore
from llm_orchestrator.store.postgres import PostgresStore
from llm_orchestrator.store.sqlite import SQLiteStore
from tests.postgres import fresh_database
from tests.store.support import HandClock, Writer, accepting, claim, new_run, on_hand_clock, state

RUNS = [f"00000000-0000-7000-8000-{number:012d}" for number in range(4)]
NAMES = st.sampled_from(["a", "b", "ü"])
JSON = st.sampled_from([None, 0, 1 << 70, float("inf"), "\ud800", "x\0y", [1, [2]], {"a": b"b"}])
RUN = st.integers(0, len(RUNS) - 1)
Operation = tuple[str, Any]


def changes() -> st.SearchStrategy[base.Change]:
    run_id = st.sampled_from(RUNS)
    return st.one_of(
        st.builds(
            base.Post,
            run_id,
            st.just("signal"),
            NAMES,
            JSON,
            st.none() | NAMES,
        ),
        st.builds(base.Consume, run_id, st.tuples(st.integers(1, 4))),
        st.builds(
            base.PutRecord, st.just("k"), NAMES, st.none() | st.integers(0, 3), st.integers(0, 2)
        ),
        st.builds(
            base.PutProgress, run_id, NAMES, st.integers(1, 2), st.integers(0, 2), NAMES, JSON
        ),
        st.builds(base.DropProgress, run_id, NAMES),
        st.builds(base.PutBlob, run_id, st.just(bytes(32)), st.binary(max_size=3)),
        st.builds(
            base.PutVectors,
            NAMES,
            NAMES,
            st.tuples(st.tuples(NAMES, st.binary(max_size=4), st.just(b"{}"))),
        ),
        st.builds(_register, NAMES, NAMES),
        st.builds(base.Expire, st.tuples(run_id, run_id)),
        st.builds(_audit, st.lists(st.tuples(NAMES, st.integers(1, 3), NAMES), max_size=2)),
        st.builds(ForgetAudit, NAMES),
    )


def _audit(rows: list[tuple[str, int, str]]) -> Audit:
    return Audit(
        tuple(
            AuditEntry(chain, number, 99 + number, word, "do", word, "", b"{}", "", b"", b"")
            for chain, number, word in rows
        )
    )


def _register(name: str, version: str) -> base.Register:
    definition = f"{name}{version}".encode()
    return base.Register(Workflow(name, version, definition_digest(definition), definition))


PART = st.tuples(
    RUN,
    st.sampled_from(["accept", "step", "steps", "claim", "state", "nothing", "again"]),
    st.booleans(),  # by a driver that may be stale
    st.sampled_from(list(RunState)),
    st.integers(0, 3),  # inbox_seen, and other small numbers
    st.lists(changes(), max_size=1),
)
BATCH = st.tuples(
    st.lists(PART, max_size=3, unique_by=lambda part: part[0]),
    st.lists(changes(), max_size=2),
    st.integers(0, 3),  # time that passes
)


class Drivers:
    """Two drivers per run; the second one learns of nothing unless it acts."""

    def __init__(self) -> None:
        self.writers = {run_id: [Writer(run_id), Writer(run_id)] for run_id in RUNS}
        self.last: dict[str, base.Append] = {}

    def append(self, part: Any) -> base.Append | None:
        number, what, is_second, to, small, beside = part
        run_id = RUNS[number]
        writer = self.writers[run_id][is_second]
        step = Draft(Kind.STEP_FINISHED, f"s{small}", 1 + is_second, encode({"result": small}))
        match what:
            case "again":
                return self.last.get(run_id)
            case "accept":
                run = new_run(number, priority=small, wake_at=small, labels={"n": str(small)})
                writer, append = accepting(run, changes=beside)
                self.writers[run_id][is_second] = writer
            case "nothing":
                append = writer.append(changes=beside)
            case "claim":
                writer.epoch += 1
                entry, change = claim(f"owner{small}")
                append = writer.append(entry, change=change, changes=beside)
            case "state":
                value = encode({"value": small})
                entry, change = state(
                    to, wake_at=small * 2, inbox_seen=small, output=value, error=None
                )
                append = writer.append(entry, change=change, changes=beside)
            case _:
                drafts = [step] * (2 if what == "steps" else 1)
                append = writer.append(*drafts, changes=beside)
        self.last[run_id] = append
        return append

    def settle(self, batch: Batch, receipt: base.Receipt, heads: dict[str, Any]) -> None:
        """Drivers whose append was refused look the run up, so that most of them may go on."""
        for append in batch.appends:
            if append.run_id in receipt.refused:
                for writer in self.writers[append.run_id]:
                    writer.seq, writer.digest = heads[append.run_id]


async def everything(store: Store, now: int) -> dict[str, Any]:
    """All that can be read."""
    look, shelf = store.look, store.shelf
    journals = await look.load(RUNS)
    return {
        "journals": {run_id: (list(j.entries), j.flaws) for run_id, j in journals.items()},
        "runs": await look.runs(RunFilter()),
        "labelled": await look.runs(RunFilter(label=("n", "2"), limit=2)),
        "paused": await look.runs(RunFilter(states=(RunState.PAUSED, RunState.FAILED))),
        "ids": await look.run_ids(),
        "unfinished": await look.unfinished(),
        "rows": [repr(await look.row(run_id)) for run_id in RUNS],
        "picked": await store.pick("node-1", base.Wanted(3, now)),
        "orphans": await store.adopt("node-1", 9),
        "next_wake": await look.next_wake(),
        "inboxes": [repr(await look.inbox(run_id)) for run_id in RUNS],
        "seen": await look.inbox_seqs(RUNS),
        "progress": [repr(await look.progress(run_id, name)) for run_id in RUNS for name in "ab"],
        "expirable": await look.expirable(finished_before=now - 2, keep=2, limit=3),
        "records": await shelf.records("k"),
        "versions": [await shelf.record("k", name) for name in "ab"],
        "vectors": [[tuple(row) for row in await shelf.vectors("a", name)] for name in "ab"],
        "workflows": await shelf.workflows(),
        "newest": [await shelf.workflow(name) for name in "ab"],
        "audit": await shelf.audit(AuditFilter(limit=9)),
        "audited": await shelf.audit(
            AuditFilter(actor="a", action="do", since=100, before=(102, "b", 2), limit=2)
        ),
        "audit_chains": await shelf.audit_chains(("a", 1), 5),
    }


async def on_sqlite(path: Path, batches: list[Any]) -> None:
    clock = HandClock(100)
    database = SQLiteStore(path, node_id="node-1", clock=clock)
    await database.open_as_engine()
    await agree(database, clock, batches)


async def on_postgres(url: str, batches: list[Any]) -> None:
    clock = HandClock(100)
    database = PostgresStore(url, node_id="node-1", clock=clock)
    await database.open()
    on_hand_clock(database, clock)
    await agree(database, clock, batches)


async def agree(database: Store, clock: HandClock, batches: list[Any]) -> None:
    model = MemoryStore(clock)
    drivers = Drivers()
    try:
        for parts, changes, passed in batches:
            clock.now += passed
            appends = [append for part in parts if (append := drivers.append(part)) is not None]
            batch = Batch(appends, changes)
            expected, found = await model.commit(batch), await database.commit(batch)
            assert found == expected
            right = await everything(model, clock.now)
            assert await everything(database, clock.now) == right
            heads = {
                run_id: (entries[-1].seq, entries[-1].digest) if entries else (0, bytes(32))
                for run_id in RUNS
                for entries in [await model.look.stored(run_id)]
            }
            drivers.settle(batch, expected, heads)
        assert await database.look.structure() == []
    finally:
        await database.close()


@settings(max_examples=40, deadline=None, phases=set(Phase) - {Phase.explain})
@given(st.lists(BATCH, min_size=3, max_size=15))
def test_sqlite_answers_like_the_model(batches: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(on_sqlite(Path(folder) / "store.db", batches))


@settings(
    max_examples=25,
    deadline=None,
    phases=set(Phase) - {Phase.explain},
    suppress_health_check=[HealthCheck.too_slow],
)
@given(st.lists(BATCH, min_size=3, max_size=15))
def test_postgres_answers_like_the_model(
    postgres_server: PostgresServer, batches: list[Any]
) -> None:
    with fresh_database(postgres_server) as url:
        asyncio.run(on_postgres(url, batches))

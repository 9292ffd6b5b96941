"""Building batches by hand, as a driver's writer would."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from llm_orchestrator.engine.acceptance import accepted_draft
from llm_orchestrator.model import Draft, Entry, Kind, NewRun, RunState
from llm_orchestrator.store.base import (
    Append,
    Batch,
    Change,
    Outcome,
    Receipt,
    StateChange,
    Store,
)
from llm_orchestrator.store.journal import GENESIS, encode, link
from llm_orchestrator.store.postgres import PostgresStore

START_US = 1_700_000_000_000_000
_numbers = itertools.count(1)


class HandClock:
    """Time moves when the test says so; ids count up."""

    def __init__(self, now_us: int = START_US) -> None:
        self.now = now_us
        self._bytes = 0

    def now_us(self) -> int:
        return self.now

    def monotonic(self) -> float:
        return self.now / 1e6

    async def sleep(self, seconds: float) -> None:
        self.now += int(seconds * 1e6)

    def chance(self) -> float:
        return 0.5

    def random_bytes(self, count: int) -> bytes:
        self._bytes += 1
        return self._bytes.to_bytes(count, "big")


def new_run(number: int | None = None, **values: object) -> NewRun:
    """A run to accept; ids sort by `number`."""
    number = next(_numbers) if number is None else number
    run = NewRun(f"00000000-0000-7000-8000-{number:012d}", "flow", "1", "ab" * 32)
    return replace(run, **values)  # type: ignore[arg-type]


def draft(kind: str = Kind.STEP_FINISHED, step: str = "a", attempt: int = 1) -> Draft:
    return Draft(kind, step, attempt, encode({"result": step}))


class Writer:
    """One run's journal as its driver knows it: gives seqs and digests, remembers the head."""

    def __init__(self, run_id: str, *, epoch: int = 1 << 40) -> None:
        self.run_id = run_id
        self.epoch = epoch
        self.seq = 0
        self.digest = GENESIS

    def copy(self) -> Writer:
        """Somebody else who believes to be at the same place."""
        twin = Writer(self.run_id, epoch=self.epoch)
        twin.seq, twin.digest = self.seq, self.digest
        return twin

    def append(
        self,
        *drafts: Draft,
        accept: NewRun | None = None,
        change: StateChange | None = None,
        changes: Sequence[Change] = (),
    ) -> Append:
        """The next append, and this writer moves on as if it had landed."""
        prev_seq, prev_digest = self.seq, self.digest
        entries: list[Entry] = []
        for kind, step, attempt, payload in drafts:
            self.seq += 1
            columns = (self.seq, self.epoch, kind, step, attempt, payload)
            self.digest = link(self.digest, self.run_id, columns)
            entries.append(Entry(self.run_id, *columns, self.digest, START_US))
        return Append(
            self.run_id, prev_seq, prev_digest, tuple(entries), accept, change, tuple(changes)
        )


def accepting(run: NewRun, *, changes: Sequence[Change] = ()) -> tuple[Writer, Append]:
    """The acceptance of `run`, and who may go on from there."""
    writer = Writer(run.run_id)
    return writer, writer.append(accepted_draft(run), accept=run, changes=changes)


async def accepted(store: Store, run: NewRun | None = None) -> Writer:
    """A run that has been accepted."""
    writer, append = accepting(run or new_run())
    assert (await land(store, append)).refused == {}
    return writer


async def land(store: Store, *appends: Append, changes: Sequence[Change] = ()) -> Receipt:
    return await store.commit(Batch(appends, tuple(changes)))


async def outcome(store: Store, append: Append) -> Outcome:
    receipt = await land(store, append)
    return receipt.refused.get(append.run_id, Outcome.LANDED)


def claim(owner: str = "node-1") -> tuple[Draft, StateChange]:
    data = Draft(Kind.CLAIMED, "", 0, encode({"node": owner}))
    return data, StateChange(RunState.RUNNING, owner=owner)


def state(state: RunState, **values: object) -> tuple[Draft, StateChange]:
    data = Draft(Kind.STATE, "", 0, encode({"state": state, "event": "test"}))
    return data, StateChange(state, **values)  # type: ignore[arg-type]


async def moved(store: Store, writer: Writer, to: RunState, **values: object) -> None:
    """The run is put into a state."""
    entry, change = state(to, **values)
    assert await outcome(store, writer.append(entry, change=change)) is Outcome.LANDED


def batches_of(store: Store) -> list[Batch]:
    """Every batch that is committed from now on."""
    batches: list[Batch] = []
    commit = store.commit

    async def spy(batch: Batch) -> Receipt:
        batches.append(batch)
        return await commit(batch)

    store.commit = spy  # type: ignore[method-assign]
    return batches


def on_hand_clock(store: PostgresStore, clock: HandClock) -> None:
    """From now on the store's time is the test's, although its server has told another one."""
    store.clock._is_set = False
    store.clock.set(clock.now)

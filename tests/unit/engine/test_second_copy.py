"""Damage that the store alone cannot mend is mended from a copy that tells the same story."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest

from llm_orchestrator.engine.mend import Mender
from llm_orchestrator.engine.second_copy import StoreCopy
from llm_orchestrator.errors import StoreDamaged, StoreUnavailable
from llm_orchestrator.model import Entry, Kind, RunState
from llm_orchestrator.store.journal import BLOB_BYTES_MIN
from llm_orchestrator.store.memory import MemoryStore
from tests.store.support import HandClock
from tests.unit.engine.test_mend import Lab


def twin(lab: Lab) -> MemoryStore:
    """The store as it is now, elsewhere."""
    other = MemoryStore(HandClock(), node_id="twin")
    other.tables = copy.deepcopy(lab.store.tables)
    return other


class Away:
    name = "a copy that is away"

    async def entries(self, run_id: str) -> Sequence[Entry]:
        raise StoreUnavailable("no answer")


async def test_every_pair_of_rows_comes_back_from_a_copy() -> None:
    for first in range(1, 8):
        for second in range(first, 8):
            lab = Lab()
            await lab.finished()
            other = twin(lab)
            lab.mender = Mender(
                lab.store, lab.writer, copies=[Away(), StoreCopy("the twin", other.look)]
            )
            before = dict(lab.store.tables.journal)
            lab.damage(first)
            if second != first:
                lab.lose(second)
            state = await lab.mended()
            assert lab.store.tables.journal == before, (first, second)
            assert state.state is RunState.COMPLETED


@pytest.mark.parametrize("kept", range(2))
async def test_a_lost_end_comes_back_whole_though_the_row_of_runs_knows_its_beginning_only(
    kept: int,
) -> None:
    lab = Lab()
    await lab.half()
    before = dict(lab.store.tables.journal)
    row = await lab.store.look.row(lab.run_id)
    assert row is not None
    assert kept < row.head_seq < len(before)
    lab.mender = Mender(lab.store, lab.writer, copies=[StoreCopy("the twin", twin(lab).look)])
    for seq in range(kept + 1, len(before) + 1):
        lab.lose(seq)
    state = await lab.mended()
    assert lab.store.tables.journal == before
    assert set(state.finished) == {"a", "pay", "b"}


async def test_what_a_restore_has_taken_back_does_not_come_again() -> None:
    lab = Lab()
    await lab.half()
    lab.mender = Mender(lab.store, lab.writer, copies=[StoreCopy("the twin", twin(lab).look)])
    for seq in range(2, 7):
        lab.lose(seq)
    lab.store.generation += 1  # the copy tells of the time before
    plan = await lab.mender.plan(await lab.journal())
    assert [each.entry.seq for each in plan.found] == [2]


async def test_what_a_copy_has_behind_a_lost_end_gives_way_to_who_has_gone_on() -> None:
    lab = Lab()
    await lab.half()
    other = twin(lab)
    lab.mender = Mender(lab.store, lab.writer, copies=[StoreCopy("the twin", other.look)])
    for seq in range(2, 7):
        lab.lose(seq)
    plan = await lab.mender.plan(await lab.journal())
    assert plan.behind
    for seq in (2, 3):  # somebody else was faster, and has gone on
        lab.store.tables.journal[lab.run_id, seq] = other.tables.journal[lab.run_id, seq]
    lab.head.seq, lab.head.digest = 3, other.tables.journal[lab.run_id, 3].digest
    await lab.note(Kind.STEP_FINISHED, "other", 1, result="mine")
    journal = await lab.mender.mend(plan)
    assert journal.entries[3].step == "other"


async def test_without_a_copy_the_same_damage_costs_steps() -> None:
    lab = Lab()
    await lab.finished()
    lab.damage(3)
    state = await lab.mended()
    assert "a" not in state.finished


async def test_a_copy_that_is_behind_gives_what_it_has() -> None:
    lab = Lab()
    await lab.half()
    other = twin(lab)
    await lab.finish("c")
    lab.mender = Mender(lab.store, lab.writer, copies=[StoreCopy("a backup", other.look)])
    lab.damage(3)
    lab.damage(7)
    plan = await lab.mender.plan(await lab.journal())
    assert "from a backup: 3" in plan.summary()
    state = await lab.mended()
    assert "a" in state.finished
    assert "c" not in state.finished


async def test_a_copy_that_tells_another_story_is_not_believed() -> None:
    lab, stranger = Lab(), Lab(input={"n": 2})
    await lab.half()
    stranger.new = replace(stranger.new, run_id=lab.run_id)
    stranger.run_id = lab.run_id
    stranger.head.run_id = lab.run_id
    await stranger.half()
    lab.mender = Mender(lab.store, lab.writer, copies=[StoreCopy("a fork", stranger.store.look)])
    lab.damage(3)
    state = await lab.mended()
    assert "a" not in state.finished


async def test_a_first_entry_that_nobody_else_has_is_refused_and_a_copy_mends_it() -> None:
    lab = Lab()
    await lab.half()
    other = twin(lab)
    lab.damage(1)
    lab.store.tables.runs.clear()
    with pytest.raises(StoreDamaged):
        await lab.mender.plan(await lab.journal())
    lab.mender = Mender(lab.store, lab.writer, copies=[StoreCopy("a replica", other.look)])
    state = await lab.mended()
    assert set(state.finished) == {"a", "pay", "b"}


async def test_a_lost_blob_comes_back() -> None:
    lab = Lab()
    await lab.half()
    await lab.note(Kind.STEP_FINISHED, "big", 1, result="x" * (2 * BLOB_BYTES_MIN))
    other = twin(lab)
    lab.store.tables.blobs.clear()
    lab.mender = Mender(lab.store, lab.writer, copies=[StoreCopy("a backup", other.look)])
    state = await lab.mended()
    assert "big" in state.finished

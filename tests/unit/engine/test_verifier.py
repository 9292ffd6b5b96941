"""Damage that nobody has stumbled over is found by reading, at a bounded pace."""

from __future__ import annotations

from llm_orchestrator.engine.machine import Event
from llm_orchestrator.engine.mend import Mender
from llm_orchestrator.engine.second_copy import StoreCopy
from llm_orchestrator.engine.verifier import Verifier
from llm_orchestrator.telemetry.metrics import Metrics
from tests.unit.engine.test_mend import Lab
from tests.unit.engine.test_second_copy import twin


def made(lab: Lab, *, is_mine: bool = True, rate: float = 100.0) -> Verifier:
    return Verifier(
        lab.store,
        lab.mender,
        lab.clock,
        entries_per_s=rate,
        is_mine=lambda: is_mine,
        metrics=Metrics(),
    )


async def test_a_finished_run_that_nobody_reads_is_mended_from_a_copy() -> None:
    lab = Lab()
    await lab.finished()
    before = dict(lab.store.tables.journal)
    other = twin(lab)
    lab.mender = Mender(lab.store, lab.writer, copies=[StoreCopy("a twin", other.look)])
    verifier = made(lab)
    assert await verifier.round() == 0
    lab.damage(3)
    assert await verifier.round() == 1
    assert verifier.damaged == 1
    assert lab.store.tables.journal == before
    assert await verifier.round() == 0
    assert verifier.damaged == 0


async def test_it_keeps_its_pace() -> None:
    lab = Lab()
    await lab.finished()
    clock = lab.clock
    begun = clock.now_us()
    await made(lab, rate=0.1).round()
    assert clock.now_us() - begun == 70_000_000  # seven entries, one in ten seconds


async def test_a_run_that_is_driven_is_left_to_its_driver() -> None:
    lab = Lab()
    await lab.half()
    before = dict(lab.store.tables.journal)
    lab.damage(3)
    damaged = dict(lab.store.tables.journal)
    assert await made(lab).round() == 1
    assert lab.store.tables.journal == damaged != before
    await lab.happen(Event.RELEASE)


async def test_another_node_does_it() -> None:
    lab = Lab()
    await lab.finished()
    lab.damage(3)
    verifier = made(lab, is_mine=False)
    assert await verifier.round() == 0
    assert verifier.last_round_s == 0

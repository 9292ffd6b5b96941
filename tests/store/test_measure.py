"""Every commit is counted where it happens, whoever asked for it."""

from __future__ import annotations

import pytest

from llm_orchestrator.errors import StoreError
from llm_orchestrator.store.base import Outcome, PutRecord, Store
from llm_orchestrator.telemetry.metrics import Metrics
from tests.store.support import accepted, accepting, draft, land, new_run, outcome

pytestmark = pytest.mark.parametrize("store", ["sqlite", "postgres"], indirect=True)
"""The model counts nothing."""


@pytest.fixture
def metrics(store: Store) -> Metrics:
    found: Metrics = store.metrics  # type: ignore[attr-defined]
    return found


def commits(metrics: Metrics) -> dict[str, float]:
    return {labels[0]: value for labels, value in metrics.counters["commits_total"].values.items()}


async def test_what_lands_is_counted_with_its_entries_and_acceptances(
    store: Store, metrics: Metrics
) -> None:
    first, second = new_run(workflow="a"), new_run(workflow="b")
    writers, appends = zip(*(accepting(new) for new in (first, second)), strict=True)
    await land(store, *appends)
    assert await outcome(store, writers[0].append(draft(), draft())) is Outcome.LANDED
    assert commits(metrics) == {"landed": 2}
    assert metrics.counters["runs_accepted_total"].values == {("a",): 1, ("b",): 1}
    entries = metrics.histograms["commit_batch_entries"].seen[()]
    assert (sum(entries.counts), entries.total) == (2, 4)
    assert sum(metrics.histograms["commit_duration_seconds"].seen[()].counts) == 2


async def test_a_stale_owner_s_write_is_counted_as_fenced(store: Store, metrics: Metrics) -> None:
    writer = await accepted(store)
    stale = writer.copy()
    await land(store, writer.append(draft(step="a")))
    assert await outcome(store, stale.append(draft(step="b"))) is Outcome.FENCED
    assert metrics.counters["fenced_writes_total"].values == {(): 1}
    assert commits(metrics) == {"landed": 2, "refused": 1}


async def test_an_acceptance_that_is_refused_is_none(store: Store, metrics: Metrics) -> None:
    new = new_run(workflow="a")
    await accepted(store, new)
    _, append = accepting(new_run(workflow="a", run_id=new.run_id, priority=9))
    assert await outcome(store, append) is not Outcome.LANDED
    assert metrics.counters["runs_accepted_total"].values == {("a",): 1}
    assert metrics.counters["fenced_writes_total"].values == {(): 0}


async def test_a_record_that_moved_is_a_refused_commit(store: Store, metrics: Metrics) -> None:
    await land(store, changes=[PutRecord("kind", "key", 1, 0)])
    await land(store, changes=[PutRecord("kind", "key", 2, 0)])
    assert commits(metrics) == {"landed": 1, "refused": 1}


async def test_a_commit_that_fails_is_counted(
    store: Store, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise StoreError("as the test says")

    if hasattr(store, "_appliers"):
        monkeypatch.setattr(store._appliers[1], "apply", fail)
    else:
        monkeypatch.setattr(store, "_apply", fail)
    with pytest.raises(StoreError):
        await land(store, changes=[PutRecord("kind", "key", 1, 0)])
    assert commits(metrics) == {"failed": 1}

"""Questions to models are counted with what they cost, however they end."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import pytest

from llm_orchestrator import errors
from llm_orchestrator.model import Json, Usage
from llm_orchestrator.providers.base import EmbedResponse
from llm_orchestrator.providers.breaker import BreakerPolicy
from llm_orchestrator.providers.guard import Guarded, Guards
from llm_orchestrator.providers.measured import Measured, MeasuredEmbeddings
from llm_orchestrator.telemetry.metrics import Metrics
from tests.unit.providers.test_guard import ASK, CountingState, Model, StillClock


async def ignore(text: str) -> None:
    """Of no interest here."""


class Bench:
    """A measured model behind a breaker that opens at the third failure in a row."""

    def __init__(self) -> None:
        self.clock = StillClock()
        self.metrics = Metrics()
        self.model = Model()
        guards = Guards(
            clock=self.clock,
            shared=CountingState(),
            limits={},
            policy=BreakerPolicy(failures_max=3, open_s=2),
            metrics=self.metrics,
        )
        self.llm = Measured(Guarded(self.model, guards), self.clock, self.metrics)

    async def ask(self, error: BaseException | None = None) -> None:
        self.model.error = error
        await self.llm.complete(ASK, ignore, lambda handle: None)

    def counted(self, word: str) -> dict[tuple[str, ...], float]:
        return self.metrics.counters[word].values

    @property
    def timed(self) -> int:
        """How many durations there are."""
        seen = self.metrics.histograms["llm_request_duration_seconds"].seen
        return sum(sum(each.counts) for each in seen.values())


async def test_an_answer_is_counted_with_its_tokens() -> None:
    bench = Bench()
    await bench.ask()
    assert bench.counted("llm_requests_total") == {("p", "m", "ok"): 1}
    assert bench.counted("llm_tokens_total") == {("p", "m", "input"): 5, ("p", "m", "output"): 5}
    assert bench.timed == 1


async def test_a_failure_is_counted_by_its_kind_and_an_opening_of_the_breaker_once() -> None:
    bench = Bench()
    for _ in range(3):
        with pytest.raises(errors.ProviderTransient):
            await bench.ask(errors.ProviderTransient("down"))
    assert bench.counted("breaker_openings_total") == {("p",): 1}
    for _ in range(2):
        with pytest.raises(errors.ProviderUnavailable):
            await bench.ask()
    assert bench.counted("llm_requests_total") == {
        ("p", "m", "transient"): 3,
        ("p", "m", "unavailable"): 2,
    }
    assert bench.timed == 3, "what was not sent takes no time"
    assert bench.counted("llm_tokens_total") == {}
    assert bench.counted("breaker_openings_total") == {("p",): 1}
    bench.clock.now += 3
    with pytest.raises(errors.ProviderTransient):
        await bench.ask(errors.ProviderTransient("down"))
    assert bench.counted("breaker_openings_total") == {("p",): 2}


async def test_a_defect_and_a_question_that_is_given_up_are_told_apart() -> None:
    bench = Bench()
    with pytest.raises(ZeroDivisionError):
        await bench.ask(ZeroDivisionError())
    with pytest.raises(asyncio.CancelledError):
        await bench.ask(asyncio.CancelledError())
    assert bench.counted("llm_requests_total") == {
        ("p", "m", "defect"): 1,
        ("p", "m", "cancelled"): 1,
    }


class Vectors:
    """An embedding model."""

    name = "v"
    batch_size_max = 7

    async def embed(
        self,
        texts: Sequence[str],
        *,
        model: str,
        dimensions: int | None = None,
        extra: Mapping[str, Json] | None = None,
    ) -> EmbedResponse:
        assert (dimensions, extra) == (3, {"a": 1})
        return EmbedResponse([[0.0]] * len(texts), model, Usage(9, 0, 0, 0.5))

    async def close(self) -> None: ...


async def test_embeddings_are_counted_the_same_way() -> None:
    metrics = Metrics()
    measured = MeasuredEmbeddings(Vectors(), StillClock(), metrics)
    assert measured.batch_size_max == 7
    await measured.embed(["a", "b"], model="e", dimensions=3, extra={"a": 1})
    assert metrics.counters["llm_requests_total"].values == {("v", "e", "ok"): 1}
    assert metrics.counters["llm_cost_usd_total"].values == {("v", "e"): 0.5}

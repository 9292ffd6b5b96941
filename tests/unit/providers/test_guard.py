from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from llm_orchestrator import errors
from llm_orchestrator.model import Json, Usage
from llm_orchestrator.providers.base import LLMRequest, LLMResponse, OnChunk
from llm_orchestrator.providers.breaker import BreakerPolicy, Verdict
from llm_orchestrator.providers.guard import Guarded, Guards
from llm_orchestrator.providers.limits import Limit
from llm_orchestrator.providers.shared import MemoryState

ASK = LLMRequest(model="m", messages=[{"role": "user", "content": "hi"}], max_tokens=10)


class StillClock:
    """Time that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def now_us(self) -> int:
        return int(self.now * 1_000_000)

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds

    def chance(self) -> float:
        return 0.5

    def random_bytes(self, count: int) -> bytes:
        return bytes(count)


class Model:
    """A provider that does what the test says next."""

    name = "p"

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.calls = 0
        self.gate: asyncio.Event | None = None
        self.first = ""
        self.began = asyncio.Event()

    async def complete(
        self,
        request: LLMRequest,
        on_chunk: OnChunk,
        on_handle: Callable[[Mapping[str, Json]], None],
    ) -> LLMResponse:
        self.calls += 1
        self.began.set()
        if self.first:
            await on_chunk(self.first)
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        return LLMResponse("ok", "m", Usage(5, 5))

    async def close(self) -> None: ...


class CountingState(MemoryState):
    """Shared state that counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.gets = self.puts = 0
        self.is_down = False

    async def get(self, kind: str, key: str) -> tuple[Json, int]:
        self.gets += 1
        await asyncio.sleep(0)
        if self.is_down:
            raise errors.StoreError("gone")
        return await super().get(kind, key)

    async def put(self, kind: str, key: str, value: Json, *, version: int) -> bool:
        self.puts += 1
        if self.is_down:
            raise errors.StoreError("gone")
        return await super().put(kind, key, value, version=version)


class Bench:
    """A model behind its guards, on a still clock."""

    def __init__(self, **more: Any) -> None:
        self.clock: StillClock = more.get("clock") or StillClock()
        self.shared: CountingState = more.get("shared") or CountingState()
        self.model = Model()
        policy = BreakerPolicy(failures_max=3, open_s=2, open_s_max=60, wave_max=16)
        guards = Guards(
            clock=self.clock, shared=self.shared, limits=more.get("limits", {}), policy=policy
        )
        self.llm = Guarded(self.model, guards)

    async def ask(self) -> LLMResponse:
        async def ignore(text: str) -> None:
            pass

        return await self.llm.complete(ASK, ignore, lambda handle: None)

    async def fail(self, error: BaseException | None = None) -> None:
        self.model.error = error or errors.ProviderTransient("down")
        with pytest.raises((type(self.model.error), errors.ProviderOutage)):
            await self.ask()
        self.model.error = None

    async def failure(self, error: BaseException) -> BaseException:
        """What a caller is told when the provider does this."""
        self.model.error = error
        with pytest.raises(errors.ProviderError) as caught:
            await self.ask()
        self.model.error = None
        return caught.value


async def test_after_failures_in_a_row_nothing_is_sent_and_the_wait_is_told() -> None:
    bench = Bench()
    for _ in range(3):
        await bench.fail()
    with pytest.raises(errors.ProviderUnavailable) as caught:
        await bench.ask()
    assert bench.model.calls == 3
    assert caught.value.retry_after_s is not None
    assert 0 < caught.value.retry_after_s <= 2.1


async def test_another_node_and_a_restarted_one_know_the_verdict() -> None:
    bench = Bench()
    for _ in range(3):
        await bench.fail()
    other = Bench(shared=bench.shared, clock=bench.clock)
    with pytest.raises(errors.ProviderUnavailable):
        await other.ask()
    assert other.model.calls == 0


async def test_a_crowd_on_a_node_that_has_just_started_waits_for_its_first_look() -> None:
    bench = Bench()
    await bench.fail(errors.ProviderRateLimited("slow", retry_after_s=30))
    other = Bench(shared=bench.shared, clock=bench.clock)
    crowd = await asyncio.gather(*(other.ask() for _ in range(20)), return_exceptions=True)
    assert all(isinstance(each, errors.ProviderUnavailable) for each in crowd)
    assert other.model.calls == 0


async def test_nobody_is_sent_away_once_a_person_has_closed_it() -> None:
    bench = Bench()
    await bench.fail(errors.ProviderRateLimited("slow", retry_after_s=30))
    other = Bench(shared=bench.shared, clock=bench.clock)
    with pytest.raises(errors.ProviderUnavailable):
        await other.ask()
    _, version = await bench.shared.get("breaker", "p/m")
    assert await bench.shared.put("breaker", "p/m", Verdict().to_json(), version=version)
    bench.clock.now += 0.06  # less than a second: what is known would do for a call that passes
    crowd = await asyncio.gather(*(other.ask() for _ in range(20)), bench.ask())
    assert [each.text for each in crowd] == ["ok"] * 21


async def test_a_retry_after_stops_every_node_at_once() -> None:
    bench = Bench()
    await bench.fail(errors.ProviderRateLimited("slow", retry_after_s=30))
    other = Bench(shared=bench.shared, clock=bench.clock)
    with pytest.raises(errors.ProviderUnavailable) as caught:
        await other.ask()
    assert caught.value.retry_after_s == pytest.approx(30, abs=0.5)


async def test_those_who_are_refused_together_come_back_one_after_the_other() -> None:
    bench = Bench()
    await bench.fail(errors.ProviderRateLimited("slow", retry_after_s=30))
    waits = []
    for _ in range(100):
        with pytest.raises(errors.ProviderUnavailable) as caught:
            await bench.ask()
        waits.append(caught.value.retry_after_s or 0)
    assert waits == sorted(waits)
    assert len(set(waits)) == 100


async def test_it_comes_back_in_waves_and_closes() -> None:
    bench = Bench()
    for _ in range(3):
        await bench.fail()
    bench.clock.now += 10
    passed = []
    for _ in range(3):
        bench.model.gate = asyncio.Event()
        before = bench.model.calls
        tasks = [asyncio.create_task(bench.ask()) for _ in range(30)]
        for _ in range(200):
            await asyncio.sleep(0)
        passed.append(bench.model.calls - before)
        bench.model.gate.set()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert passed == [1, 4, 16]
    bench.model.gate = None
    before = bench.model.calls
    await asyncio.gather(*(bench.ask() for _ in range(20)))
    assert bench.model.calls - before == 20


async def test_a_cancelled_probe_does_not_keep_the_others_out() -> None:
    bench = Bench()
    for _ in range(3):
        await bench.fail()
    bench.clock.now += 10
    bench.model.gate = asyncio.Event()
    bench.model.began.clear()
    task = asyncio.create_task(bench.ask())
    await bench.model.began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    bench.model.gate = None
    assert (await bench.ask()).text == "ok"


@pytest.mark.parametrize(
    "error",
    [
        errors.ProviderInvalidRequest("bad"),
        errors.ProviderAuthentication("key"),
        errors.ProviderContentFiltered("no"),
        ValueError("a defect of ours"),
    ],
)
async def test_what_is_not_the_providers_trouble_does_not_open_it(error: Exception) -> None:
    bench = Bench()
    for _ in range(10):
        await bench.fail(error)
    assert (await bench.ask()).text == "ok"


async def test_the_hot_path_does_not_touch_the_store() -> None:
    bench = Bench(limits={"p": Limit(100_000, 10_000_000)})
    await bench.ask()
    gets, puts = bench.shared.gets, bench.shared.puts
    for _ in range(500):
        await bench.ask()
    assert (bench.shared.gets, bench.shared.puts) == (gets, puts)


async def test_a_store_that_is_gone_stops_nobody_and_the_breaker_still_works() -> None:
    bench = Bench(limits={"p": Limit(1000)})
    bench.shared.is_down = True
    assert (await bench.ask()).text == "ok"
    for _ in range(3):
        await bench.fail()
    with pytest.raises(errors.ProviderUnavailable):
        await bench.ask()


async def test_a_spent_limit_sends_nothing_and_tells_when_to_come() -> None:
    bench = Bench(limits={"p/m": Limit(requests_per_minute=2)})
    await bench.ask()
    await bench.ask()
    with pytest.raises(errors.ProviderUnavailable) as caught:
        await bench.ask()
    assert bench.model.calls == 2
    assert caught.value.retry_after_s == pytest.approx(30)
    bench.clock.now += 30
    assert (await bench.ask()).text == "ok"


async def test_two_nodes_share_one_limit() -> None:
    limits = {"p": Limit(requests_per_minute=10)}
    one = Bench(limits=limits)
    two = Bench(limits=limits, shared=one.shared, clock=one.clock)
    passed = 0
    for bench in (one, two) * 20:
        try:
            await bench.ask()
            passed += 1
        except errors.ProviderUnavailable:
            pass
    assert passed == 10


async def test_many_at_once_on_one_node_never_exceed_the_limit() -> None:
    bench = Bench(limits={"p": Limit(requests_per_minute=50)})
    answers = await asyncio.gather(*(bench.ask() for _ in range(200)), return_exceptions=True)
    assert sum(isinstance(answer, LLMResponse) for answer in answers) == 50
    assert bench.model.calls == 50


# --- whose failure it is ---


async def test_failures_before_the_breaker_opens_are_the_runs_own_and_later_ones_are_not() -> None:
    bench = Bench()
    told = [await bench.failure(errors.ProviderTransient("down")) for _ in range(3)]
    kinds = [isinstance(each, errors.ProviderOutage) for each in told]
    assert kinds == [False, False, True]
    assert isinstance(told[-1], errors.ProviderOutage)
    assert told[-1].breaker == "p/m"
    assert told[-1].retry_after_s == pytest.approx(2, abs=0.1)


async def test_while_most_calls_break_a_failure_is_the_providers_though_some_succeed() -> None:
    bench = Bench()
    for _ in range(30):  # what went well before keeps the share of failures small
        await bench.ask()
    told = []
    for _ in range(6):  # long answers break, short ones do not
        told += [await bench.failure(errors.ProviderTransient("cut")) for _ in range(2)]
        await bench.ask()
    kinds = [isinstance(each, errors.ProviderOutage) for each in told]
    assert bench.shared.puts == 0  # the breaker is closed all the time
    assert kinds == [False] * 3 + [True] * 9
    for _ in range(20):
        await bench.ask()
    told = [await bench.failure(errors.ProviderTransient("cut"))]
    assert type(told[0]) is errors.ProviderTransient  # it is trusted again


async def test_closed_again_it_is_doubted_until_calls_succeed() -> None:
    bench = Bench()
    for _ in range(3):
        await bench.fail()
    bench.clock.now += 20
    for _ in range(1 + 4 + 16):  # the waves: then it is closed
        await bench.ask()
    told = await bench.failure(errors.ProviderTransient("cut"))
    assert isinstance(told, errors.ProviderOutage)
    for _ in range(5):
        await bench.ask()
    told = await bench.failure(errors.ProviderTransient("cut"))
    assert type(told) is errors.ProviderTransient


async def test_who_asks_whether_it_is_back_pays_no_attempt_for_it() -> None:
    bench = Bench()
    for _ in range(3):
        await bench.fail()
    for pause_s in (2.5, 4.5, 8.5):
        bench.clock.now += pause_s
        told = await bench.failure(errors.ProviderTransient("down"))
        assert isinstance(told, errors.ProviderOutage)
    bench.clock.now += 20
    assert (await bench.ask()).text == "ok"


async def test_a_key_that_was_good_and_is_refused_is_an_outage() -> None:
    bench = Bench()
    await bench.ask()
    told = await bench.failure(errors.ProviderAuthentication("refused", status=401))
    assert isinstance(told, errors.ProviderOutage)
    other = Bench(shared=bench.shared, clock=bench.clock)
    with pytest.raises(errors.ProviderUnavailable):
        await other.ask()
    bench.clock.now += 2.5
    told = await other.failure(errors.ProviderAuthentication("refused", status=401))
    assert isinstance(told, errors.ProviderOutage)  # it was good for somebody
    bench.clock.now += 20
    assert (await other.ask()).text == "ok"


async def test_a_key_that_was_never_good_is_said_at_once() -> None:
    bench = Bench()
    for _ in range(5):
        told = await bench.failure(errors.ProviderAuthentication("refused", status=401))
        assert type(told) is errors.ProviderAuthentication
    assert (await bench.ask()).text == "ok"


async def test_what_may_have_been_done_is_never_called_an_outage() -> None:
    bench = Bench()
    told = [await bench.failure(errors.ProviderUnknownOutcome("cut")) for _ in range(3)]
    assert {type(each) for each in told} == {errors.ProviderUnknownOutcome}


async def test_a_wave_need_not_wait_for_the_ends_of_long_answers() -> None:
    bench = Bench()
    for _ in range(3):
        await bench.fail()
    bench.clock.now += 10
    bench.model.first = "the first word"
    bench.model.gate = asyncio.Event()
    answers, before = [], bench.model.calls
    for crowd, begun in ((1, 1), (4, 5), (16, 21)):  # nobody of an earlier wave has ended
        answers += [asyncio.create_task(bench.ask()) for _ in range(crowd)]
        for _ in range(200):
            await asyncio.sleep(0)
        assert bench.model.calls - before == begun
    bench.model.gate.set()
    assert {each.text for each in await asyncio.gather(*answers)} == {"ok"}


async def test_a_provider_that_breaks_off_every_answer_is_not_back() -> None:
    bench = Bench()
    for _ in range(3):
        await bench.fail()
    bench.model.first = "the first word"
    for pause_s in (2.5, 4.5, 8.5, 16.5):
        bench.clock.now += pause_s
        bench.model.gate = asyncio.Event()
        bench.model.error = errors.ProviderTransient("cut")
        calls = []
        for crowd in (1, 4, 16, 16, 16):
            calls += [asyncio.create_task(bench.ask()) for _ in range(crowd)]
            for _ in range(200):
                await asyncio.sleep(0)
        bench.model.gate.set()
        told = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(each, errors.ProviderUnavailable) for each in told)
    bench.clock.now += 40
    bench.model.error, bench.model.gate = None, None
    assert (await bench.ask()).text == "ok"

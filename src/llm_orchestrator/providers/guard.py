"""Stands before a provider: a breaker and a rate limit whose state every node shares.

A call that may not pass raises ProviderUnavailable before anything is sent, with the seconds after
which it is worth coming back; the engine parks the run and burns no attempt. Runs that are refused
together are told different times, so that they return in a row and not as a crowd. A call that was
sent and broke is none of its run's failures either once the breaker is open, or while most of what
has begun lately breaks (ProviderOutage): an outage may cut long answers and give short ones. A key
that is refused opens the breaker when it was good before: it was revoked, and will be replaced.

The hot path does not touch the store: the verdict is looked up once a second, a limit is spent from
a slice. Must never keep a place in a wave that it has no use for: every way out of a call settles.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import (
    ProviderAuthentication,
    ProviderError,
    ProviderOutage,
    ProviderTransient,
    ProviderUnavailable,
    ProviderUnknownOutcome,
)
from llm_orchestrator.model import MICROSECONDS, Json
from llm_orchestrator.providers import breaker, limits
from llm_orchestrator.providers.answers import estimate_tokens, prompt_tokens
from llm_orchestrator.providers.base import (
    EmbeddingProvider,
    EmbedResponse,
    LLMProvider,
    LLMRequest,
    LLMResponse,
    OnChunk,
    SharedState,
)
from llm_orchestrator.providers.breaker import Admission, BreakerPolicy, State, Tally, Verdict
from llm_orchestrator.providers.limits import Buckets, Limit, Slice
from llm_orchestrator.providers.shared import Cell
from llm_orchestrator.telemetry.metrics import Metrics

_FRESH_S = 1.0
_REFUSE_S = 0.05
"""Nobody is sent away on older news: a person may have closed the breaker."""
_RETURN_GAP_S = 0.02
_WAIT_S_MAX = 600.0
_ANSWER_TOKENS = 500
Begun = Callable[[], Awaitable[None]]
T = TypeVar("T")


class Returns:
    """Gives each refused run a time of its own to come back."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last = 0.0

    def book(self, wait_s: float, gap_s: float) -> float:
        """Seconds until this one's turn: after `wait_s`, and `gap_s` after the one before."""
        now = self._clock.monotonic()
        slot = max(now + wait_s, min(self._last + gap_s, now + wait_s + _WAIT_S_MAX))
        self._last = slot
        return slot - now


class SharedBreaker:
    """The breaker of one provider and model."""

    def __init__(
        self,
        key: str,
        *,
        clock: Clock,
        shared: SharedState,
        policy: BreakerPolicy,
        metrics: Metrics,
    ) -> None:
        self._key = key
        self._clock = clock
        self._policy = policy
        self._metrics = metrics
        self._cell = Cell(shared, "breaker", key)
        self._tally = Tally()
        self._read_at: float | None = None
        self._reading = asyncio.Lock()
        self._parsed: tuple[Json, Verdict] = (None, Verdict())
        self._returns = Returns(clock)
        self._was_good = False

    async def admit(self) -> int:
        """The wave that this call belongs to (0: closed). Raises ProviderUnavailable."""
        for fresh_s in (_FRESH_S, _REFUSE_S):
            await self._look(fresh_s)
            if self._verdict.state is State.CLOSED:
                self._tally = breaker.begun(self._tally)
                return 0
            answer: Admission = await self._change(
                lambda verdict: breaker.admit(verdict, self._now(), self._policy)
            )
            if answer.is_admitted:
                return answer.wave_id
        refusal = ProviderUnavailable(
            f"{self._key} is not asked at the moment: its breaker is {self._verdict.state}",
            provider=self._key,
            retry_after_s=self._returns.book(answer.wait_s, _RETURN_GAP_S),
        )
        refusal.breaker = self._key
        raise refusal

    async def succeed(
        self, wave_id: int, *, began: float | None = None, is_refusal: bool = False
    ) -> None:
        """The call that began at `began` (steady clock) was answered, if only with a refusal."""
        self._was_good |= not is_refusal
        if self._verdict.state is State.CLOSED:
            self._count(is_failure=False, began=began)
            return
        await self._change(
            lambda v: (breaker.succeed(v, self._now(), self._policy, wave_id=wave_id), None)
        )

    async def begin(self, wave_id: int) -> None:
        """The call begins to be answered."""
        await self._change(
            lambda v: (breaker.begin(v, self._now(), self._policy, wave_id=wave_id), None)
        )

    async def prove(self, wave_id: int) -> None:
        """The answer that had begun was whole."""
        self._was_good = True
        await self._change(lambda v: (breaker.prove(v, wave_id=wave_id), None))

    async def fail(self, wave_id: int, error: ProviderError) -> None:
        """The call broke, and another one might break as well.

        Raises ProviderOutage when that is certain, or when most of what has begun lately broke.
        """
        retry_after_s = error.retry_after_s
        is_open = self._verdict.state is State.CLOSED and (
            self._count(is_failure=True) or isinstance(error, ProviderAuthentication)
        )

        def step(verdict: Verdict) -> tuple[Verdict, None]:
            now = self._now()
            if is_open and verdict.state is State.CLOSED:
                policy = self._policy
                return breaker.open_(verdict, now, policy, retry_after_s=retry_after_s), None
            failed = breaker.fail(
                verdict, now, self._policy, wave_id=wave_id, retry_after_s=retry_after_s
            )
            return failed, None

        await self._change(step)
        if is_open:
            self._tally = breaker.opened(self._clock.monotonic(), self._policy)
        verdict = self._verdict
        if isinstance(error, ProviderUnknownOutcome):
            return
        if verdict.state is not State.CLOSED:
            raise self._outage(error, max(0.0, verdict.until - self._now())) from error
        if breaker.is_doubted(self._tally, self._policy):
            raise self._outage(error, self._policy.open_s_max) from error

    def means_outage(self, error: ProviderError) -> bool:
        """Whether an error says something of the provider, not of the request."""
        if isinstance(error, ProviderAuthentication):
            is_known_good = self._was_good or self._verdict.state is not State.CLOSED
            return is_known_good and self._policy.failures_max > 0
        return isinstance(error, ProviderTransient | ProviderUnknownOutcome)

    def _outage(self, error: ProviderError, wait_s: float) -> ProviderOutage:
        outage = ProviderOutage(
            error.message,
            provider=error.provider,
            status=error.status,
            retry_after_s=self._returns.book(wait_s, _RETURN_GAP_S),
            hint=error.hint,
        )
        outage.breaker = self._key
        return outage

    async def release(self, wave_id: int) -> None:
        """The call was given up: nothing is known of the provider."""
        if wave_id:
            await self._change(lambda v: (breaker.release(v, wave_id=wave_id), None))

    @property
    def _verdict(self) -> Verdict:
        if self._cell.value is not self._parsed[0]:
            self._parsed = (self._cell.value, Verdict.from_json(self._cell.value))
        return self._parsed[1]

    def _now(self) -> float:
        return self._clock.now_us() / MICROSECONDS

    def _count(self, *, is_failure: bool, began: float | None = None) -> bool:
        self._tally, is_open = breaker.count(
            self._tally,
            self._clock.monotonic(),
            is_failure=is_failure,
            policy=self._policy,
            began=began,
        )
        return is_open

    async def _look(self, fresh_s: float) -> None:
        is_known = self._read_at is not None
        if self._is_fresh(fresh_s) or (is_known and fresh_s == _FRESH_S and self._reading.locked()):
            return  # somebody is about to know more; what is known is good enough
        async with self._reading:
            if not self._is_fresh(fresh_s):
                now = self._clock.monotonic()
                await self._cell.read()
                self._read_at = now

    def _is_fresh(self, fresh_s: float) -> bool:
        at = self._read_at
        return at is not None and self._clock.monotonic() - at < fresh_s

    async def _change(self, change: Callable[[Verdict], tuple[Verdict, T]]) -> T:
        has_opened = False

        def step(value: Json) -> tuple[Json, T]:
            nonlocal has_opened
            before = Verdict.from_json(value)
            after, result = change(before)
            has_opened = after.state is State.OPEN and before.state is not State.OPEN
            return (value if after == before else after.to_json()), result

        result = await self._cell.change(step)
        if has_opened:
            provider = self._metrics.names(self._key.partition("/")[0])
            self._metrics.count("breaker_openings_total", provider)
        return result


class SharedLimiter:
    """One rate limit, spent in slices."""

    def __init__(self, key: str, *, clock: Clock, shared: SharedState, limit: Limit) -> None:
        self._key = key
        self._clock = clock
        self._limit = limit
        self._cell = Cell(shared, "limit", key)
        self._slice = Slice()
        self._returns = Returns(clock)

    async def take(self, tokens: float) -> None:
        """Pay one request and an estimate of tokens. Raises ProviderUnavailable."""
        if self._spend(tokens):
            return
        taken, wait = await self._cell.change(lambda value: self._refill(value, tokens))
        self._slice = limits.join(self._slice, taken, self._now()) if taken else self._slice
        if self._spend(tokens):
            return
        limit = self._limit
        gaps = (
            limits.MINUTE_S / limit.requests_per_minute if limit.requests_per_minute else 0.0,
            tokens * limits.MINUTE_S / limit.tokens_per_minute if limit.tokens_per_minute else 0.0,
        )
        raise ProviderUnavailable(
            f"the limit of {self._key} is spent: {limit.requests_per_minute or 'any'} requests"
            f" and {limit.tokens_per_minute or 'any'} tokens a minute",
            provider=self._key,
            retry_after_s=self._returns.book(wait, max(gaps)),
        )

    def settle(self, estimated: float, used: float) -> None:
        """Book what the request really used."""
        self._slice = limits.settle(self._slice, estimated=estimated, used=used)

    def _spend(self, tokens: float) -> bool:
        part = limits.spend(self._slice, self._now(), tokens=tokens, limit=self._limit)
        if part is not None:
            self._slice = part
        return part is not None

    def _refill(self, value: Json, tokens: float) -> tuple[Json, tuple[Slice | None, float]]:
        now = self._now()
        if limits.spend(self._slice, now, tokens=tokens, limit=self._limit) is not None:
            return value, (None, 0.0)
        shared = Buckets.from_json(value, self._limit, now)
        shared, part, wait = limits.cut_slice(
            shared, self._slice, now, tokens=tokens, limit=self._limit
        )
        return (value if part is None else shared.to_json()), (part, wait)

    def _now(self) -> float:
        return self._clock.now_us() / MICROSECONDS


@dataclass(frozen=True, slots=True)
class Permit:
    """Leave to make one call. `tokens` is what was paid for it in advance."""

    wave_id: int
    tokens: float
    began: float
    """On the steady clock."""


class Guard:
    """Breaker and limit of one provider and model."""

    def __init__(self, gate: SharedBreaker, limiter: SharedLimiter | None, clock: Clock) -> None:
        self._breaker = gate
        self._clock = clock
        self.limiter = limiter

    async def enter(self, tokens: float) -> Permit:
        """Ask to make a call of about so many tokens. Raises ProviderUnavailable."""
        wave_id = await self._breaker.admit()
        if self.limiter is not None:
            try:
                await self.limiter.take(tokens)
            except BaseException:
                await self._breaker.release(wave_id)
                raise
        return Permit(wave_id, tokens, self._clock.monotonic())

    async def call(
        self, tokens: float, ask: Callable[[Begun], Awaitable[T]], used: Callable[[T], float]
    ) -> T:
        """Make the call between asking for leave and settling, however it ends.

        Who comes back after an outage need not wait for whole answers: `ask` says when one begins.
        """
        permit = await self.enter(tokens)
        has_begun = False

        async def begun() -> None:
            nonlocal has_begun
            if permit.wave_id and not has_begun:
                has_begun = True
                await self._breaker.begin(permit.wave_id)

        try:
            answer = await ask(begun)
        except ProviderUnavailable:
            await self._breaker.release(permit.wave_id)
            raise
        except ProviderError as error:
            if self._breaker.means_outage(error):
                await self._breaker.fail(permit.wave_id, error)
            else:
                await self._breaker.succeed(permit.wave_id, began=permit.began, is_refusal=True)
            raise
        except BaseException:
            await self._breaker.release(permit.wave_id)
            raise
        if self.limiter is not None:
            self.limiter.settle(permit.tokens, used(answer))
        if has_begun:
            await self._breaker.prove(permit.wave_id)
        else:
            await self._breaker.succeed(permit.wave_id, began=permit.began)
        return answer


class Guards:
    """Makes the guards of a process, one for each provider and model that is asked."""

    def __init__(
        self,
        *,
        clock: Clock,
        shared: SharedState,
        limits: Mapping[str, Limit],
        policy: BreakerPolicy,
        metrics: Metrics | None = None,
    ) -> None:
        self._clock = clock
        self._shared = shared
        self._limits = limits
        self._policy = policy
        self._metrics = metrics or Metrics()
        self._guards: dict[str, Guard] = {}
        self._limiters: dict[str, SharedLimiter] = {}

    def limit(self, limits: Mapping[str, Limit]) -> None:
        """Other limits from now on; breakers stay as they are."""
        self._limits = limits
        self._limiters.clear()
        for key, guard in self._guards.items():
            provider, _, model = key.partition("/")
            guard.limiter = self._limiter(provider, model)

    def of(self, provider: str, model: str) -> Guard:
        """Return the guard of a provider's model. Models under one limit share its limiter."""
        key = f"{provider}/{model}"
        if key not in self._guards:
            gate = SharedBreaker(
                key,
                clock=self._clock,
                shared=self._shared,
                policy=self._policy,
                metrics=self._metrics,
            )
            self._guards[key] = Guard(gate, self._limiter(provider, model), self._clock)
        return self._guards[key]

    def _limiter(self, provider: str, model: str) -> SharedLimiter | None:
        found = limits.limit_for(self._limits, provider, model)
        if found is None:
            return None
        name, limit = found
        if name not in self._limiters:
            self._limiters[name] = SharedLimiter(
                name, clock=self._clock, shared=self._shared, limit=limit
            )
        return self._limiters[name]


class Guarded:
    """A language model behind its guards."""

    def __init__(self, inner: LLMProvider, guards: Guards) -> None:
        self.name = inner.name
        self._inner = inner
        self._guards = guards

    async def complete(
        self,
        request: LLMRequest,
        on_chunk: OnChunk,
        on_handle: Callable[[Mapping[str, Json]], None],
    ) -> LLMResponse:
        """Ask once, if that is allowed now. Raises ProviderUnavailable when it is not."""
        guard = self._guards.of(self.name, request.model)

        def ask(begun: Begun) -> Awaitable[LLMResponse]:
            async def show(text: str) -> None:
                await begun()
                await on_chunk(text)

            return self._inner.complete(request, show, on_handle)

        return await guard.call(
            prompt_tokens(request) + (request.max_tokens or _ANSWER_TOKENS),
            ask,
            lambda answer: answer.usage.input_tokens + answer.usage.output_tokens,
        )

    async def close(self) -> None:
        """Close the provider."""
        await self._inner.close()


class GuardedEmbeddings:
    """An embedding model behind its guards."""

    def __init__(self, inner: EmbeddingProvider, guards: Guards) -> None:
        self.name = inner.name
        self.batch_size_max = inner.batch_size_max
        self._inner = inner
        self._guards = guards

    async def embed(
        self,
        texts: Sequence[str],
        *,
        model: str,
        dimensions: int | None = None,
        extra: Mapping[str, Json] | None = None,
    ) -> EmbedResponse:
        """Embed, if that is allowed now. Raises ProviderUnavailable when it is not."""
        guard = self._guards.of(self.name, model)
        return await guard.call(
            sum(estimate_tokens(text) for text in texts),
            lambda _: self._inner.embed(texts, model=model, dimensions=dimensions, extra=extra),
            lambda answer: answer.usage.input_tokens,
        )

    async def close(self) -> None:
        """Close the provider."""
        await self._inner.close()

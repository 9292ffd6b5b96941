"""One run while this process drives it: the durable primitives that all workflow code stands on.

Everything a run does is one of these, each remembered by the key of its step:

- `perform`: do work until it succeeds or gives up, record the result, give back the recorded one;
- `sleep_until`: wait for a moment; `wait_message`: wait for somebody; both survive the process;
- `child`: start another run and wait for its end;
- `remember`: a value that must be the same at each replay.

A replayed key gives what the journal says and touches nothing. A step whose effect must not be
doubled (`once`) or that costs money records its attempt first; after a crash an open attempt is an
unknown outcome, and the step's policy says what happens (P9): never silently repeated, never
silently dropped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from llm_orchestrator.clock import Clock, derived_run_id
from llm_orchestrator.engine.failure import describe, is_retryable
from llm_orchestrator.engine.gate import NEVER, Gate
from llm_orchestrator.engine.heart import Heart
from llm_orchestrator.engine.machine import Event, Happening
from llm_orchestrator.engine.mailbox import Mailbox
from llm_orchestrator.engine.replay import Fold
from llm_orchestrator.engine.slots import Slots
from llm_orchestrator.errors import (
    ProviderOutage,
    ProviderUnavailable,
    ProviderUnknownOutcome,
    StepFailed,
    StepTimeout,
    Suspended,
)
from llm_orchestrator.language.code import CodeWorkflow
from llm_orchestrator.language.sandbox import aside
from llm_orchestrator.model import (
    MICROSECONDS,
    Draft,
    Effect,
    Json,
    Kind,
    Message,
    OnUnknown,
    Policy,
)
from llm_orchestrator.store.base import Batch, Change, Consume, Look, Receipt
from llm_orchestrator.store.journal import encode_clean, round_trip
from llm_orchestrator.store.writer import GroupWriter, Head
from llm_orchestrator.telemetry.metrics import Metrics
from llm_orchestrator.telemetry.propagation import UNTRACED

if TYPE_CHECKING:
    from llm_orchestrator.telemetry.tracing import Tracing

Work = Callable[[int], Awaitable[Json]]
"""Called with the attempt's number; returns JSON."""
Publish = Callable[[str, str, str, int, "dict[str, Json]"], None]
"""(run_id, what, step, attempt, data): told after the fact, for progress displays."""
CODE = "code"
"""The type of a step that is a function of a Python workflow, as metrics name it."""


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """A run that another run starts. `workflow` is a name, or a Python workflow of this process."""

    run_id: str
    parent_run_id: str
    step: str
    workflow: CodeWorkflow[Any] | str
    version: str | None
    inputs: Json


class Starter(Protocol):
    """Accepts a child run; the same id again changes nothing."""

    async def start_child(self, child: ChildSpec) -> None: ...


@dataclass(slots=True)
class Services:
    """What a node lends to the runs that it drives."""

    writer: GroupWriter
    look: Look
    commit: Callable[[Batch], Awaitable[Receipt]]
    clock: Clock
    slots: Slots
    starter: Starter
    publish: Publish | None = None
    tools: Callable[[], Any] | None = None
    """Step types and providers, made when a run first needs them (engine.interpreter.Tools)."""
    heart: Heart | None = None
    spent: Callable[[str, int], None] | None = None
    """Told of tokens that a run of a queue has used."""
    node_id: str = ""
    tracing: Tracing | None = None
    metrics: Metrics = field(default_factory=Metrics)

    def may_begin(self) -> bool:
        """True while this node's lease lets it begin something outside the store."""
        return self.heart is None or self.heart.holds()

    async def allowed(self) -> None:
        """Wait until it does."""
        if self.heart is not None and not self.heart.holds():
            await self.heart.held()


class Extras:
    """What a step's entries carry beside its result. Subclasses override what they need."""

    step_type = CODE

    def data(self) -> dict[str, Json]:
        """Usage and notes of the attempt that just ended."""
        return {}

    def changes(self) -> Sequence[Change]:
        """Changes of other tables that land with the result."""
        return ()

    async def probe(self) -> dict[str, Json] | None:
        """Was it done? {"result": ...} if so, None if surely not."""
        return None

    def interrupted(self) -> None:
        """The attempt is cancelled: what is already here of its answer is to be kept."""

    def before(self) -> None:
        """May refuse a paid attempt (budget spent) before its intent is recorded."""

    def respent(self) -> None:
        """The attempt that just ended had been made before: a crash hid what became of it."""


@dataclass(slots=True)
class _Job:
    """One step to perform."""

    key: str
    work: Work
    policy: Policy
    extras: Extras | None
    at: int
    began: float = 0.0
    """When the attempt began, on the steady clock."""


_UNKNOWN: dict[str, Json] = {
    "kind": "unknown_outcome",
    "message": "it may or may not have been done; its policy says to fail",
}


class _TryAgain(Exception):
    """An attempt ended without a result; the next one may start at `at_us`."""

    def __init__(self, attempt: int, at_us: int, *, breaker: str = "") -> None:
        super().__init__()
        self.attempt = attempt
        self.at_us = at_us
        self.breaker = breaker


class Execution:
    """See the module's docstring. Made by the node at claim, dropped when the run leaves."""

    def __init__(self, fold: Fold, head: Head, services: Services) -> None:
        self.run_id = fold.run_id
        self.fold = fold
        self.head = head
        self.services = services
        self.gate = Gate(fold.run_id, services.clock)
        self.mailbox = Mailbox(fold.run_id, services.look, fold.redeliver)
        self.requests: list[int] = []
        """Numbers of the requests that made the run stop; consumed by its closing entry."""
        self.trace = UNTRACED

    # -- work ----------------------------------------------------------------------------------

    async def perform(
        self, key: str, work: Work, policy: Policy, *, extras: Extras | None = None, at: int = -1
    ) -> Json:
        """The recorded result of step `key`; does the work if there is none.

        `at` is the call's place in its scope (Python workflows), recorded to notice divergence.
        Raises StepFailed once the attempts are spent.
        """
        if (done := self.fold.finished.get(key)) is not None:
            return done.result
        job = _Job(key, work, policy, extras, at)
        attempt, ready_at = _next_attempt(self.fold, key, self.services.clock.now_us())
        gate, breaker = self.gate, ""
        while True:
            if ready_at:
                await gate.wait_for_breaker(key, ready_at, breaker)
            if gate.stop is not None:
                await gate.hold()
            gate.enter()
            place = self.trace.enter(key, attempt, is_paid=policy.is_paid)
            job.began = self.services.clock.monotonic()
            try:
                return await self._attempt(job, attempt)
            except _TryAgain as again:
                attempt, ready_at, breaker = again.attempt, again.at_us, again.breaker
            except Suspended:
                ready_at = 0  # held above, while what is in flight beside it may end
            finally:
                self.trace.leave(place)
                gate.leave()

    async def _attempt(self, job: _Job, attempt: int) -> Json:
        key, policy = job.key, job.policy
        is_once = policy.effect is Effect.ONCE
        if is_once and self.fold.intents.pop(key, None) is not None:  # unknown once, then known
            found = await self._decide_unknown(job, attempt)
            if found is not None:
                return await self._finish(job, attempt, found["result"])
        try:
            if is_once or policy.is_paid:
                if job.extras is not None:
                    job.extras.before()
                intent: dict[str, Json] = {"key": self.idempotency_key(key)}
                await self.record(Kind.INTENT, key, intent, attempt=attempt)
            return await self._finish(job, attempt, await _worked(self.services, job, attempt))
        except Exception as error:
            if is_once and isinstance(error, ProviderUnknownOutcome | StepTimeout):
                found = await self._decide_unknown(job, attempt)
                if found is not None:
                    return await self._finish(job, attempt, found["result"])
            raise await self._fail(job, attempt, error) from error

    async def _finish(self, job: _Job, attempt: int, result: Json) -> Json:
        data: dict[str, Json] = {"result": result}
        extras = job.extras
        if job.at >= 0:
            data["at"] = job.at
        if extras is not None:
            data.update(extras.data())
        payload, recorded = round_trip(data)
        await self.services.writer.append(
            self.head,
            (Draft(Kind.STEP_FINISHED, job.key, attempt, payload),),
            changes=extras.changes() if extras is not None else (),
            is_paid=job.policy.is_paid or job.policy.effect is Effect.ONCE,
        )
        self.trace.finished(job.key, attempt)
        step_type = CODE if extras is None else extras.step_type
        self.services.metrics.step_done(step_type, self.services.clock.monotonic() - job.began)
        if extras is not None and self.fold.intents.get(job.key) == attempt:
            extras.respent()
        if self.services.publish is not None:
            self.publish("finished", job.key, recorded, attempt=attempt)
        return recorded["result"]

    async def _fail(self, job: _Job, attempt: int, error: Exception) -> Exception:
        """Record a failed attempt; returns what to raise: _TryAgain or StepFailed."""
        clock, key, retry = self.services.clock, job.key, job.policy.retry
        facts = describe(error)
        if isinstance(error, ProviderUnavailable):  # no fault of this step: no attempt is burnt
            self.publish("unavailable", key, facts, attempt=attempt)
            if job.policy.effect is Effect.ONCE or job.policy.is_paid:
                was_asked = isinstance(error, ProviderOutage)
                spent = job.extras.data() if was_asked and job.extras is not None else {}
                self.note(Kind.PROGRESS, key, {"unsent": attempt, **spent})  # closes the intent
            at_us = clock.now_us() + int((error.retry_after_s or 1.0) * MICROSECONDS)
            return _TryAgain(attempt, at_us, breaker=error.breaker)
        is_final = attempt >= retry.max_attempts or not is_retryable(error, retry)
        data: dict[str, Json] = {"error": facts, "final": is_final}
        if job.extras is not None:
            data.update(job.extras.data())
        after_us = int((getattr(error, "retry_after_s", None) or 0.0) * MICROSECONDS)
        delay_us = int(retry.delay_ms(attempt, clock.chance()) * 1000)
        if not is_final:
            data["next_at"] = clock.now_us() + max(delay_us, after_us)
        await self.record(Kind.ATTEMPT_FAILED, key, data, attempt=attempt)
        self.trace.failed(key, attempt, facts, is_final=is_final)
        self._count_failed(job, attempt, str(facts["kind"]), is_final=is_final)
        self.publish("failed", key, data, attempt=attempt)
        if is_final:
            return _step_failed(key, facts)
        return _TryAgain(attempt + 1, int(data["next_at"]))

    async def _decide_unknown(self, job: _Job, attempt: int) -> dict[str, Json] | None:
        """{"result": ...} when the effect is known to be done, None when it may be issued."""
        key = job.key
        decision = self.fold.decisions.pop(key, None)
        choice = str(decision["choose"]) if decision else job.policy.on_unknown.value
        if choice == "finished" and decision:
            return {"result": decision.get("result")}
        data: dict[str, Json] = {"step": key}
        if choice == OnUnknown.PROBE and job.extras is not None:
            try:
                return await job.extras.probe()
            except Exception as error:  # noqa: BLE001 (still unknown: a person decides)
                choice, data["probe"] = OnUnknown.ASK, describe(error)
        if choice == OnUnknown.RETRY:
            return None
        if choice == OnUnknown.ASK:
            self.gate.request_stop(Happening(Event.PAUSE, reason="unknown_outcome", data=data))
            raise Suspended(f"step {key} waits for a decision")
        facts = dict(_UNKNOWN)
        await self.record(
            Kind.ATTEMPT_FAILED, key, {"error": facts, "final": True}, attempt=attempt
        )
        self.trace.failed(key, attempt, facts, is_final=True)
        self._count_failed(job, attempt, str(facts["kind"]))
        raise _step_failed(key, facts)

    def _count_failed(self, job: _Job, attempt: int, kind: str, *, is_final: bool = True) -> None:
        """A failed attempt's entry is durable."""
        extras, services = job.extras, self.services
        step_type = CODE if extras is None else extras.step_type
        took_s = services.clock.monotonic() - job.began
        services.metrics.attempt_failed(step_type, kind, took_s, is_final=is_final)
        if extras is not None and self.fold.intents.get(job.key) == attempt:
            extras.respent()

    # -- waiting -------------------------------------------------------------------------------

    async def sleep_until(self, key: str, until_us: int, *, at: int = -1) -> None:
        """Wait for a moment on the store's clock, across restarts."""
        planned = self.fold.waits.get(key)
        if planned is None:
            data: dict[str, Json] = {"for": "timer", "until": until_us}
            self._begin_wait(key, data, at)
        else:
            until_us = int(planned["until"])
        if until_us > self.services.clock.now_us():
            await self.gate.wait(key, until_us)

    async def wait_message(
        self,
        key: str,
        name: str,
        *,
        timeout_s: float | None = None,
        complain: Callable[[Json], str | None] | None = None,
        at: int = -1,
    ) -> dict[str, Json]:
        """The message by `name` that belongs to `key`: {payload, by, timed_out}.

        `complain` may say what is wrong with a payload; such a message is recorded and dropped.
        """
        taken = self.fold.signals.get(key)
        if taken is not None:
            return taken
        until = self._plan_wait(key, name, timeout_s=timeout_s, at=at)
        while True:
            message = self.mailbox.take(name)
            if message is not None:
                complaint = await aside(partial(complain, message.payload)) if complain else None
                if complaint is None:
                    return await self._take(key, message)
                data: dict[str, Json] = {"refused": complaint, "payload": message.payload}
                await self._consume(Draft(Kind.PROGRESS, key, 0, encode_clean(data)), message)
                self.publish("refused", key, data)
            elif until <= self.services.clock.now_us():
                nothing = {"name": name, "payload": None, "by": None, "timed_out": True}
                await self._busy(self.record(Kind.SIGNAL, key, nothing))
                return nothing
            else:
                await self.gate.wait(key, until, self.mailbox.arrival())

    def _plan_wait(self, key: str, name: str, *, timeout_s: float | None, at: int) -> int:
        planned = self.fold.waits.get(key)
        if planned is not None:
            return int(planned["until"])
        until = NEVER
        if timeout_s is not None:
            until = self.services.clock.now_us() + int(timeout_s * MICROSECONDS)
        data: dict[str, Json] = {"for": "signal", "name": name, "until": until}
        self._begin_wait(key, data, at)
        return until

    def _begin_wait(self, key: str, data: dict[str, Json], at: int) -> None:
        """Record a wait, and say so once it is durable: an answer may come at once."""
        landed = self.note(Kind.WAITING, key, data, at=at)
        if self.services.publish is not None:
            landed.add_done_callback(lambda _: self.publish("waiting", key, data))

    async def _take(self, key: str, message: Message) -> dict[str, Json]:
        data: dict[str, Json] = {
            "name": message.name,
            "number": message.number,
            "payload": message.payload,
            "by": message.sender_key,
            "timed_out": False,
        }
        payload, recorded = round_trip(data)
        await self._consume(Draft(Kind.SIGNAL, key, 0, payload), message)
        self.publish("signal", key, recorded)
        return recorded

    async def _consume(self, draft: Draft, message: Message) -> None:
        consume = Consume(self.run_id, (message.number,))
        await self._busy(self.services.writer.append(self.head, (draft,), changes=(consume,)))

    async def _busy(self, work: Awaitable[None]) -> None:
        """Await a commit: the run must not park beside it, as if nothing were going on."""
        if self.gate.stop is not None:
            await work
            return
        self.gate.enter()
        try:
            await work
        finally:
            self.gate.leave()

    async def child(
        self,
        key: str,
        workflow: CodeWorkflow[Any] | str,
        inputs: Json,
        *,
        version: str | None = None,
        at: int = -1,
    ) -> dict[str, Json]:
        """Start a run of its own and wait for its end: {run_id, state, output, error}."""
        run_id = derived_run_id(self.run_id, key)
        if key not in self.fold.signals and key not in self.fold.waits:
            if self.gate.stop is not None:
                await self.gate.hold()
            self.gate.enter()
            try:
                spec = ChildSpec(run_id, self.run_id, key, workflow, version, inputs)
                await self.services.starter.start_child(spec)
            finally:
                self.gate.leave()
        taken = await self.wait_message(key, f"child:{run_id}", at=at)
        return {"run_id": run_id, **taken["payload"]}

    # -- entries -------------------------------------------------------------------------------

    def remember(self, key: str, value: Json, *, at: int = -1) -> Json:
        """`value`, or what was recorded as `key`. Durable before anything later of this run is."""
        if (done := self.fold.finished.get(key)) is not None:
            return done.result
        self.note(Kind.STEP_FINISHED, key, {"result": value}, at=at)
        return value

    def note(
        self, kind: Kind, key: str, data: dict[str, Json], *, at: int = -1
    ) -> asyncio.Future[None]:
        """Append without waiting. Entries of a run land in the order in which they are queued."""
        placed = {**data, "at": at} if at >= 0 else data
        return self.services.writer.append(self.head, (Draft(kind, key, 0, encode_clean(placed)),))

    async def record(
        self, kind: Kind, key: str, data: dict[str, Json], *, attempt: int = 0
    ) -> None:
        """Append and wait until it is durable."""
        draft = Draft(kind, key, attempt, encode_clean(data))
        await self.services.writer.append(self.head, (draft,))

    def idempotency_key(self, key: str) -> str:
        """Stable per run and step over attempts and takeovers; another after a rewind."""
        return f"{self.run_id}/{key}{self.fold.mark(key)}"

    def publish(self, what: str, key: str, data: dict[str, Json], *, attempt: int = 0) -> None:
        """Tell whoever watches. Never needed for correctness."""
        if self.services.publish is not None:
            self.services.publish(self.run_id, what, key, attempt, data)


def _step_failed(key: str, facts: dict[str, Json]) -> StepFailed:
    return StepFailed(
        f"step {key}: {facts['message']}",
        step=key,
        error_kind=str(facts["kind"]),
        hint=facts.get("hint"),
    )


def _next_attempt(fold: Fold, key: str, now_us: int) -> tuple[int, int]:
    """Which attempt is next, and when it may start, as the journal says. Raises StepFailed."""
    failure = fold.failures.get(key)
    if failure is None:
        return fold.intents.get(key, 1), 0
    if failure.is_final:
        raise _step_failed(key, failure.error)
    return failure.attempt + 1, 0 if failure.next_at <= now_us else failure.next_at


async def _worked(services: Services, job: _Job, attempt: int) -> Json:
    """Do the work once there is a slot for it and the lease allows it."""
    slots = services.slots
    await services.allowed()
    if not slots.take():
        await slots.wait()
    try:
        if job.policy.timeout_s is None:
            return await job.work(attempt)
        return await _within(job.policy.timeout_s, job.key, job.work(attempt))
    except asyncio.CancelledError:
        if job.extras is not None:
            job.extras.interrupted()
        raise
    finally:
        slots.give()


async def _within(timeout_s: float, key: str, work: Awaitable[Json]) -> Json:
    try:
        async with asyncio.timeout(timeout_s):
            return await work
    except TimeoutError as error:
        raise StepTimeout(f"step {key} took longer than its {timeout_s:g} s") from error

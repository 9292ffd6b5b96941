"""The workflows of a seed, and the provider that they call: it counts every request."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llm_orchestrator.engine.context import Context
from llm_orchestrator.errors import ProviderTransient, ProviderUnknownOutcome, RunFailed
from llm_orchestrator.language.code import CodeWorkflow, Step
from llm_orchestrator.model import Effect, Json, OnUnknown, Policy, Retry
from tests.simulation.oracle import Issue
from tests.simulation.wire import current

if TYPE_CHECKING:
    from tests.simulation.world import World

_RETRY = Retry(max_attempts=4, initial_delay_ms=50, max_delay_ms=400)


class Provider:
    """Answers after a while, sometimes not, and never the same."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.random = random.Random(seed)
        self.count = 0
        self.trouble = 0.0
        self.is_slow = False

    async def ask(self, run_id: str, step: str, request: str) -> Json:
        """One request. What it returns is recorded, and must be what is used from then on."""
        process = current()
        machine = self.world.machine_of(process)
        self.count += 1
        number = self.count
        issue = Issue(self.world.loop.now, process.name, machine.incarnation, run_id, step, request)
        self.world.oracle.issued(issue, lease_ends=machine.lease_ends)
        policy = self.world.oracle.policies.get(step, "")
        took_s = self.random.choice((0.002, 0.02, 0.2, 0.6)) * (3 if self.is_slow else 1)
        fate = self.random.random()
        await process.clock.sleep(took_s)
        if fate < self.trouble:
            raise ProviderTransient(f"request {number} failed, nothing was done")
        if fate < 1.4 * self.trouble and policy in ("ask", "retry", "fail"):
            raise ProviderUnknownOutcome(f"request {number} got no answer")
        return f"{step}-{number}"


def make_flows(world: World) -> list[CodeWorkflow[Any]]:
    """Every shape, on this world's provider."""
    return [*_plain(world, _maker(world)), *_waiting(world, _maker(world))]


def _maker(world: World) -> Callable[..., Any]:
    """Makes steps that ask this world's provider."""
    provider = world.provider

    def step(name: str, policy: str = "") -> Any:
        effect = Effect.ONCE if policy in ("ask", "retry", "fail") else Effect.REPEATABLE
        unknown = OnUnknown(policy) if effect is Effect.ONCE else OnUnknown.ASK
        made = Policy(retry=_RETRY, effect=effect, on_unknown=unknown, is_paid=policy == "paid")
        if policy:
            world.oracle.policies[name] = policy

        async def ask(run_id: str, *inputs: Any) -> Json:
            return await provider.ask(run_id, name, repr(inputs))

        return Step(ask, name, made, is_async=True)

    return step


def _plain(world: World, step: Callable[..., Any]) -> list[CodeWorkflow[Any]]:
    """Workflows that only work."""
    a, b, c = step("a"), step("b"), step("c", "paid")
    ask, retry, fail = step("e-ask", "ask"), step("e-retry", "retry"), step("e-fail", "fail")
    p0, p1, p2 = step("p0"), step("p1", "paid"), step("p2")

    async def sequence(ctx: Context, **_: Any) -> Json:
        one = await ctx.step(a, ctx.run_id)
        two = await ctx.step(b, ctx.run_id, one)
        three = await ctx.step(c, ctx.run_id, two)
        return {"a": one, "b": two, "c": three}

    async def parallel(ctx: Context, **_: Any) -> Json:
        run_id = ctx.run_id
        some = await ctx.gather(
            ctx.step(p0, run_id), ctx.step(p1, run_id), _pair(ctx, p2, b, run_id)
        )
        last = await ctx.step(c, run_id, some)
        return {"p0": some[0], "p1": some[1], "p2": some[2][0], "b": some[2][1], "c": last}

    async def effects(ctx: Context, **_: Any) -> Json:
        first = await ctx.step(a, ctx.run_id)
        asked = await ctx.step(ask, ctx.run_id, first)
        again = await ctx.step(retry, ctx.run_id, asked)
        never = await ctx.step(fail, ctx.run_id, again)
        return {"a": first, "e-ask": asked, "e-retry": again, "e-fail": never}

    async def planned(ctx: Context, **_: Any) -> Json:
        return {"a": await ctx.step(a, ctx.run_id)}

    return [
        CodeWorkflow(body, body.__name__, "1") for body in (sequence, parallel, effects, planned)
    ]


def _waiting(world: World, step: Callable[..., Any]) -> list[CodeWorkflow[Any]]:
    """Workflows that wait: for time, for a signal, for a child, for ever."""
    a, b, c = step("a"), step("b"), step("c", "paid")

    async def sleeper(ctx: Context, **_: Any) -> Json:
        first = await ctx.step(a, ctx.run_id)
        await ctx.sleep(0.3)
        second = await ctx.step(b, ctx.run_id, first)
        await ctx.sleep(2.5)
        return {"a": first, "b": second, "c": await ctx.step(c, ctx.run_id, second)}

    async def listener(ctx: Context, **_: Any) -> Json:
        first = await ctx.step(a, ctx.run_id)
        told = await ctx.wait_signal("go")
        second = await ctx.step(b, ctx.run_id, first, told)
        return {"a": first, "signal": told, "b": second}

    async def child(ctx: Context, **_: Any) -> Json:
        return {"a": await ctx.step(a, ctx.run_id)}

    inner = CodeWorkflow(child, "child", "1")

    async def parent(ctx: Context, **_: Any) -> Json:
        first = await ctx.step(b, ctx.run_id)
        try:
            done = await ctx.run(inner)
        except RunFailed as error:
            done = {"state": str(error.state)}
        return {"b": first, "child": done, "c": await ctx.step(c, ctx.run_id, first)}

    async def endless(ctx: Context, **_: Any) -> Json:
        await ctx.step(b, ctx.run_id)
        await ctx.wait_signal("never")

    bodies = (sleeper, listener, parent, endless)
    return [*(CodeWorkflow(body, body.__name__, "1") for body in bodies), inner]


async def _pair(ctx: Context, one: Any, two: Any, run_id: str) -> list[Json]:
    first = await ctx.step(one, run_id)
    return [first, await ctx.step(two, run_id, first)]

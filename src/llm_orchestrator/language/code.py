"""Workflows in Python: `@workflow` on an async function, `@step` on what it calls.

    @step(retry=Retry(max_attempts=5))
    async def fetch(url: str) -> str: ...

    @workflow
    async def digest(ctx: Context, urls: list[str]) -> str:
        pages = await ctx.gather(*(ctx.step(fetch, url) for url in urls))
        ...

The function may do anything that is deterministic; whatever is not goes through `ctx`. A workflow
is known by name and version: change what running runs would do differently, raise the version.
This module is imported by every user's code and therefore imports nothing heavy.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, Generic, ParamSpec, TypeVar, overload

from llm_orchestrator.model import Effect, OnUnknown, Policy, Retry

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Step(Generic[P, T]):
    """A function that `ctx.step` performs durably. Calling it directly just calls the function."""

    function: Callable[P, Awaitable[T] | T]
    name: str
    policy: Policy
    is_async: bool

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Awaitable[T] | T:
        return self.function(*args, **kwargs)

    def named(self, name: str) -> Step[P, T]:
        """The same step under another name in the journal."""
        return replace(self, name=name)


@dataclass(frozen=True)
class CodeWorkflow(Generic[T]):
    """A Python workflow. `function` takes a Context and the inputs."""

    function: Callable[..., Awaitable[T]]
    name: str
    version: str
    timeout_s: float | None = None
    queue: str = "default"

    @property
    def definition(self) -> bytes:
        """What the store keeps of it: name and version, so that a node knows what it needs."""
        return f'{{"kind":"python","name":"{self.name}","version":"{self.version}"}}'.encode()

    @property
    def digest(self) -> str:
        """Hex blake2b-256 of `definition`."""
        return blake2b(self.definition, digest_size=32).hexdigest()


@overload
def step(function: Callable[P, Awaitable[T]]) -> Step[P, T]: ...
@overload
def step(function: Callable[P, T]) -> Step[P, T]: ...
@overload
def step(
    *,
    name: str | None = None,
    retry: Retry | None = None,
    timeout_s: float | None = None,
    effect: Effect | str = Effect.REPEATABLE,
    on_unknown: OnUnknown | str = OnUnknown.ASK,
) -> Callable[[Callable[..., Any]], Step[..., Any]]: ...
def step(
    function: Callable[..., Any] | None = None,
    *,
    name: str | None = None,
    retry: Retry | None = None,
    timeout_s: float | None = None,
    effect: Effect | str = Effect.REPEATABLE,
    on_unknown: OnUnknown | str = OnUnknown.ASK,
) -> Any:
    """Make a function a step. Plain functions run in a thread, coroutine functions on the loop.

    `effect="once"` records each attempt before it is made; one that a crash leaves open follows
    `on_unknown` (retry, ask, fail). `timeout_s` limits one attempt.
    """
    policy = Policy(
        retry=retry or Retry(),
        timeout_s=timeout_s,
        effect=Effect(effect),
        on_unknown=OnUnknown(on_unknown),
    )

    def wrap(inner: Callable[..., Any]) -> Step[..., Any]:
        is_async = inspect.iscoroutinefunction(inner)
        return Step(inner, name or inner.__name__, policy, is_async)

    return wrap if function is None else wrap(function)


@overload
def workflow(function: Callable[..., Awaitable[T]]) -> CodeWorkflow[T]: ...
@overload
def workflow(
    *,
    name: str | None = None,
    version: str = "1",
    timeout_s: float | None = None,
    queue: str = "default",
) -> Callable[[Callable[..., Awaitable[Any]]], CodeWorkflow[Any]]: ...
def workflow(
    function: Callable[..., Awaitable[Any]] | None = None,
    *,
    name: str | None = None,
    version: str = "1",
    timeout_s: float | None = None,
    queue: str = "default",
) -> Any:
    """Make a coroutine function `f(ctx, ...)` a workflow. `timeout_s` limits a whole run."""

    def wrap(inner: Callable[..., Awaitable[Any]]) -> CodeWorkflow[Any]:
        return CodeWorkflow(inner, name or inner.__name__, version, timeout_s, queue)

    return wrap if function is None else wrap(function)

"""What a Python workflow sees: the durable primitives under plain names.

Every call has a place: its number within its scope (the workflow's body, or one branch of a gather
or map), given when it is *called*, so that the same code asks for the same steps at each replay.
The journal remembers which key was asked for at which place; another key there means that the code
has changed under a running run. Then the run pauses with reason `nondeterminism` and both sides
are shown.
"""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Awaitable, Callable, Iterable
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

from llm_orchestrator.engine.execution import Execution
from llm_orchestrator.errors import Diverged, RunFailed
from llm_orchestrator.language.code import CodeWorkflow, Step
from llm_orchestrator.language.code import step as make_step
from llm_orchestrator.model import MICROSECONDS, Json, RunState

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S")


class Scope:
    """One line of calls: how many there were, and how often each name occurred."""

    __slots__ = ("calls", "names", "prefix")

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.calls = 0
        self.names: dict[str, int] = {}


_scope: ContextVar[Scope] = ContextVar("llm_orchestrator_scope")


class Context:
    """Handed to a workflow function as its first argument. All waiting is durable."""

    def __init__(self, execution: Execution) -> None:
        self._execution = execution
        self._fold = execution.fold
        self._root = Scope("")
        self._asked: set[str] = set()

    @property
    def run_id(self) -> str:
        """The run's id."""
        return self._execution.run_id

    def step(
        self, function: Step[P, T] | Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> Awaitable[T]:
        """Perform a step: its recorded result if it has one, else do it and record the result.

        Raises StepFailed once its attempts are spent. The result is what JSON keeps of it.
        """
        step = function if isinstance(function, Step) else _plain_step(function)
        key, at = self._place(step.name)
        inner, is_async = step.function, step.is_async

        async def work(attempt: int) -> Any:
            if is_async:
                return await inner(*args, **kwargs)  # type: ignore[misc]
            return await asyncio.to_thread(inner, *args, **kwargs)

        return self._execution.perform(key, work, step.policy, at=at)

    def use(self, step_type: str, /, *, name: str | None = None, **config: Any) -> Awaitable[Any]:
        """Perform a built-in step type, as in a workflow file: its outputs by their natural names.

            answer = await ctx.use("llm", provider="openai", model="gpt-5", prompt="...")
            print(answer["text"])

        Retries, effects, prices, streaming and resume work as they do there. Raises StepFailed,
        and AuthorError for a configuration that does not fit the type.
        """
        key, at = self._place(name or step_type)
        return self._use(key, {**config, "type": step_type}, at=at)

    async def _use(self, key: str, config: dict[str, Any], *, at: int) -> Any:
        done = self._fold.finished.get(key)
        if done is not None:
            return done.result
        from llm_orchestrator.engine.use import use  # noqa: PLC0415 (pydantic and providers)

        return await use(self._execution, key, config, at=at)

    def sleep(self, seconds: float) -> Awaitable[None]:
        """Let time pass, also while the process is gone."""
        key, at = self._place("sleep")
        until = self._execution.services.clock.now_us() + int(seconds * MICROSECONDS)
        return self._execution.sleep_until(key, until, at=at)

    async def wait_signal(self, name: str, *, timeout_s: float | None = None) -> Json:
        """The payload of the next signal by `name`. Raises TimeoutError after `timeout_s`."""
        key, at = self._place(f"signal-{name}")
        taken = await self._execution.wait_message(key, name, timeout_s=timeout_s, at=at)
        if taken["timed_out"]:
            raise TimeoutError(f"no signal {name!r} within {timeout_s:g} s")
        return taken["payload"]

    def gather(self, *branches: Awaitable[Any]) -> Awaitable[list[Any]]:
        """Run branches at the same time; results in order. The first failure ends the others."""
        scope = self._scope()
        key = self._name(scope, "gather")
        return _all(
            [self._branch(f"{key}/{index}", branch) for index, branch in enumerate(branches)]
        )

    async def map(
        self,
        function: Callable[[S], Awaitable[T]],
        items: Iterable[S],
        *,
        max_concurrency: int = 0,
    ) -> list[T]:
        """`function(item)` for each item, at most `max_concurrency` at a time (0: all)."""
        scope = self._scope()
        key = self._name(scope, "map")
        limit = asyncio.Semaphore(max_concurrency) if max_concurrency else None

        async def one(index: int, item: S) -> T:
            if limit is None:
                return await self._branch(f"{key}/{index}", function(item))
            async with limit:
                return await self._branch(f"{key}/{index}", function(item))

        return await _all([one(index, item) for index, item in enumerate(items)])

    async def run(self, workflow: CodeWorkflow[T] | str, /, *args: Any, **kwargs: Any) -> T:
        """Run a child workflow to its end. Raises RunFailed when it ends failed or cancelled.

        A YAML workflow is given by its registered name and takes keyword inputs.
        """
        name = workflow if isinstance(workflow, str) else workflow.name
        key, at = self._place(f"run-{name}")
        done = await self._execution.child(key, workflow, pack_input(args, kwargs), at=at)
        if done["state"] != RunState.COMPLETED:
            raise RunFailed(
                f"child {name} ({done['run_id']}) ended {done['state']}",
                state=done["state"],
                error=done["error"],
                hint=f"llmo runs explain {done['run_id']}",
            )
        result: T = done["output"]
        return result

    def now(self) -> datetime.datetime:
        """The time, the same at each replay."""
        key, at = self._place("now")
        clock = self._execution.services.clock
        moment = self._execution.remember(key, clock.now_us(), at=at)
        return datetime.datetime.fromtimestamp(int(moment) / MICROSECONDS, tz=datetime.UTC)

    def random(self) -> float:
        """A random number in [0, 1), the same at each replay."""
        key, at = self._place("random")
        return float(self._execution.remember(key, self._execution.services.clock.chance(), at=at))

    def uuid(self) -> str:
        """A random uuid (version 4) as text, the same at each replay."""
        key, at = self._place("uuid")
        value = bytearray(self._execution.services.clock.random_bytes(16))
        value[6] = value[6] & 0x0F | 0x40
        value[8] = value[8] & 0x3F | 0x80
        text = value.hex()
        fresh = "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
        return str(self._execution.remember(key, fresh, at=at))

    def finish(self) -> None:
        """The function returned: a recorded step that nobody asked for means that it diverged."""
        for key in self._fold.order.values():
            if key not in self._asked:
                raise Diverged(
                    f"the journal records step {key!r}, which the code no longer asks for"
                )

    def _scope(self) -> Scope:
        return _scope.get(self._root)

    def _place(self, name: str) -> tuple[str, int]:
        """The key and place of the next call. Raises Diverged if the journal has another there."""
        scope = self._scope()
        key = self._name(scope, name)
        at = scope.calls
        scope.calls += 1
        if self._fold.order:
            recorded = self._fold.order.get((scope.prefix, at))
            if recorded is not None and recorded != key:
                where = f"call {at + 1}" + (f" in {scope.prefix}" if scope.prefix else "")
                raise Diverged(
                    f"{where}: the code asks for step {key!r}, the journal records {recorded!r}"
                )
            self._asked.add(key)
        return key, at

    @staticmethod
    def _name(scope: Scope, name: str) -> str:
        count = scope.names.get(name, 0) + 1
        scope.names[name] = count
        local = name if count == 1 else f"{name}#{count}"
        return f"{scope.prefix}/{local}" if scope.prefix else local

    async def _branch(self, prefix: str, branch: Awaitable[T]) -> T:
        token = _scope.set(Scope(prefix))
        try:
            return await branch
        finally:
            _scope.reset(token)


def pack_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Json:
    """A call's arguments as a run's input: a mapping alone stays itself."""
    if not args:
        return kwargs
    if len(args) == 1 and not kwargs and isinstance(args[0], dict):
        return args[0]
    return {"args": list(args), "kwargs": kwargs}


def unpack_input(value: Json) -> tuple[list[Any], dict[str, Any]]:
    """The inverse of `pack_input`: a mapping becomes keyword arguments."""
    if isinstance(value, dict):
        if set(value) == {"args", "kwargs"}:
            return value["args"], value["kwargs"]
        return [], value
    return [] if value is None else [value], {}


def _plain_step(function: Callable[..., Any]) -> Step[..., Any]:
    return make_step(function)


async def _all(branches: list[Any]) -> list[Any]:
    """Like asyncio.gather, but the others are cancelled and awaited when one fails."""
    tasks = [asyncio.ensure_future(branch) for branch in branches]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise

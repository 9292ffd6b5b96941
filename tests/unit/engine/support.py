"""The production engine on virtual time, in one thread: for tests that must not wait.

A `VirtualLoop` jumps to its next timer when nothing is ready, so an hour's backoff takes no time,
and a run that can never move ends the test instead of hanging it. The store is the real one on
SQLite, its two threads replaced by calls in place. Steps of type `work` are counted, and fail as
often as their definition says.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar
from unittest.mock import patch

from llm_orchestrator.clock import new_run_id
from llm_orchestrator.config import Config
from llm_orchestrator.engine.driver import NodeOptions
from llm_orchestrator.engine.interpreter import Tools
from llm_orchestrator.errors import ProviderError, ProviderTransient
from llm_orchestrator.language.base import BaseStep
from llm_orchestrator.language.code import CodeWorkflow
from llm_orchestrator.language.definition import Definition, registry
from llm_orchestrator.language.templates import Templates
from llm_orchestrator.model import Effect, Entry, Json, NewRun, Usage, Workflow
from llm_orchestrator.steps.base import Outputs, StepContext
from llm_orchestrator.steps.registry import StepTypes
from llm_orchestrator.store.journal import decode
from llm_orchestrator.store.sqlite import SQLiteStore
from llm_orchestrator.wire import Orchestrator
from tests.unit.steps.support import Shelf

T = TypeVar("T")
_lives = itertools.count(1)
HANG_S = 86_400.0
"""Virtual seconds after which a test counts as hung."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time passes only when nothing else can happen."""

    def __init__(self) -> None:
        super().__init__()
        self.passed = 0.0
        self._clock_resolution = 1e-6  # a float of a month's seconds knows no nanoseconds
        self._has_hung = False

    def time(self) -> float:
        return self.passed

    def _run_once(self) -> None:
        scheduled = self._scheduled  # type: ignore[attr-defined]
        while scheduled and scheduled[0]._cancelled:
            self._timer_cancelled_count -= 1
            heapq.heappop(scheduled)._scheduled = False
        if not self._ready and scheduled:  # type: ignore[attr-defined]
            self.passed = max(self.passed, scheduled[0]._when)
        if self.passed > HANG_S and not self._has_hung:
            self._has_hung = True
            raise TimeoutError("nothing happens any more: the test hangs")
        super()._run_once()  # type: ignore[misc]

    _timer_cancelled_count: int


class VirtualClock:
    """The loop's time, seeded chance."""

    START_US = 1_800_000_000_000_000

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self.offset_us = 0

    def now_us(self) -> int:
        return self.START_US + self.offset_us + int(self.monotonic() * 1e6)

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    async def sleep(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        handle = loop.call_later(seconds, _wake, future)
        try:
            await future
        finally:
            handle.cancel()

    def chance(self) -> float:
        return self._random.random()

    def random_bytes(self, count: int) -> bytes:
        return self._random.randbytes(count)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Inline:
    """A database thread that is none: work is done when it is asked for."""

    def __init__(self, name: str) -> None:
        self.name = name

    def submit(self, function: Callable[[], Any]) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        try:
            future.set_result(function())
        except Exception as error:  # noqa: BLE001 (carried to the caller, whatever it is)
            future.set_exception(error)
        return future

    def stop(self) -> None: ...


@contextmanager
def _inline_threads() -> Any:
    with (
        patch("llm_orchestrator.store.sqlite.DatabaseThread", Inline),
        patch("llm_orchestrator.store.sqlite_reader.DatabaseThread", Inline),
    ):
        yield


def virtually(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end on virtual time."""
    with _inline_threads(), asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)


class WorkStep(BaseStep):
    """Fails `fails` times, then returns `value`."""

    natural_outputs: ClassVar[tuple[str, ...]] = ("value",)
    type: Literal["work"] = "work"
    fails: int = 0
    value: Json = "done"
    takes: float = 0.0


class Work:
    """The leaf of `WorkStep`, and the ledger of its calls."""

    type: ClassVar[str] = "work"
    outputs: ClassVar[tuple[str, ...]] = ("value",)
    is_paid: ClassVar[bool] = True

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.times: dict[str, list[float]] = {}
        self.errors: dict[str, list[BaseException]] = {}
        """Step id to what it raises, one after the other, before it succeeds."""
        self.keys: list[str] = []
        self.running = 0
        self.running_max = 0
        self.seen: list[str] = []

    def effect(self, config: Any) -> Effect:
        return Effect.REPEATABLE

    async def execute(self, context: StepContext, config: Any) -> Outputs:
        self.calls[context.step] += 1
        self.seen.append(context.step)
        self.keys.append(context.idempotency_key)
        self.times.setdefault(context.step, []).append(context.clock.monotonic())
        self.running += 1
        self.running_max = max(self.running, self.running_max)
        try:
            if config.takes:
                await context.clock.sleep(config.takes)
            else:
                await asyncio.sleep(0)
        finally:
            self.running -= 1
        waiting = self.errors.get(context.step)
        if waiting:
            raise waiting.pop(0)
        if context.attempt <= config.fails:
            raise ProviderTransient(f"{context.step} fails")
        context.add_usage(Usage(1, 1, 0, 0.5))
        return {"value": config.value}


def definition(name: str = "flow", **fields: Any) -> Definition:
    """A definition built in memory; `work` is a step type."""
    context = {"step_types": registry({"work": WorkStep})}
    return Definition.model_validate({"name": name, **fields}, context=context)


def stored(made: Definition) -> Workflow:
    return Workflow(made.name, made.version, made.digest, made.canonical())


class Engine(Orchestrator):
    """The engine as `wire` builds it, with steps of type `work`."""

    def __init__(
        self,
        path: Path,
        *,
        clock: VirtualClock | None = None,
        work: Work | None = None,
        options: NodeOptions | None = None,
        workflows: tuple[CodeWorkflow[Any], ...] = (),
        store: SQLiteStore | None = None,
    ) -> None:
        self.events: list[tuple[str, str, str]] = []
        self.work = work or Work()
        clock = clock or VirtualClock()
        if store is None:  # a node of its own, although chance begins at the same seed
            store = SQLiteStore(path, node_id=f"life-{next(_lives)}", clock=clock)
        super().__init__(
            f"sqlite:///{path}",
            clock=clock,
            config=Config(data_dir=path.parent),
            options=options,
            workflows=workflows,
            store=store,
            publish=self._heard,
        )
        self._news: asyncio.Future[None] | None = None
        self.ended: tuple[str, Json] = ("", None)
        self.journal: list[Entry] = []

    def _heard(self, run_id: str, what: str, step: str, attempt: int, data: Any) -> None:
        self.events.append((run_id, what, step))
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    async def happens(self, what: str, step: str = "", *, times: int = 1) -> None:
        """Until the engine has published it so often, over all of its life."""

        def count() -> int:
            return sum(1 for _, said, key in self.events if (said, key) == (what, step))

        while count() < times:
            self._news = asyncio.get_running_loop().create_future()
            await self._news

    def _make_tools(self) -> Tools:
        async def close() -> None: ...

        self._tools = Tools(
            StepTypes(extra=(self.work,)),
            Templates(),
            Shelf(),
            lambda name: name,
            close,
            {"work": WorkStep},
        )
        return self._tools

    async def begin(self, made: Definition, inputs: Json = None, **options: Any) -> str:
        """Register a definition and start a run of it. Options are fields of NewRun."""
        kept = stored(made)
        self.node.flows.add_definition(kept)
        fields = {"queue": made.queue, "priority": made.priority, **options}
        run_id = fields.pop("run_id", None) or new_run_id(self.clock)
        new = NewRun(run_id, made.name, made.version, made.digest, input=inputs or {}, **fields)
        return await self.node.accept(new, register=kept)

    async def entries(self, run_id: str) -> list[Entry]:
        journal = (await self.store.look.load([run_id]))[run_id]
        assert list(journal.flaws) == []
        return list(journal.entries)

    async def kinds(self, run_id: str, kind: str) -> list[tuple[str, dict[str, Json]]]:
        """(step, payload) of every entry of a kind."""
        found = await self.entries(run_id)
        return [(entry.step, decode(entry.payload)) for entry in found if entry.kind == kind]


def provider_error(kind: type[ProviderError], **more: Any) -> ProviderError:
    return kind("as the test says", **more)

"""Runs a definition: each scope by its ready queue, leaves by `perform`, control steps by plan.

Nothing is remembered here. A step's result is in the journal or it is not; whatever a control step
says (its plan, its outputs) follows from its children, so a replay walks the same way and finds
each finished leaf recorded. Keys are paths: `summaries/3/summarise` is step `summarise` of item 3.

When a step fails for good, `fail_fast` starts nothing new, but what is in flight may end: its
result is paid for. `continue` goes on with whatever does not depend on the failure. Either way the
run fails.
"""

from __future__ import annotations

import asyncio
import datetime
from collections import ChainMap
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from llm_orchestrator.engine.attempt import Attempt
from llm_orchestrator.engine.execution import Execution
from llm_orchestrator.engine.flows import Flow
from llm_orchestrator.engine.graph import Graph
from llm_orchestrator.engine.leaf import Call, fail_leaf, perform_leaf
from llm_orchestrator.engine.probe import ask
from llm_orchestrator.errors import (
    AuthorError,
    OrchestratorError,
    StepFailed,
    StoreError,
    TemplateError,
)
from llm_orchestrator.language.base import BaseStep
from llm_orchestrator.language.definition import Definition, OutputSpec
from llm_orchestrator.language.definition import StepTypes as Schemas
from llm_orchestrator.language.graph import dependency_table
from llm_orchestrator.language.inputs import check_inputs
from llm_orchestrator.language.render import render_step
from llm_orchestrator.language.sandbox import aside
from llm_orchestrator.language.templates import Templates
from llm_orchestrator.model import MICROSECONDS, Json, Kind, StepState, Usage, Workflow
from llm_orchestrator.providers.base import Providers
from llm_orchestrator.steps.base import (
    Child,
    ChildRun,
    Outcome,
    Outputs,
    Plan,
    Signal,
    Timer,
)
from llm_orchestrator.steps.registry import StepTypes
from llm_orchestrator.steps.schema import find_problems

T = TypeVar("T")


@dataclass(slots=True)
class Tools:
    """What running definitions takes, shared by all runs of a process."""

    step_types: StepTypes
    templates: Templates
    providers: Providers
    resolve_secret: Callable[[str], str]
    close: Callable[[], Awaitable[None]]
    schemas: Schemas = field(default_factory=dict)


class BudgetSpent(AuthorError):
    """The run's budget allows no further paid call."""

    kind = "budget"


@dataclass(slots=True)
class Alarm:
    """Rings when a step of its scope, or of one around it, has failed for good."""

    around: Alarm | None = None
    has_rung: bool = False

    def rings(self) -> bool:
        """True when nothing new should start here."""
        return self.has_rung or (self.around is not None and self.around.rings())


@dataclass(slots=True)
class Names:
    """What templates see in one scope. Nested scopes see out; local ones are not seen into."""

    fixed: Mapping[str, Json]
    steps: Any
    outputs: Any
    alarm: Alarm = field(default_factory=Alarm)

    def inside(self, child: Child) -> Names:
        """The names of a child scope: shared ones write into the same table."""
        fixed = {**self.fixed, **child.names} if child.names else self.fixed
        alarm = Alarm(self.alarm)
        if child.is_shared:
            return Names(fixed, self.steps, self.outputs, alarm)
        return Names(fixed, ChainMap({}, self.steps), ChainMap({}, self.outputs), alarm)

    def all(self) -> dict[str, Json]:
        """As one mapping, for the templates. Not a copy: templates copy what they use."""
        return {**self.fixed, "steps": self.steps, "outputs": self.outputs}


@dataclass(slots=True)
class Place:
    """One scope while it runs: where its keys begin, what it sees, what failed in it."""

    prefix: str
    names: Names
    failures: list[StepFailed] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Evaluator:
    """`steps.base.Names`: expressions of a control step."""

    templates: Templates
    names: Names

    def evaluate(self, expression: str, extra: Mapping[str, Json] | None = None) -> Json:
        """`steps` in `extra` lies over the steps around, it does not replace them."""
        names = self.names.all()
        if extra:
            names.update(extra)
            if "steps" in extra:
                names["steps"] = ChainMap(dict(extra["steps"]), self.names.steps)
        return self.templates.evaluate(expression, names)


def definition_flow(stored: Workflow, tools: Tools) -> Flow:
    """A stored definition as something that a node can run."""
    definition = Definition.from_canonical(stored.definition, tools.schemas or None)

    async def body(execution: Execution) -> Json:
        return await Interpreter(execution, definition, tools).run()

    return Flow(
        definition.name,
        definition.version,
        stored.digest,
        body,
        timeout_s=definition.timeout_seconds,
        queue=definition.queue,
        priority=definition.priority,
        labels=definition.labels,
    )


class Interpreter:
    """One run of one definition in this process."""

    def __init__(self, execution: Execution, definition: Definition, tools: Tools) -> None:
        self._execution = execution
        self._definition = definition
        self._tools = tools
        limit = definition.concurrency
        self._limit = asyncio.Semaphore(limit) if limit else None
        self._spent = execution.fold.usage
        self._substitutes: dict[str, asyncio.Task[Outputs | None]] = {}

    async def run(self) -> Json:
        """The run's outputs. Raises StepFailed of the first step that failed.

        Inputs are checked here, too: children and schedules bring theirs without a caller to tell.
        """
        accepted = self._execution.fold.accepted
        created = self._execution.fold.created_at / MICROSECONDS
        inputs = check_inputs(self._definition, accepted["input"] or {})
        fixed = {
            "inputs": inputs,
            "input": inputs,
            "secrets": _Secrets(self._definition.secrets, self._tools.resolve_secret),
            "run": {
                "id": self._execution.run_id,
                "workflow": accepted["workflow"],
                "version": accepted["version"],
                "created_at": datetime.datetime.fromtimestamp(created, tz=datetime.UTC).isoformat(),
                "labels": accepted["labels"],
            },
        }
        names = Names(fixed, {}, {})
        failure = await self._scope(self._definition.steps, Place("", names))
        if failure is not None:
            raise failure
        return await self._outputs(names)

    async def _outputs(self, names: Names) -> Json:
        """What the `outputs` section says; without one, the outputs of steps nobody waits for."""
        if self._definition.outputs is None:
            table = dependency_table(self._definition.steps, self._tools.templates)
            needed = {need for needs in table.values() for need in needs}
            return {key: value for key, value in names.steps.items() if key not in needed}
        seen = names.all()
        result: dict[str, Json] = {}
        for name, output in self._definition.outputs.items():
            result[name] = await aside(partial(self._output, output, seen))
        return result

    def _output(self, output: OutputSpec, seen: Mapping[str, Json]) -> Json:
        try:
            return self._tools.templates.render(output.value, seen)
        except TemplateError:
            if not output.has_fallback:
                raise
            return self._tools.templates.render(output.fallback, seen)

    # -- scopes --------------------------------------------------------------------------------

    async def _scope(self, steps: Sequence[BaseStep], place: Place) -> StepFailed | None:
        """Run one list of steps; the first failure, if there was one."""
        graph = Graph(
            dependency_table(steps, self._tools.templates),
            run_if_skipped=[step.id for step in steps if step.on_skipped == "run"],
        )
        is_fail_fast = self._definition.on_failure == "fail_fast"
        by_id = {step.id: step for step in steps}
        substitutes = {step.fallback_id for step in steps if step.fallback_id}
        ended: asyncio.Queue[asyncio.Task[StepState]] = asyncio.Queue()
        running: dict[asyncio.Task[StepState], str] = {}
        try:
            while True:
                for step_id, reason in graph.take_ready():
                    if step_id in substitutes:
                        reason = reason or "no step needed it"
                    if is_fail_fast and place.names.alarm.rings():
                        continue
                    task = asyncio.create_task(self._step(by_id[step_id], place, reason))
                    task.add_done_callback(ended.put_nowait)
                    running[task] = step_id
                if not running:
                    if place.failures:
                        return place.failures[0]
                    return None if graph.is_done else _stopped(place.prefix)
                task = await ended.get()
                graph.end(running.pop(task), task.result())
        except BaseException:
            await _abandon(running)
            raise

    async def _step(self, step: BaseStep, place: Place, reason: str) -> StepState:
        key, names = place.prefix + step.id, place.names
        fold = self._execution.fold
        if not reason and key in fold.skipped:
            reason = fold.skipped[key]
        try:
            if not reason and step.condition is not None and not await self._is_wanted(step, names):
                reason = "its condition is false"
        except TemplateError as error:
            bound = await self._instead(step, place, _as_failure(key, error))
        else:
            if reason and key in self._substitutes:  # it was run already, in another's place
                return StepState.COMPLETED if step.id in names.steps else StepState.FAILED
            if reason:
                self._skip(key, reason, step.type)
                return StepState.SKIPPED
            bound = await self._try(step, place)
        if bound is None:
            return StepState.FAILED
        names.steps[step.id] = bound
        names.outputs[step.id] = step.first_output(bound)
        return StepState.COMPLETED

    async def _try(self, step: BaseStep, place: Place) -> Outputs | None:
        """The step's outputs, or those that stand for them; None when it has failed for good."""
        key = place.prefix + step.id
        try:
            return await self._bound(step, key, place.names)
        except StoreError:
            raise
        except OrchestratorError as error:
            return await self._instead(step, place, _as_failure(key, error))

    async def _instead(self, step: BaseStep, place: Place, failure: StepFailed) -> Outputs | None:
        """What `on_error` gives for a failed step's outputs; None when the failure stands."""
        if step.on_error == "continue":
            nothing: Outputs = dict.fromkeys(step.bound_names() or step.natural_names())
            return {**nothing, "error": failure.message}
        bound = await self._substitute(step, place) if step.fallback_id else None
        if bound is None:
            place.failures.append(failure)
            place.names.alarm.has_rung = True
        return bound

    async def _is_wanted(self, step: BaseStep, names: Names) -> bool:
        return await _aside(names, partial(self._tools.templates.is_true, step.condition or ""))

    def _skip(self, key: str, reason: str, step_type: str) -> None:
        if key not in self._execution.fold.skipped:
            self._execution.services.metrics.step_skipped(step_type)
            self._execution.note(Kind.STEP_SKIPPED, key, {"reason": reason})
            self._execution.publish("skipped", key, {"reason": reason})

    async def _substitute(self, step: BaseStep, place: Place) -> Outputs | None:
        """The outputs of the fallback step, run once however many steps fall back on it."""
        names = place.names
        other = self._definition.step(place.prefix + str(step.fallback_id))
        key = place.prefix + other.id
        if key not in self._substitutes:
            self._substitutes[key] = asyncio.create_task(self._try(other, place))
        bound = await self._substitutes[key]
        if bound is None:
            return None
        names.steps[other.id] = bound
        names.outputs[other.id] = other.first_output(bound)
        natural = {name: bound.get(name) for name in other.natural_names() or tuple(bound)}
        bound = await aside(partial(step.bind, natural, self._tools.templates))
        return {**dict.fromkeys(step.bound_names()), **bound}

    async def _bound(self, step: BaseStep, key: str, names: Names) -> Outputs:
        if self._tools.step_types.is_control(step.type):
            natural = await self._control(step, key, names)
        else:
            natural = await self._leaf(step, key, names)
        return await aside(partial(step.bind, natural, self._tools.templates))

    # -- leaves --------------------------------------------------------------------------------

    async def _leaf(self, step: BaseStep, key: str, names: Names) -> Outputs:
        done = self._execution.fold.finished.get(key)
        if done is not None:
            return dict(done.result)
        attempt = Attempt(
            self._execution,
            key,
            self._tools.providers,
            check_budget=self._check_budget,
            spend=self._spend,
            ask=self._probe(step, key),
        )
        attempt.step_type = step.type
        try:
            config = await _aside(names, partial(render_step, step, self._tools.templates))
        except TemplateError as error:
            return await fail_leaf(self._execution, attempt, error)
        leaf = self._tools.step_types.leaf(step.type)
        return await perform_leaf(self._execution, attempt, Call(leaf, config, self._limit))

    def _probe(
        self, step: BaseStep, key: str
    ) -> Callable[[], Awaitable[dict[str, Json] | None]] | None:
        probe = step.probe
        if probe is None:
            return None
        attempt = Attempt(self._execution, f"{key}/probe", self._tools.providers)
        return lambda: ask(probe, attempt, self._tools.step_types)

    def _spend(self, usage: Usage) -> None:
        self._spent = self._spent + usage

    def _check_budget(self) -> None:
        """Refuses a paid attempt once the budget is spent; calls in flight may overshoot it."""
        budget, spent = self._definition.budget, self._spent
        if budget is None:
            return
        tokens = spent.input_tokens + spent.output_tokens
        if budget.max_usd is not None and spent.cost_usd >= budget.max_usd:
            raise BudgetSpent(f"the budget of ${budget.max_usd:g} is spent (${spent.cost_usd:.4f})")
        if budget.max_tokens is not None and tokens >= budget.max_tokens:
            raise BudgetSpent(f"the budget of {budget.max_tokens} tokens is spent ({tokens})")

    # -- control steps -------------------------------------------------------------------------

    async def _control(self, step: BaseStep, key: str, names: Names) -> Outputs:
        control = self._tools.step_types.control(step.type)
        config = await _aside(names, partial(render_step, step, self._tools.templates))
        evaluator = Evaluator(self._tools.templates, _frozen(names))
        children: dict[str, Outcome] = {}
        waited: Json | None = None
        while True:
            plan = await aside(partial(control.plan, config, evaluator, children, waited=waited))
            if plan.error is not None:
                raise StepFailed(f"step {key}: {plan.error}", step=key, error_kind="control")
            if plan.outputs is not None:
                return plan.outputs
            if plan.wait is not None:
                waited = await self._wait(key, plan.wait)
            else:
                await self._children(Place(f"{key}/", names), plan, children)

    async def _wait(self, key: str, wait: Timer | Signal | ChildRun) -> dict[str, Json]:
        execution = self._execution
        if isinstance(wait, Timer):
            until = wait.until_us
            if until is None:
                until = execution.services.clock.now_us() + int((wait.seconds or 0) * MICROSECONDS)
            await execution.sleep_until(key, until)
            return {}
        if isinstance(wait, ChildRun):
            return await execution.child(key, wait.workflow, wait.inputs, version=wait.version)
        schema = wait.payload_schema
        return await execution.wait_message(
            key,
            f"approval:{key}" if wait.is_approval else wait.name,
            timeout_s=wait.timeout_s,
            complain=None if schema is None else lambda payload: _complaint(payload, schema),
        )

    async def _children(self, place: Place, plan: Plan, children: dict[str, Outcome]) -> None:
        """Run the plan's children that have not ended yet; stops early when one fails."""
        missing = (child for child in plan.children if child.key not in children)
        count = len(plan.children) - len(children)
        width = min(plan.max_concurrency or count, count)
        workers = [
            asyncio.create_task(self._work_off(missing, place, children)) for _ in range(width)
        ]
        try:
            for worker in workers:
                await worker
        except BaseException:
            await _abandon(workers)
            raise

    async def _work_off(
        self, missing: Generator[Child], place: Place, children: dict[str, Outcome]
    ) -> None:
        for child in missing:
            inside = place.names.inside(child)
            inner = Place(f"{place.prefix}{child.key}/", inside)
            failure = await self._scope(child.steps, inner)
            if failure is not None:
                children[child.key] = Outcome(StepState.FAILED, {}, failure.message)
                missing.close()  # nobody begins another
                return
            ids = {step.id for step in child.steps}
            outputs = {name: value for name, value in _own(inside).items() if name in ids}
            children[child.key] = Outcome(StepState.COMPLETED, outputs)


class _Secrets(Mapping[str, Json]):
    """`secrets.NAME`, looked up when a template asks for it, never kept."""

    def __init__(self, references: Mapping[str, str], resolve: Callable[[str], str]) -> None:
        self._references = references
        self._resolve = resolve

    def __getitem__(self, name: str) -> Json:
        return self._resolve(self._references[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._references)

    def __len__(self) -> int:
        return len(self._references)


def _own(names: Names) -> Mapping[str, Outputs]:
    """The steps of a local scope alone, or all of a shared one."""
    own: Mapping[str, Outputs] = (
        names.steps.maps[0] if isinstance(names.steps, ChainMap) else names.steps
    )
    return own


async def _aside(names: Names, work: Callable[[Mapping[str, Json]], T]) -> T:
    """What `work` makes of the names; on a thread they are a copy, for other steps go on ending."""
    return await aside(lambda: work(names.all()), lambda: partial(work, _frozen(names).all()))


def _frozen(names: Names) -> Names:
    """What a control step saw when it began: its plan must not change with its siblings."""
    return Names(names.fixed, dict(names.steps), dict(names.outputs))


def _as_failure(key: str, error: OrchestratorError) -> StepFailed:
    if isinstance(error, StepFailed):
        return error
    return StepFailed(
        f"step {key}: {error.message}", step=key, error_kind=error.kind, hint=error.hint
    )


def _complaint(payload: Json, schema: Mapping[str, Json]) -> str | None:
    problems = find_problems(payload, schema)
    return "; ".join(problems) if problems else None


def _stopped(prefix: str) -> StepFailed:
    """A scope that another scope's failure kept from going on."""
    return StepFailed(
        f"{prefix or 'the run'} did not go on: another step failed",
        step=prefix.rstrip("/"),
        error_kind="stopped",
    )


async def _abandon(tasks: Any) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

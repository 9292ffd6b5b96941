"""What can be wrong between the parts of a workflow: names, cycles, providers, templates.

Pure: a built definition in, issues out. Names are resolved as the engine will resolve them: steps
in `parallel` and `branch` are seen from outside by their ids; the inside of a `map` or `loop` is
its own; ids are unique over the whole file. Never evaluates a template with values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from llm_orchestrator.errors import ProviderError, StepTimeout, TemplateError
from llm_orchestrator.language.base import BaseStep
from llm_orchestrator.language.build import Broken, Built, Issue
from llm_orchestrator.language.compat import LOOP_NAMES, ROOTS, Loc
from llm_orchestrator.language.definition import Definition, InputSpec, Scope, walk
from llm_orchestrator.language.graph import Text, cycles, texts_of
from llm_orchestrator.language.inputs import check_default
from llm_orchestrator.language.lexer import KEYWORDS, is_template
from llm_orchestrator.language.names import Path, nearest
from llm_orchestrator.language.schedule import check_cron, check_timezone
from llm_orchestrator.language.secrets_check import check_secrets
from llm_orchestrator.language.steps import (
    KNOWN_ACTIONS,
    ActionStep,
    EmbedStep,
    LLMStep,
    MapStep,
    TransformStep,
    VectorSearchStep,
    VectorUpsertStep,
    WaitStep,
)
from llm_orchestrator.language.templates import Templates

KNOWN_PROVIDERS = ("openai", "anthropic", "local", "echo", "cohere")
KNOWN_DATABASES = ("sql", "qdrant", "pinecone")
_SECRET = re.compile(r"^(?:env:[A-Za-z_][A-Za-z0-9_]*|file:.+)$")


class Known(NamedTuple):
    """Names that exist outside the file."""

    providers: frozenset[str]
    databases: frozenset[str]


def validate(built: Built, *, templates: Templates, known: Known) -> list[Issue]:
    """Every issue between the parts of the definition."""
    return [*_Validator(built, templates, known).run(), *check_secrets(built, templates)]


class _Validator:
    def __init__(self, built: Built, templates: Templates, known: Known) -> None:
        self._definition = built.definition
        self._places = built.places
        self._templates = templates
        self._known = known
        self._issues: list[Issue] = []
        self._steps: dict[str, BaseStep] = {}
        self._scopes: dict[str, Scope] = {}

    def run(self) -> list[Issue]:
        definition = self._definition
        self._collect()
        for _, step, scope in walk(definition.steps):
            if step.id:
                self._step(step, scope)
        self._top(definition)
        for chain in cycles(definition.steps, self._templates):
            way = " -> ".join((*chain, chain[0]))
            self._say(self._place(self._steps[chain[0]]), f"these steps wait for each other: {way}")
        return self._issues

    def _say(self, loc: Loc, message: str, *, is_warning: bool = False) -> None:
        self._issues.append(Issue(loc, message, is_warning))

    def _place(self, step: BaseStep, *parts: str | int) -> Loc:
        return (*self._places.get(id(step), ()), *parts)

    def _collect(self) -> None:
        for _, step, scope in walk(self._definition.steps):
            if not step.id:
                continue
            if step.id in self._steps:
                loc = self._place(step, "id")
                self._say(loc, f"duplicate step id `{step.id}`; ids are unique over the whole file")
                continue
            self._steps[step.id] = step
            self._scopes[step.id] = scope

    def _step(self, step: BaseStep, scope: Scope) -> None:
        for number, name in enumerate(step.depends_on):
            self._depends_on(step, scope, name=name, number=number)
        if step.fallback_id is not None:
            self._fallback(step, scope, step.fallback_id)
        if isinstance(step, Broken):
            self._broken(step, scope)
            return
        for text in texts_of(step):
            self._text(text, self._place(step, *text.loc), step=step, scope=scope)
        self._output(step)
        self._retry(step)
        self._outside_names(step)
        self._particulars(step)

    def _broken(self, step: Broken, scope: Scope) -> None:
        """What can be said of a step that does not fit its type."""
        texts = [*Text.inside(step.data, ())]
        if isinstance(step.data.get("condition"), str):
            texts.append(Text(("condition",), step.data["condition"], is_expression=True))
        for text in texts:
            if text.loc[0] not in {"output", "expression", "condition"} or text.is_expression:
                self._text(text, self._place(step, *text.loc), step=step, scope=scope)
        provider = step.data.get("provider")
        if step.type in {"llm", "embed"} and isinstance(provider, str):
            self._provider(provider, self._place(step, "provider"))

    def _depends_on(self, step: BaseStep, scope: Scope, *, name: str, number: int) -> None:
        loc = self._place(step, "depends_on", number)
        if name == step.id:
            self._say(loc, f"step `{name}` waits for itself")
        elif name not in self._steps:
            self._say(loc, f"unknown step `{name}`{nearest(name, self._steps)}")
        else:
            why = self._hidden(name, step, scope)
            if why:
                self._say(loc, why)

    def _fallback(self, step: BaseStep, scope: Scope, name: str) -> None:
        loc = self._place(step, "on_error")
        siblings = [sibling.id for sibling in scope.siblings]
        if name == step.id:
            self._say(loc, f"step `{name}` cannot be its own fallback")
        elif name not in self._steps:
            self._say(loc, f"unknown fallback step `{name}`{nearest(name, self._steps)}")
        elif name not in siblings:
            self._say(loc, f"fallback step `{name}` must stand in the same list as `{step.id}`")

    def _hidden(self, name: str, step: BaseStep | None, scope: Scope) -> str | None:
        """Why `step` cannot see the step `name`, or None when it can."""
        target = self._scopes[name]
        around = {container.id for container in scope.containers}
        if name in around:
            return f"step `{name}` is not finished while its own steps run"
        if step is not None and step in target.containers:
            return f"step `{name}` is inside of `{step.id}` itself"
        for container in target.containers:
            if container.is_local and container.id not in around:
                kind = container.type
                return (
                    f"step `{name}` is inside of the {kind} `{container.id}`:"
                    f" use the outputs of `{container.id}`"
                )
        return None

    def _text(self, text: Text, loc: Loc, *, step: BaseStep | None, scope: Scope) -> None:
        problem = self._templates.check(text.text, is_expression=text.is_expression)
        if problem:
            what = "expression" if text.is_expression else "template"
            self._say(loc, f"the {what} {problem}")
            return
        local = _local_names(scope) | set(text.names)
        for path in sorted(self._templates.references(text.text, is_expression=text.is_expression)):
            if path[0] == "inputs" and path[1:2] and path[1] in text.inputs:
                continue
            problem = self._reference(path, local=local, step=step, scope=scope, inner=text.inner)
            if problem:
                self._say(loc, problem)

    def _reference(
        self, path: Path, *, local: set[str], step: BaseStep | None, scope: Scope,
        inner: BaseStep | None,
    ) -> str | None:  # fmt: skip
        root = path[0]
        if root in local:
            return None
        if root in {"steps", "outputs"}:
            return self._step_reference(path, step=step, scope=scope, inner=inner)
        if root == "inputs":
            declared = self._definition.inputs
            if declared is None or len(path) == 1 or path[1] in declared:
                return None
            return f"unknown input `{path[1]}`{nearest(path[1], declared)}"
        if root == "secrets":
            secrets = self._definition.secrets
            if len(path) == 1 or path[1] in secrets:
                return None
            return f"unknown secret `{path[1]}`{nearest(path[1], secrets)}"
        if root == "run":
            return None
        inputs = self._definition.inputs or {}
        if root in inputs:
            return f"unknown name `{root}`; did you mean `inputs.{root}`?"
        if root in self._steps:
            return f"unknown name `{root}`; did you mean `steps.{root}`?"
        return f"unknown name `{root}`{nearest(root, ROOTS | local)}"

    def _step_reference(
        self, path: Path, *, step: BaseStep | None, scope: Scope, inner: BaseStep | None
    ) -> str | None:
        if len(path) == 1:
            return None
        name = path[1]
        if name not in self._steps:
            return f"unknown step `{name}`{nearest(name, self._steps)}"
        if step is not None and name == step.id:
            return f"step `{name}` uses its own output"
        target = self._steps[name]
        is_inner = inner is not None and self._scopes[name].local is inner
        if not is_inner:
            why = self._hidden(name, step, scope)
            if why:
                return why
        if path[0] == "outputs" or len(path) == 2 or isinstance(target, Broken):
            return None
        names = (*target.bound_names(), *target.natural_names())
        if target.on_error == "continue":
            names = (*names, "error")
        if not target.natural_names() or path[2] in names:
            return None
        return f"step `{name}` has no output `{path[2]}`{nearest(path[2], names)}"

    def _output(self, step: BaseStep) -> None:
        natural = step.natural_names()
        if not natural or not step.output:
            return
        if not isinstance(step.output, Mapping):
            if len(step.output) > len(natural):
                known = ", ".join(natural)
                self._say(
                    self._place(step, "output", len(natural)),
                    f"`output` names {len(step.output)} outputs, but {step.type} has"
                    f" {len(natural)}: {known}",
                )
            return
        for name, source in step.output.items():
            loc = self._place(step, "output", name)
            if not is_template(source):
                if source not in natural:
                    hint = nearest(source, natural) or f"; it has {', '.join(natural)}"
                    self._say(loc, f"{step.type} has no output `{source}`{hint}")
            elif problem := self._templates.check(source):
                self._say(loc, f"the template {problem}")
            else:
                for path in sorted(self._templates.references(source)):
                    if path[0] not in {*natural, "result"}:
                        hint = nearest(path[0], (*natural, "result"))
                        self._say(loc, f"unknown name `{path[0]}` in `output`{hint}")

    def _retry(self, step: BaseStep) -> None:
        if step.retry is None:
            return
        kinds = _error_kinds()
        for name in step.retry.retry_on:
            close = nearest(name, kinds)
            if name not in kinds and close:
                self._say(
                    self._place(step, "retry", "retry_on"), f"unknown error kind `{name}`{close}"
                )
        if step.retry.initial_delay_ms > step.retry.max_delay_ms:
            loc = self._place(step, "retry")
            self._say(loc, "the initial delay is longer than the greatest one", is_warning=True)

    def _outside_names(self, step: BaseStep) -> None:
        if isinstance(step, LLMStep | EmbedStep):
            self._provider(step.provider, self._place(step, "provider"))
        if isinstance(step, LLMStep):
            for number, other in enumerate(step.fallback):
                self._provider(other.provider, self._place(step, "fallback", number, "provider"))
        if isinstance(step, VectorSearchStep | VectorUpsertStep) and not is_template(step.database):
            databases = self._known.databases
            if step.database not in databases:
                hint = nearest(step.database, databases) or f"; known are {_list(databases)}"
                loc = self._place(step, "database")
                self._say(loc, f"unknown vector database `{step.database}`{hint}")

    def _provider(self, name: str, loc: Loc) -> None:
        providers = self._known.providers
        if not is_template(name) and name not in providers:
            hint = nearest(name, providers) or f"; known are {_list(providers)}"
            self._say(loc, f"unknown provider `{name}`{hint}")

    def _particulars(self, step: BaseStep) -> None:
        """What only one type can have wrong."""
        if isinstance(step, ActionStep) and not step.is_known and not is_template(step.action):
            hint = nearest(step.action, KNOWN_ACTIONS, 0.75)
            message = (
                f"nobody here performs the action `{step.action}`: it goes to the outbox{hint}"
            )
            self._say(self._place(step, "action"), message, is_warning=True)
        if isinstance(step, ActionStep) and step.action == "publish" and "topic" not in step.free:
            message = "`publish` without `topic`: it goes to the outbox"
            self._say(self._place(step, "action"), message, is_warning=True)
        if isinstance(step, TransformStep):
            self._transform(step)
        if isinstance(step, MapStep) and step.item in ROOTS | KEYWORDS | {"index"}:
            self._say(self._place(step, "item"), f"`{step.item}` has a meaning already")
        if isinstance(step, WaitStep) and step.until and not is_template(step.until):
            problem = check_moment(step.until)
            if problem:
                self._say(self._place(step, "until"), problem)
        if step.on_unknown == "probe" and step.probe is None:
            self._say(self._place(step, "on_unknown"), "`on_unknown: probe` needs `probe`")

    def _transform(self, step: TransformStep) -> None:
        needs = {
            "map": ("expression",), "select": ("fields",), "template": ("template",),
            "format": ("template",), "extract": ("path", "pattern"),
            "filter": ("expression", "key"),
        }  # fmt: skip
        wanted = needs.get(step.function, ())
        if wanted and all(getattr(step, name) is None for name in wanted):
            choice = " or ".join(f"`{name}`" for name in wanted)
            self._say(self._place(step), f"transform {step.function} needs {choice}")

    def _top(self, definition: Definition) -> None:
        scope = Scope(definition.steps)
        for name, spec in (definition.outputs or {}).items():
            for text in texts_in(spec.value):
                self._text(text, ("outputs", name, *text.loc), step=None, scope=scope)
        for name, reference in definition.secrets.items():
            if not _SECRET.match(reference):
                message = f"secret `{name}` should be a reference, env:NAME or file:PATH"
                self._say(("secrets", name), message)
        for name, spec_in in (definition.inputs or {}).items():
            self._input(name, spec_in)
        schedule = definition.schedule
        if schedule is not None:
            for key, problem in (
                ("cron", check_cron(schedule.cron)),
                ("timezone", check_timezone(schedule.timezone)),
            ):
                if problem:
                    self._say(("schedule", key), problem)

    def _input(self, name: str, spec: InputSpec) -> None:
        if spec.pattern is not None:
            try:
                re.compile(spec.pattern)
            except re.error as error:
                self._say(("inputs", name, "pattern"), f"the pattern does not parse: {error}")
                return
        if spec.min is not None and spec.max is not None and spec.min > spec.max:
            self._say(("inputs", name, "min"), "`min` is greater than `max`")
        for problem in check_default(spec):
            self._say(("inputs", name, "default"), f"the default {problem}")


def texts_in(value: Any) -> Iterator[Text]:
    """The templates inside a JSON value."""
    return Text.inside(value, ())


def check_moment(text: str) -> str | None:
    """Why a text is no moment that `wait.until` knows."""
    from datetime import datetime  # noqa: PLC0415 (only for this check)

    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return f"`until` should be an ISO time such as 2027-01-31T09:00:00+00:00, not {text!r}"
    return None if moment.tzinfo else "`until` needs a time zone: write +00:00, or Z for UTC"


def _local_names(scope: Scope) -> set[str]:
    names: set[str] = set()
    for container in scope.containers:
        if isinstance(container, MapStep):
            names |= {container.item, "index"}
        elif container.type == "loop":
            names |= set(LOOP_NAMES)
        elif container.is_local:
            names |= {"item", "index", *LOOP_NAMES}
    return names


def _error_kinds() -> set[str]:
    kinds = {StepTimeout.kind, TemplateError.kind}
    stack: list[type[ProviderError]] = [ProviderError]
    while stack:
        cls = stack.pop()
        kinds.add(cls.kind)
        stack.extend(cls.__subclasses__())
    return kinds


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))

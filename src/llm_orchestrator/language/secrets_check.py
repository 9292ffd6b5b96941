"""Secrets that stand in a workflow file, or that would be recorded on their way.

A file says where a secret is (`secrets: {name: env:NAME}`) and never what it is. Looked at are the
names of parameters, headers and parts of addresses. Pure: it resolves nothing, and no message
holds a value.

An input is no reference: the journal keeps it in clear, so a secret may not come from there. What a
step gives is kept in clear, too; but a token that a step has just fetched can come from nowhere
else, so that is a warning. So is a literal deeper inside of data, where a name may mean anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from llm_orchestrator.errors import TemplateError
from llm_orchestrator.language.base import BaseStep, Part
from llm_orchestrator.language.build import Broken, Built, Issue
from llm_orchestrator.language.compat import Loc
from llm_orchestrator.language.definition import Definition, walk
from llm_orchestrator.language.graph import Text, rendered_fields, texts_of
from llm_orchestrator.language.lexer import is_template
from llm_orchestrator.language.steps import ActionStep
from llm_orchestrator.language.templates import Templates

_SECRET = re.compile(
    r"(?:.*[-_])?(?:authorization|cookie|(?:api|access|private|secret|signing)[-_]?key|secret"
    r"|token|password|passwd|passphrase|credentials?)$",
    re.IGNORECASE,
)
_HARMLESS = re.compile(
    r"(?:.*[-_])?(?:page|next|prev|previous|continuation|sync|start|stop|end|first|last"
    r"|eos|bos|pad|unk|mask)"
    r"[-_]?token$",
    re.IGNORECASE,
)
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_ADDRESS = re.compile(r"(?:.*_)?(?:url|uri|dsn|endpoint|address)$", re.IGNORECASE)
_PASSWORD = re.compile(r"^\s*[A-Za-z][\w+.-]*://[^/?#:@]*:(?P<value>[^/?#]*)@")
_OPTION = re.compile(r"[?&](?P<name>[\w.-]+)=(?P<value>[^&#]*)")
_OUTBOX = frozenset({"notify", "publish"})
_CONTAINERS = ("parameters", "headers")
_WORDS = frozenset({"response_schema", "tools", "form", "messages", "metadata"})
"""They describe data, or hold talk: a name in them is no parameter's."""


def check_secrets(built: Built, templates: Templates) -> Iterator[Issue]:
    """Every secret that stands in clear, or would be recorded in clear or be lost."""
    for _, step, _ in walk(built.definition.steps):
        place = built.places.get(id(step), ())
        for loc, message, is_warning in _of_step(step, templates):
            yield Issue((*place, *loc), message, is_warning)
    yield from _of_top(built.definition, templates)


def names_a_secret(name: str) -> bool:
    """True for the name of a parameter or header whose value is a secret."""
    plain = _HUMP.sub("_", name)
    return bool(_SECRET.match(plain)) and not _HARMLESS.match(plain)


def _of_step(step: BaseStep, templates: Templates) -> Iterator[Issue]:
    fields = step.data if isinstance(step, Broken) else rendered_fields(step)
    if step.type == "transform":
        yield from _lost(Text.inside(dict(fields), ()), "what a transform gives", templates)
        return
    yield from _of_fields(fields, (), templates)
    if step.probe is not None and step.probe.url is not None:
        yield from _of_address(step.probe.url, ("probe", "url"), templates)
    if isinstance(step, Broken):
        return
    if step.type == "workflow":
        inputs = Text.inside(fields.get("inputs"), ("inputs",))
        yield from _lost(inputs, "a run's input", templates, is_warning=False)
    elif isinstance(step, ActionStep) and (not step.is_known or step.action in _OUTBOX):
        yield from _lost(texts_of(step), "what goes to the outbox", templates)


def _of_fields(fields: Mapping[str, Any], loc: Loc, templates: Templates) -> Iterator[Issue]:
    """The parameters of a step, or of one of its containers."""
    for name, value in fields.items():
        here = (*loc, name)
        if isinstance(value, Mapping):
            if name in _CONTAINERS:
                yield from _of_fields(value, here, templates)
            elif name not in _WORDS:
                yield from _of_data(value, here)
        elif name == "fallback" and isinstance(value, list | tuple):
            for number, each in enumerate(value):
                if isinstance(each, Mapping | Part):
                    yield from _of_fields(dict(each), (*here, number), templates)
        elif names_a_secret(name):
            yield from _judge(name, value, here, templates=templates)
        elif isinstance(value, str) and _ADDRESS.match(_HUMP.sub("_", name)):
            yield from _of_address(value, here, templates)
        elif isinstance(value, list | tuple) and name not in _WORDS:
            yield from _of_data(value, here)


def _of_data(value: Any, loc: Loc) -> Iterator[Issue]:
    """What is sent or handed on: a name may mean anything there."""
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
    for name, each in pairs:
        if isinstance(each, Mapping | list | tuple):
            yield from _of_data(each, (*loc, name))
        elif isinstance(name, str) and names_a_secret(name) and _is_literal(each):
            yield Issue((*loc, name), f"`{name}` may be a secret in clear; {_how(name)}", True)


def _of_address(text: str, loc: Loc, templates: Templates) -> Iterator[Issue]:
    found = _PASSWORD.match(text)
    if found is not None:
        yield from _judge("password", found["value"], loc, templates=templates)
    for option in _OPTION.finditer(text):
        if names_a_secret(option["name"]):
            yield from _judge(option["name"], option["value"], loc, templates=templates)


def _of_top(definition: Definition, templates: Templates) -> Iterator[Issue]:
    for name, spec in (definition.inputs or {}).items():
        if names_a_secret(name) and _is_literal(spec.default):
            message = f"the default of `{name}` may be a secret in clear, and runs record it"
            yield Issue(("inputs", name, "default"), f"{message}; {_how(name)}", True)
    if definition.schedule is not None:
        yield from _of_data(definition.schedule.inputs or {}, ("schedule", "inputs"))
    for name, output in (definition.outputs or {}).items():
        yield from _lost(Text.inside(output.value, ("outputs", name)), "a run's output", templates)


def _judge(name: str, value: Any, loc: Loc, *, templates: Templates) -> Iterator[Issue]:
    """`value` stands where a secret belongs."""
    if _is_literal(value):
        yield Issue(loc, f"`{name}` is a secret in clear; {_how(name)}")
        return
    if not is_template(value):
        return
    paths = sorted(_paths(Text(loc, value), templates))
    roots = {path[0] for path in paths}
    if "secrets" in roots:
        return
    if not paths:
        yield Issue(loc, f"`{name}` is a secret in clear; {_how(name)}")
    elif "inputs" in roots:
        source = next(".".join(path) for path in paths if path[0] == "inputs")
        what = f"`{name}` comes from `{source}`, and the journal keeps every input in clear"
        yield Issue(loc, f"{what}; {_how(name)}")
    elif roots != {"run"}:
        what = f"`{name}` comes from `{'.'.join(paths[0])}`, which the journal keeps in clear"
        yield Issue(loc, f"{what}; if it lasts longer than the run, {_how(name)}", True)


def _lost(
    texts: Iterator[Text], what: str, templates: Templates, *, is_warning: bool = True
) -> Iterator[Issue]:
    """A secret where it is recorded: only `***` arrives."""
    for text in texts:
        for path in sorted(_paths(text, templates)):
            if path[0] == "secrets":
                name = ".".join(path)
                message = f"{what} is recorded without secrets: `***` arrives instead of `{name}`"
                yield Issue(text.loc, message, is_warning)


def _paths(text: Text, templates: Templates) -> set[tuple[str, ...]]:
    try:
        return set(templates.references(text.text, is_expression=text.is_expression))
    except TemplateError:
        return set()  # named by validation


def _is_literal(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip()) and not is_template(value)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _how(name: str) -> str:
    word = re.sub(r"\W+", "_", name).strip("_").lower()
    return (
        f"write `secrets: {{{word}: env:NAME}}` (or file:PATH) at the top of the file"
        f" and `{{{{ secrets.{word} }}}}` here"
    )

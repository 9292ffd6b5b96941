"""Write the generated pages of docs/reference: what the code itself can say, it says.

Usage: make docs      (or .venv/bin/python scripts/docs.py; --check only compares)

tests/test_docs.py fails when a page that is checked in differs from what this makes.
"""

import ast
import enum
import inspect
import itertools
import json
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from llm_orchestrator import __version__, config, errors, model
from llm_orchestrator.cli.main import VERBS, command_of, help_text
from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill import metrics as drill_metrics
from llm_orchestrator.engine.control import Operator
from llm_orchestrator.engine.machine import TRANSITIONS
from llm_orchestrator.engine.store_breaker import StoreBreaker
from llm_orchestrator.language import base, definition, steps
from llm_orchestrator.language.templates import FILTERS
from llm_orchestrator.language.templates import FUNCTIONS as TEMPLATE_FUNCTIONS
from llm_orchestrator.server.app import make_app
from llm_orchestrator.server.feed import Feed
from llm_orchestrator.server.principal import OpenGuard
from llm_orchestrator.server.surface import Surface
from llm_orchestrator.steps.functions import FUNCTIONS as TRANSFORMS
from llm_orchestrator.steps.registry import StepTypes
from llm_orchestrator.store.memory import MemoryStore
from llm_orchestrator.telemetry import genai, logs, metrics, metrics_names, propagation
from llm_orchestrator.wire.catalogue import Definitions

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / "docs" / "reference"
ALIASES = {
    "InputType": definition.InputType,
    "TransformFunction": steps.TransformFunction,
}
NOTE = "<!-- Written by scripts/docs.py. Change the code, then `make docs`. -->"


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    def line(cells: Iterable[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    names = list(head)
    return "\n".join([line(names), "|" + "---|" * len(names), *(line(row) for row in rows)])


def page(title: str, *parts: str) -> str:
    return "\n\n".join([NOTE, f"# {title}", *(part.strip() for part in parts if part)]) + "\n"


def first_lines(text: str | None) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join(inspect.cleandoc(text or "").split("\n\n")[0].split())


# --- the states of a run ---


def states() -> str:
    rows = [
        (s.value, e.value, to.value)
        for s, events in TRANSITIONS.items()
        for e, to in events.items()
    ]
    arrows: dict[tuple[str, str], list[str]] = {}
    for state, event, following in rows:
        arrows.setdefault((state, following), []).append(event)
    chart = [f"    {a} --> {b}: {', '.join(events)}" for (a, b), events in arrows.items()]
    final = [f"    {state} --> [*]" for state in model.RunState if state.is_final]
    kinds = [(f"`{kind}`",) for kind in model.Kind]
    return page(
        "The states of a run",
        "This is the whole machine (`engine/machine.py`). An event that is not in the table is"
        " refused. A state has a reason beside it (`timer`, `signal`, `operator`,"
        " `unknown_outcome`, ...); reasons are data.",
        "```mermaid\n"
        + "\n".join(["stateDiagram-v2", "    [*] --> pending", *chart, *final])
        + "\n```",
        table(("State", "Event", "Next state"), rows),
        "Nothing but an operator's request moves a run out of "
        + ", ".join(f"`{state}`" for state in model.RunState if state.is_final)
        + ".",
        "## What a journal entry can be",
        table(("Kind",), kinds),
    )


# --- errors ---


def error_rows() -> Iterator[tuple[str, ...]]:
    tree = ast.parse(inspect.getsource(errors))
    for name in (node.name for node in tree.body if isinstance(node, ast.ClassDef)):
        found = getattr(errors, name)
        if issubclass(found, errors.OrchestratorError):
            again = "yes" if found.retryable else ""
            kind = f"`{found.kind}`"
            yield f"`{name}`", kind, str(found.exit_code), again, first_lines(found.__doc__)


def error_page() -> str:
    tree = inspect.cleandoc(errors.__doc__ or "").split("\n\n", 1)[1]
    return page(
        "Errors",
        "The kind is what `retry_on` names in a workflow. The exit code is what the command line"
        " ends with. An error's message says what happened to what; its hint is the next command.",
        table(("Error", "Kind", "Exit code", "Retried", "Meaning"), error_rows()),
        "## The tree",
        f"```text\n{tree}\n```",
    )


# --- the command line ---


def usage(command: Any, name: str) -> str:
    given = [one for one in command.params if not one.opts[0].startswith("-")]
    words = [name, *(one.metavar or one.name.upper() for one in given)]
    return " ".join([*words, "[OPTIONS]"] if len(command.params) > len(given) else words)


def option_rows(command: Any) -> Iterator[tuple[str, str]]:
    for one in command.params:
        text = " ".join((getattr(one, "help", "") or "").split())
        if not one.opts[0].startswith("-"):
            yield f"`{one.metavar or one.name.upper()}`", text
        elif not one.hidden:
            names = ", ".join(f"`{name}`" for name in [*one.opts, *one.secondary_opts])
            takes = "" if one.is_flag else f" `{metavar(one)}`"
            yield names + takes, text


def metavar(option: Any) -> str:
    """What a value looks like: its own word, the choices, or its type."""
    if option.metavar:
        return str(option.metavar)
    annotation = option.type_descriptor.annotation
    (kind, *_) = get_args(annotation) or (annotation,)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return "|".join(str(one.value) for one in kind)
    choices = get_args(annotation) if get_origin(annotation) is Literal else ()
    return "|".join(map(str, choices)) or {int: "N", float: "SECONDS"}.get(kind, "TEXT")


def commands(command: Any, name: str, level: int) -> Iterator[str]:
    yield f"{'#' * level} `{name}`"
    yield first_lines(command.help)
    if hasattr(command, "commands"):
        for verb, inner in command.commands.items():
            yield from commands(inner, f"{name} {verb}", level + 1)
        return
    yield f"```text\n{usage(command, name)}\n```"
    rows = list(option_rows(command))
    if rows:
        yield table(("Option", "Meaning"), rows)


def cli_page() -> str:
    parts: list[str] = []
    for verb in VERBS:
        parts.extend(part for part in commands(command_of(verb), f"llmo {verb}", 2) if part)
    return page(
        "Command line",
        "`llmo` and `llm-orchestrator` are the same program.",
        f"```text\n{help_text()}\n```",
        *parts,
    )


# --- the language ---


WORDS = {
    "Alternative": "`provider/model` or {provider, model}",
    "Budget": "see `budget`",
    "Count": "integer",
    "Fallback": "`fallback STEP`",
    "InputSpec": "an input",
    "Json": "anything",
    "Limit": "integer",
    "Milliseconds": "milliseconds",
    "Name": "name",
    "OutputSpec": "an output",
    "Pause": "seconds",
    "Probe": "see `probe`",
    "RetrySpec": "see `retry`",
    "Schedule": "see `schedule`",
    "Seconds": "seconds",
    "StepId": "id",
    "Steps": "steps",
    "Temperature": "number from 0 to 2",
    "VectorRecord": "{id, vector, metadata}",
    "bool": "true or false",
    "float": "number",
    "int": "integer",
    "str": "text",
}


def type_name(node: ast.expr) -> str:
    """A field's type in words."""
    match node:
        case ast.BinOp(left=left, right=ast.Constant(value=None)):
            return type_name(left)
        case ast.BinOp(left=left, right=right):
            return f"{type_name(left)} or {type_name(right)}"
        case ast.Subscript(value=ast.Name(id="Literal"), slice=ast.Tuple(elts=choices)):
            return ", ".join(f"`{ast.literal_eval(one)}`" for one in choices)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=one):
            return f"`{ast.literal_eval(one)}`"
        case ast.Subscript(value=ast.Name(id="Annotated"), slice=ast.Tuple(elts=[first, *_])):
            return type_name(first)
        case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=[item, *_])):
            return f"list of {type_name(item)}"
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[key, value])):
            return f"mapping of {type_name(key)} to {type_name(value)}"
        case ast.Subscript(slice=inner):
            return type_name(inner)
        case ast.Name(id=name) if name in WORDS:
            return WORDS[name]
        case ast.Name(id=name):
            return ", ".join(f"`{one}`" for one in get_args(ALIASES[name]))
    raise ValueError(f"no words for the type {ast.unparse(node)}")


def bodies(cls: type[BaseModel]) -> Iterator[list[ast.stmt]]:
    """The source of a model and of what it inherits from, the most general first."""
    for part in reversed(cls.__mro__):
        if issubclass(part, BaseModel) and part is not BaseModel:
            (node,) = ast.parse(textwrap.dedent(inspect.getsource(part))).body
            assert isinstance(node, ast.ClassDef)
            yield node.body


def annotations_of(cls: type[BaseModel]) -> dict[str, ast.expr]:
    """Field name to its annotation, as written."""
    return {
        item.target.id: item.annotation
        for body in bodies(cls)
        for item in body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }


def notes_in(body: list[ast.stmt]) -> dict[str, str]:
    """Field name to the docstring that stands below it."""
    return {
        ast.unparse(field.target): first_lines(note.value.value)
        for field, note in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(note, ast.Expr)
        and isinstance(note.value, ast.Constant)
        and isinstance(note.value.value, str)
    }


def default_of(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value is PydanticUndefined or value is None or value in ((), "", {}):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def fields_of(cls: type[BaseModel], but: Iterable[str] = ()) -> str:
    left_out = {*but, "has_fallback"}
    written = annotations_of(cls)
    notes = {name: note for body in bodies(cls) for name, note in notes_in(body).items()}
    rows = [
        (f"`{name}`", type_name(written[name]), default_of(field), notes.get(name, ""))
        for name, field in cls.model_fields.items()
        if name not in left_out
    ]
    has_notes = any(row[3] for row in rows)
    head = ("Field", "Type", "Default", "Meaning")
    return table(head if has_notes else head[:3], rows if has_notes else (r[:3] for r in rows))


def step_parts() -> Iterator[str]:
    common = set(base.BaseStep.model_fields)
    types = StepTypes()
    for name, cls in sorted(steps.STEP_TYPES.items()):
        yield f"### `{name}`"
        yield first_lines(cls.__doc__)
        yield fields_of(cls, common)
        outputs = steps.NATURAL_OUTPUTS[name]
        bound = ", ".join(f"`{one}`" for one in outputs)
        yield f"Outputs, in binding order: {bound}." + (
            " Actions `http` and `webhook`: "
            + ", ".join(f"`{one}`" for one in steps.HTTP_OUTPUTS)
            + "."
            if name == "action"
            else ""
        )
        if not types.is_control(name) and types.leaf(name).is_paid:
            yield "Paid: each attempt is recorded before it is made, and its tokens are booked."


def language_page() -> str:
    switch = "In a file, `branch` says `condition` for `switch` (and `when` for whether it runs)."
    return page(
        "Workflow files",
        "Every field of every part, from the models that loading uses. How to use them:"
        " [write a workflow](../how-to/write-a-workflow.md). The same as a JSON Schema for"
        " editors: `llmo schema`. A field may hold a template where that makes sense.",
        "## Top level",
        fields_of(definition.Definition),
        "### An input",
        fields_of(definition.InputSpec),
        "### An output",
        fields_of(definition.OutputSpec),
        "### `schedule`",
        fields_of(definition.Schedule),
        "### `budget`",
        fields_of(definition.Budget),
        "## Every step",
        fields_of(base.BaseStep),
        "### `retry`",
        fields_of(base.RetrySpec),
        "### `probe`",
        fields_of(base.Probe),
        "## Step types",
        switch,
        *step_parts(),
        "## Functions of `transform`",
        table(
            ("Function", "Parameters", "What it makes"),
            (
                (f"`{name}`", parameters(one), first_lines(one.apply.__doc__))
                for name, one in TRANSFORMS.items()
            ),
        ),
        "## In templates",
        "Filters: " + ", ".join(f"`{name}`" for name in sorted(FILTERS)) + ".",
        "Functions: " + ", ".join(f"`{name}`" for name in sorted(TEMPLATE_FUNCTIONS)) + ".",
    )


def parameters(function: Any) -> str:
    return ", ".join(
        f"`{name}`" + (" (required)" if name in function.required else "")
        for name in sorted(function.parameters)
    )


# --- settings and statements ---


def settings_page() -> str:
    tree = ast.parse(inspect.getsource(config))
    (cls,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config")
    notes = notes_in(cls.body)
    variables = {
        name: f"`LLM_ORCHESTRATOR_{suffix}`"
        for name, suffix in config._ENVIRONMENT.items()  # noqa: SLF001
    }
    variables["otel_endpoint"] = "`OTEL_EXPORTER_OTLP_ENDPOINT`"
    rows = [
        (
            f"`{one.name}`",
            variables.get(one.name, ""),
            default_setting(one),
            notes.get(one.name, ""),
        )
        for one in config.Config().settings()
    ]
    return page(
        "Settings",
        f"Order: flag, environment, the file `{config.FILE_NAME}` in the current folder (or where"
        " `LLM_ORCHESTRATOR_CONFIG` says), default. `llmo config show --origin` says which it was.",
        table(("Setting", "Environment", "Default", "Meaning"), rows),
        "Keys and addresses of providers come from the environment only: "
        + ", ".join(f"`{name}`" for name in config._SECRETS)  # noqa: SLF001
        + ".",
    )


def default_setting(one: Any) -> str:
    if one.name == "data_dir":
        return "the platform's data folder"
    if one.name == "store":
        return "`runs.db` in the data folder"
    if one.name == "backup_dir":
        return "`backups` in the data folder"
    return "" if one.value in ("", {}, ()) else f"`{one.value}`"


def queries_page() -> str:
    text = (ROOT / "src/llm_orchestrator/store/queries.sql").read_text()
    rows = []
    for block in text.split("-- name: ")[1:]:
        title, _, body = block.partition("\n")
        name, _, whose = title.strip().partition(" @")
        why = [line.removeprefix("--").strip() for line in body.splitlines() if line[:2] == "--"]
        rows.append((f"`{name}`", whose or "both", statement_kind(body), " ".join(why)))
    return page(
        "SQL statements",
        "Every statement that the store runs, by name (`store/queries.sql`), and on which database."
        " On PostgreSQL a commit is `append`, the parts that a batch needs, and `append_end`: one"
        " statement.",
        table(("Name", "Where", "Does", "Why it is as it is"), rows),
    )


def statement_kind(body: str) -> str:
    sql = " ".join(line for line in body.splitlines() if not line.startswith("--"))
    word = sql.split()[0] if sql.split()[0].isupper() else "part of append:"
    tables = re.findall(r"(?:FROM|INTO|UPDATE)\s+([a-z]\w*)\b(?!\s*\()", sql)
    return f"{word} {', '.join(dict.fromkeys(tables))}".strip()


# --- metrics ---


def metric_rows(metrics: Iterable[Any]) -> Iterator[tuple[str, ...]]:
    for one in metrics:
        labels = ", ".join(f"`{label}`" for label in one.labels)
        yield f"`{one.name}`", one.kind, labels, one.meaning


def metrics_page() -> str:
    names = metrics_names
    old = [
        (
            f"`{one.name}`",
            f"`{names.PREFIX}{one.of}`",
            ", ".join(f"`{label}`" for label in one.labels),
        )
        for one in names.OLD
    ]
    groups = [
        part
        for title, group in names.GROUPS.items()
        for part in (
            f"## {title}",
            table(("Metric", "Kind", "Labels", "Meaning"), metric_rows(group)),
        )
    ]
    return page(
        "Metrics",
        "`GET /metrics`, without a token: Prometheus' text, or OpenMetrics if the request's"
        " `Accept` asks for it. Each process shows its own; gauges of the store (runs, queues,"
        " nodes, replication) are the same on all, so take `max` of them and never `sum`. Values"
        f" that users name freely are bounded: {metrics.WORKFLOWS_MAX} workflows and routes,"
        f" {metrics.MODELS_MAX} models and queues, {metrics.NAMES_MAX} of each other kind; what"
        f" comes later is counted as `{metrics.OTHER}`.",
        *groups,
        "## Drills",
        "Not in `/metrics`: `llmo drill run --metrics FILE` keeps them in a file for the textfile"
        " collector of node_exporter, and `llmo drill report` writes those of all results.",
        table(
            ("Metric", "Kind", "Labels", "Meaning"),
            (
                (
                    f"`{drill_metrics.PREFIX}{one.word}`",
                    "gauge",
                    ", ".join(f"`{label}`" for label in one.labels),
                    one.meaning,
                )
                for one in drill_metrics.ALL
            ),
        ),
        "## Names of the earlier system",
        "The same values under their old names, for dashboards that have them.",
        table(("Old name", "The same as", "Its labels"), old),
        table(("Old name", "Kind", "Labels", "Meaning"), metric_rows((names.ERRORS, names.ACTIVE))),
    )


# --- logs and traces ---


def logs_and_traces_page() -> str:
    own = ((f"`{propagation.PREFIX}{key}`", what) for key, what in propagation.ATTRIBUTES.items())
    version = genai.NAMES
    latest, old = version["latest"][0], version["v1.36"][0]
    models = (
        (
            key.replace("_", " "),
            *(f"`{names[key]}`" if key in names else "" for names in (latest, old)),
        )
        for key in {**latest, **old}
    )
    return page(
        "Logs and traces",
        "How to use them: [logs and traces](../how-to/logs-and-traces.md).",
        "## Fields of a JSON log line",
        table(("Field", "Meaning"), ((f"`{key}`", what) for key, what in logs.FIELDS.items())),
        "## Spans",
        "`run WORKFLOW`, in it `stay WORKFLOW` (once for each time that a process drove it), in"
        " that `step NAME`, in that `attempt NAME`; attempts that ask a model are named"
        " `chat MODEL` or `embeddings MODEL`. Where something failed, `error.type` is the kind of"
        " the error and the status its message.",
        table(("Attribute", "Meaning"), own),
        "## What is said of models",
        "By OpenTelemetry's GenAI conventions, under the names that the setting `otel_genai`"
        " chooses. Prompts and answers are never recorded.",
        table(("Fact", "`latest`", "`v1.36`"), models),
    )


def openapi_document() -> str:
    """The document of the API, from an application that serves nothing."""

    class Open:
        async def check(self) -> None: ...

    clock = RealClock()
    store = MemoryStore(clock)
    surface = Surface(
        store=store,
        gate=StoreBreaker(clock),
        clock=clock,
        operator=Operator(store, clock),
        catalogue=Definitions(config.Config()),
        feed=Feed(),
        guard=OpenGuard(),
        admission=Open(),
        version=__version__,
    )
    return json.dumps(make_app(surface).openapi(), indent=1, ensure_ascii=False) + "\n"


DOCUMENTS = {"openapi.json": openapi_document}
"""What is written beside the pages, without a note on top."""
PAGES = {
    "cli.md": cli_page,
    "errors.md": error_page,
    "logs-and-traces.md": logs_and_traces_page,
    "metrics.md": metrics_page,
    "queries.md": queries_page,
    "settings.md": settings_page,
    "states.md": states,
    "workflow-files.md": language_page,
}


def main(arguments: list[str]) -> int:
    stale = []
    PLACE.mkdir(parents=True, exist_ok=True)
    for name, make in {**PAGES, **DOCUMENTS}.items():
        file, text = PLACE / name, make()
        if not file.exists() or file.read_text() != text:
            stale.append(name)
            if "--check" not in arguments:
                file.write_text(text)
    said = "stale" if "--check" in arguments else "written"
    print(f"docs: {said}: {', '.join(stale) or 'nothing'}")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What `run` and `register` are pointed at: a file, a registered name, or Python code.

    simple.yaml          a workflow file (YAML or JSON)
    summarise            a registered workflow; summarise@1.2 names the version
    module:name          a Python workflow of an importable module
    path/file.py:name    the same, by file; without :name if the file has only one

Nothing here changes a store. A mistake in Python code is shown like one in a workflow file.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import DefinitionError, InputError, NotFound, Problem
from llm_orchestrator.language.code import CodeWorkflow
from llm_orchestrator.model import Json, NewRun, Workflow

if TYPE_CHECKING:
    from llm_orchestrator.config import Config
    from llm_orchestrator.language.definition import Definition
    from llm_orchestrator.store.base import Shelf, Store

SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(frozen=True)
class Target:
    """A workflow that can be run or registered."""

    workflow: Workflow
    definition: Definition | None = None
    code: CodeWorkflow[Any] | None = None
    is_registered: bool = False
    queue: str = "default"
    priority: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    children: tuple[Workflow, ...] = ()
    """Definitions that this one calls by file, to be registered with it."""

    @property
    def kinds(self) -> dict[str, str]:
        """The type of each declared input, by name."""
        if self.definition is None or self.definition.inputs is None:
            return {}
        return {name: spec.type for name, spec in self.definition.inputs.items()}

    def check(self, inputs: Mapping[str, Json]) -> Json:
        """The inputs as the run will have them. Raises InputError with every mistake."""
        if self.definition is not None:
            from llm_orchestrator.language.inputs import check_inputs

            return check_inputs(self.definition, inputs)
        if self.code is not None:
            try:
                inspect.signature(self.code.function).bind(None, **inputs)
            except TypeError as error:
                raise InputError(
                    f"the inputs do not fit {self.code.name}: {error}",
                    hint=f"it takes {inspect.signature(self.code.function)}",
                ) from error
        return dict(inputs)

    async def accept(self, store: Store, clock: Clock, new: NewRun) -> str:
        """Make a run of it durable, with the definitions that it needs; the run's id.

        Raises Maintenance while no new runs are taken.
        """
        from llm_orchestrator.engine.control import Operator
        from llm_orchestrator.engine.maintenance import check_admission
        from llm_orchestrator.store.base import Batch, Register

        await check_admission(store.shelf)
        if self.children:
            changes = tuple(Register(child) for child in self.children)
            await store.commit(Batch(changes=changes))
        register = None if self.is_registered else self.workflow
        return await Operator(store, clock).accept(new, register=register)

    def new_run(self, run_id: str, inputs: Json, **options: Any) -> NewRun:
        """The run to accept. `options` as in NewRun; labels and priority win over its own."""
        labels = {**self.labels, **options.pop("labels", {})}
        priority = options.pop("priority", None)
        found = self.workflow
        return NewRun(
            run_id,
            found.name,
            found.version,
            found.digest,
            priority=self.priority if priority is None else priority,
            queue=self.queue,
            labels=labels,
            input=inputs,
            **options,
        )


def is_file(text: str) -> bool:
    """True when `text` means a workflow file."""
    return text.lower().endswith(SUFFIXES)


def is_python(text: str) -> bool:
    """True when `text` means Python code."""
    head, colon, name = text.rpartition(":")
    return text.endswith(".py") or bool(colon and head and name.isidentifier())


def of_file(path: str, config: Config) -> Target:
    """A workflow file and the files that it calls. Raises NotFound, DefinitionError."""
    from llm_orchestrator.wire.tools import load_workflow

    loaded = load_workflow(Path(path), config)
    return replace(of_definition(loaded.definition), children=loaded.children)


def of_definition(definition: Definition, *, is_registered: bool = False) -> Target:
    """A definition that was read."""
    from llm_orchestrator.wire.tools import as_workflow

    return Target(
        as_workflow(definition),
        definition=definition,
        is_registered=is_registered,
        queue=definition.queue,
        priority=definition.priority,
        labels=definition.labels,
    )


def of_code(workflow: CodeWorkflow[Any]) -> Target:
    """A Python workflow."""
    stored = Workflow(workflow.name, workflow.version, workflow.digest, workflow.definition)
    return Target(stored, code=workflow, queue=workflow.queue)


async def of_name(text: str, shelf: Shelf) -> Target:
    """A registered workflow, NAME or NAME@VERSION. Raises NotFound with the nearest name."""
    name, _, version = text.partition("@")
    stored = await shelf.workflow(name, version or None)
    if stored is None:
        from llm_orchestrator.language.names import nearest

        known = {item.name for item in await shelf.workflows()}
        raise NotFound(
            f"{text} is neither a file nor a registered workflow{nearest(name, known)}",
            hint="llmo workflows list",
        )
    from llm_orchestrator.engine.flows import is_code

    if is_code(stored):
        return Target(stored, is_registered=True)
    from llm_orchestrator.language.definition import Definition

    return of_definition(Definition.from_canonical(stored.definition), is_registered=True)


def of_python(text: str) -> Target:
    """`module:name`, `file.py:name` or `file.py`. Raises NotFound, DefinitionError."""
    place, colon, name = text.rpartition(":")
    if not colon or text.endswith(".py"):
        place, name = text, ""
    found = workflows_of(load_module(place))
    if name:
        for workflow in found:
            if found[workflow] == name or workflow.name == name:
                return of_code(workflow)
        known = ", ".join(found.values()) or "none"
        raise NotFound(f"{place} has no workflow {name}; it has: {known}")
    if len(found) != 1:
        names = ", ".join(found.values()) or "none"
        raise NotFound(f"which workflow of {place}? it has: {names}", hint=f"llmo run {place}:NAME")
    return of_code(next(iter(found)))


def workflows_of(module: ModuleType) -> dict[CodeWorkflow[Any], str]:
    """The Python workflows of a module, with the names that they have there."""
    return {value: name for name, value in vars(module).items() if isinstance(value, CodeWorkflow)}


def load_module(place: str) -> ModuleType:
    """Import a module by its name, or a file. Its own mistakes become DefinitionError."""
    path = Path(place)
    folder = str(path.resolve().parent) if place.endswith(".py") else str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    if not place.endswith(".py"):
        return _import(place, lambda: importlib.import_module(place))
    if not path.is_file():
        raise NotFound(f"there is no file {place}", hint="check the path")
    return _import(place, lambda: _execute(path))


def _execute(path: Path) -> ModuleType:
    """A file as a module of its own name, whatever else bears that name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def _import(place: str, work: Any) -> ModuleType:
    try:
        module = work()
    except ModuleNotFoundError as error:
        if error.name and place.partition(".")[0] == error.name.partition(".")[0]:
            raise NotFound(f"there is no module {place}", hint="check the name") from error
        raise _mistake(place, error) from error
    except Exception as error:
        raise _mistake(place, error) from error
    assert isinstance(module, ModuleType)
    return module


def _mistake(place: str, error: Exception) -> DefinitionError:
    """Where in the user's code the import failed."""
    message = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):
        file, line, column = error.filename or place, error.lineno or 1, error.offset or 1
        return DefinitionError([Problem(file, line, column, f"{error.msg}")])
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<")
        and "llm_orchestrator/cli" not in frame.filename
        and "importlib" not in frame.filename
    ]
    file, line = (frames[-1].filename, frames[-1].lineno or 1) if frames else (place, 1)
    return DefinitionError([Problem(file, line, 1, message)])

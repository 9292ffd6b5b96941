"""What only workflow files need: definitions, templates, step types, providers.

Kept apart from orchestrator.py because it is slow to import, and a Python workflow needs none of
it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from llm_orchestrator.clock import Clock, RealClock
from llm_orchestrator.config import Config, resolve_secret
from llm_orchestrator.engine.interpreter import Tools
from llm_orchestrator.errors import DefinitionError, InputError, Problem
from llm_orchestrator.language import sandbox
from llm_orchestrator.language.definition import Definition
from llm_orchestrator.language.inputs import check_inputs
from llm_orchestrator.language.load import load_file
from llm_orchestrator.language.templates import Templates
from llm_orchestrator.model import Json, Workflow
from llm_orchestrator.providers.base import VectorStore
from llm_orchestrator.providers.limits import Limit
from llm_orchestrator.providers.registry import Registry
from llm_orchestrator.providers.settings import Address, ProviderSettings
from llm_orchestrator.steps.action import Actions
from llm_orchestrator.steps.registry import StepTypes
from llm_orchestrator.store.base import Store
from llm_orchestrator.store.shared import StoreState
from llm_orchestrator.store.sql_vectors import SqlVectors
from llm_orchestrator.telemetry.metrics import Metrics

OWN_NAMES = frozenset({"openai", "anthropic", "cohere", "local", "echo"})
"""Providers with settings of their own; an entry in the file may still limit them."""


class Loaded(NamedTuple):
    """A workflow file with everything it stands on. `children` are to be registered with it."""

    definition: Definition
    children: tuple[Workflow, ...] = ()

    @property
    def workflow(self) -> Workflow:
        """The row of `workflows`."""
        return as_workflow(self.definition)


def load_workflow(file: Path, config: Config, *, above: tuple[Path, ...] = ()) -> Loaded:
    """Read a workflow file and the files that its `workflow` steps name, relative to it.

    Such a step then names the child by its name and version, so that a run needs no file any more.
    Raises NotFound or DefinitionError.
    """
    place = file.resolve()
    if place in above:
        chain = " -> ".join(str(path.name) for path in (*above, place))
        raise DefinitionError(
            [Problem(str(file), 1, 1, f"workflow files call each other: {chain}")]
        )
    definition = load_file(file, known_providers=known_providers(config))
    data = json.loads(definition.canonical())
    children: list[Workflow] = []
    for step in child_steps(data):
        child = load_workflow(file.parent / step.pop("file"), config, above=(*above, place))
        children += [*child.children, child.workflow]
        step["workflow"], step["version"] = child.definition.name, child.definition.version
    if children:
        warnings = definition.warnings
        definition = Definition.from_canonical(json.dumps(data).encode())
        definition.warnings.extend(warnings)
    return Loaded(definition, tuple(children))


def child_steps(data: Json) -> list[dict[str, Json]]:
    """Every step that names another workflow by its file, however deep."""
    if isinstance(data, list):
        return [step for item in data for step in child_steps(item)]
    if not isinstance(data, dict):
        return []
    if data.get("type") == "workflow" and "file" in data:
        return [data]
    return [step for item in data.values() for step in child_steps(item)]


def as_workflow(definition: Definition) -> Workflow:
    """A definition as the store keeps it."""
    return Workflow(definition.name, definition.version, definition.digest, definition.canonical())


def checked_inputs(definition: Definition, inputs: Json) -> Json:
    """Inputs with defaults filled in. Raises InputError naming everything that does not fit."""
    if inputs is not None and not isinstance(inputs, Mapping):
        raise InputError(f"inputs must be an object, not {type(inputs).__name__}")
    return check_inputs(definition, inputs or {})


def known_providers(config: Config) -> list[str]:
    """Every provider name that a workflow may use with this configuration."""
    registry = Registry(provider_settings(config), clock=RealClock())
    return sorted({*registry.names("llm"), *registry.names("embedding")})


def make_tools(
    config: Config, store: Store, clock: Clock, *, metrics: Metrics | None = None
) -> Tools:
    """What running definitions takes: step types, templates, providers."""
    vectors = {"sql": cast("VectorStore", SqlVectors(store))}
    settings = replace(provider_settings(config), vectors=vectors)
    registry = Registry(settings, clock=clock, shared=StoreState(store), metrics=metrics)
    step_types = StepTypes(Actions(outgoing_allow=config.outgoing_allow))

    async def close() -> None:
        sandbox.close()
        await registry.close()

    return Tools(step_types, Templates(), registry, resolve_secret, close)


def reconfigure(tools: Tools, config: Config) -> None:
    """Another configuration's limits of providers, and where workflows may send requests."""
    assert isinstance(tools.providers, Registry)
    tools.providers.limit(provider_settings(config).limits)
    tools.step_types.actions.allow(config.outgoing_allow)


def provider_settings(config: Config) -> ProviderSettings:
    """Keys, addresses and limits from the configuration."""
    secrets = config.secrets
    named: dict[str, Address] = {}
    limits: dict[str, Limit] = {}
    for name, entry in config.providers.items():
        limits[name] = Limit(
            requests_per_minute=int(entry.get("requests_per_minute", 0)),
            tokens_per_minute=int(entry.get("tokens_per_minute", 0)),
        )
        if name not in OWN_NAMES:
            named[name] = _address(entry, secrets)

    def official(name: str) -> Address:
        variable = f"{name}_API_KEY"
        return Address(secrets.get(f"{name}_BASE_URL", ""), secrets.get(variable, ""), variable)

    return ProviderSettings(
        openai=official("OPENAI"),
        anthropic=official("ANTHROPIC"),
        cohere=official("COHERE"),
        compatible=named,
        local_url=config.local_url,
        data_dir=config.data_dir,
        qdrant_url=secrets.get("QDRANT_URL", ""),
        pinecone_host=secrets.get("PINECONE_HOST", ""),
        pinecone_api_key=secrets.get("PINECONE_API_KEY", ""),
        limits=limits,
    )


def _address(entry: Mapping[str, Any], secrets: Mapping[str, str]) -> Address:
    variable = str(entry.get("api_key_env", ""))
    return Address(
        str(entry.get("base_url", "")),
        secrets.get(variable, ""),
        variable,
        fallback_urls=tuple(entry.get("fallback_urls", ())),
        api_version=str(entry.get("api_version", "")),
        resume=tuple(entry.get("resume", ())),
        prefill=str(entry.get("prefill", "")),
    )

"""Every configured provider by name, made when it is first asked for.

Adapters are imported only then, so that a run on `echo` loads no HTTP client. Whoever has a name
gets one object for the life of the process, behind its breaker and rate limit. Further providers
come as plug-ins: an entry point in the group `llm_orchestrator.providers` or `.vector_stores` names
a callable `factory(*, clock, options)` whose result has `complete` and/or `embed`, or is a
VectorStore. A built-in name is never replaced by a plug-in.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import ConfigError
from llm_orchestrator.providers.base import (
    EmbeddingProvider,
    LLMProvider,
    Resume,
    SharedState,
    VectorStore,
)
from llm_orchestrator.providers.guard import Guarded, GuardedEmbeddings, Guards
from llm_orchestrator.providers.limits import Limit
from llm_orchestrator.providers.measured import Measured, MeasuredEmbeddings
from llm_orchestrator.providers.prices import PriceBook
from llm_orchestrator.providers.settings import Address, ProviderSettings, clean_key, clean_url
from llm_orchestrator.providers.shared import MemoryState
from llm_orchestrator.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from llm_orchestrator.providers.http import HttpClient, Target
    from llm_orchestrator.providers.local import ServerSource
    from llm_orchestrator.providers.openai import Dialect

PROVIDERS = "llm_orchestrator.providers"
VECTOR_STORES = "llm_orchestrator.vector_stores"
_LLMS = ("anthropic", "echo", "local", "openai")
_EMBEDDINGS = ("cohere", "echo", "local", "openai")
_VECTORS = ("pinecone", "qdrant")


class Registry:
    """The `Providers` of base.py. `close` ends everything that it made."""

    def __init__(
        self,
        settings: ProviderSettings,
        *,
        clock: Clock,
        shared: SharedState | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._metrics = metrics or Metrics()
        self._prices = PriceBook()
        self._guards = Guards(
            clock=clock,
            shared=shared or MemoryState(),
            limits=settings.limits,
            policy=settings.breaker,
            metrics=self._metrics,
        )
        self._http_client: HttpClient | None = None
        self._llms: dict[str, LLMProvider] = {}
        self._embeddings: dict[str, EmbeddingProvider] = {}
        self._vectors: dict[str, VectorStore] = {}
        self._plugins: dict[tuple[str, str], Any] = {}

    def limit(self, limits: Mapping[str, Limit]) -> None:
        """Other limits from now on, for providers that are in use, too."""
        self._settings = replace(self._settings, limits=limits)
        self._guards.limit(limits)

    def llm(self, name: str) -> LLMProvider:
        """Return the language model provider of that name. Raises ConfigError."""
        if name not in self._llms:
            makers: Mapping[str, Callable[[], LLMProvider]] = {
                "anthropic": self._anthropic,
                "echo": self._echo,
                "local": self._local,
            }
            if name in makers:
                made = makers[name]()
            elif self._is_compatible(name):
                made = self._openai(name)
            else:
                made = self._plugin(PROVIDERS, name, "complete")
            guarded = made if name == "echo" else Guarded(made, self._guards)
            self._llms[name] = Measured(guarded, self._clock, self._metrics)
        return self._llms[name]

    def embedding(self, name: str) -> EmbeddingProvider:
        """Return the embedding provider of that name. Raises ConfigError."""
        if name not in self._embeddings:
            makers: Mapping[str, Callable[[], EmbeddingProvider]] = {
                "cohere": self._cohere,
                "echo": self._echo_embeddings,
                "local": self._local_embeddings,
            }
            if name in makers:
                made = makers[name]()
            elif self._is_compatible(name):
                made = self._openai_embeddings(name)
            else:
                made = self._plugin(PROVIDERS, name, "embed")
            is_ours = name in ("echo", "local")
            guarded = made if is_ours else GuardedEmbeddings(made, self._guards)
            self._embeddings[name] = MeasuredEmbeddings(guarded, self._clock, self._metrics)
        return self._embeddings[name]

    def vectors(self, name: str) -> VectorStore:
        """Return the vector store of that name. Raises ConfigError."""
        if name in self._settings.vectors:
            return self._settings.vectors[name]
        if name not in self._vectors:
            if name == "qdrant":
                self._vectors[name] = self._qdrant()
            elif name == "pinecone":
                self._vectors[name] = self._pinecone()
            else:
                self._vectors[name] = self._plugin(VECTOR_STORES, name, "search")
        return self._vectors[name]

    def names(self, part: str) -> Sequence[str]:
        """Every name that `llm`, `embedding` or `vectors` (the `part`) knows, sorted."""
        if part == "vectors":
            known = {*_VECTORS, *self._settings.vectors, *_entry_points(VECTOR_STORES)}
        else:
            own = _LLMS if part == "llm" else _EMBEDDINGS
            known = {*own, *self._settings.compatible, *_entry_points(PROVIDERS)}
        return sorted(known)

    async def close(self) -> None:
        """Close what was made here; the registry can be used again afterwards."""
        made: list[LLMProvider | EmbeddingProvider | VectorStore] = [
            *self._llms.values(),
            *self._embeddings.values(),
            *self._vectors.values(),
        ]
        self._llms, self._embeddings, self._vectors, self._plugins = {}, {}, {}, {}
        try:
            for one in made:
                await one.close()
        finally:
            if self._http_client is not None:
                await self._http_client.close()

    # -- makers -----------------------------------------------------------------------------------

    def _http(self) -> HttpClient:
        from llm_orchestrator.providers.http import HttpClient  # noqa: PLC0415  aiohttp is heavy

        if self._http_client is None:
            settings = self._settings
            self._http_client = HttpClient(
                clock=self._clock, connections_max=settings.connections_max, proxy=settings.proxy
            )
        return self._http_client

    def _is_compatible(self, name: str) -> bool:
        return name == "openai" or name in self._settings.compatible

    def _compatible(self, name: str) -> tuple[Target, Dialect]:
        from llm_orchestrator.providers import presets  # noqa: PLC0415

        settings = self._settings
        address = settings.openai if name == "openai" else settings.compatible[name]
        preset_url, dialect = presets.preset(name, has_address=bool(address.base_url))
        dialect = presets.adapt(
            dialect,
            resume=tuple(_resume(name, way) for way in address.resume),
            prefill=address.prefill,
            api_version=address.api_version,
        )
        is_azure = bool(address.api_version) or ".azure.com" in address.base_url
        key = clean_key(name, address.api_key)
        headers = {"api-key": key} if is_azure else {"Authorization": f"Bearer {key}"}
        path = "" if address.api_version else "/v1"
        variable = "OPENAI_API_KEY" if name == "openai" else f"the api_key of provider {name}"
        target = _target(name, address, url=preset_url, path=path, variable=variable, auth=headers)
        return target, dialect

    def _openai(self, name: str) -> LLMProvider:
        from llm_orchestrator.providers.openai import OpenAI  # noqa: PLC0415

        target, dialect = self._compatible(name)
        return OpenAI(target, self._http(), dialect=dialect, prices=self._prices)

    def _openai_embeddings(self, name: str) -> EmbeddingProvider:
        from llm_orchestrator.providers.openai_embeddings import OpenAIEmbeddings  # noqa: PLC0415

        target, dialect = self._compatible(name)
        return OpenAIEmbeddings(target, self._http(), dialect=dialect, prices=self._prices)

    def _anthropic(self) -> LLMProvider:
        from llm_orchestrator.providers import anthropic  # noqa: PLC0415

        address = self._settings.anthropic
        auth = {"x-api-key": clean_key("anthropic", address.api_key)}
        version = {"anthropic-version": anthropic.API_VERSION, **address.headers}
        target = _target(
            "anthropic",
            replace(address, headers=version),
            url=anthropic.OFFICIAL_URL,
            path="/v1",
            variable="ANTHROPIC_API_KEY",
            auth=auth,
        )
        return anthropic.Anthropic(
            target, self._http(), prices=self._prices, is_key_required=not address.base_url
        )

    def _cohere(self) -> EmbeddingProvider:
        from llm_orchestrator.providers import cohere  # noqa: PLC0415

        address = self._settings.cohere
        auth = {"Authorization": f"Bearer {clean_key('cohere', address.api_key)}"}
        target = _target(
            "cohere",
            address,
            url=cohere.OFFICIAL_URL,
            path="/v2",
            variable="COHERE_API_KEY",
            auth=auth,
        )
        return cohere.CohereEmbeddings(
            target, self._http(), prices=self._prices, is_key_required=not address.base_url
        )

    def _echo(self) -> LLMProvider:
        from llm_orchestrator.providers.echo import Echo  # noqa: PLC0415

        return Echo(self._clock)

    def _echo_embeddings(self) -> EmbeddingProvider:
        from llm_orchestrator.providers.echo import EchoEmbeddings  # noqa: PLC0415

        return EchoEmbeddings()

    def _local(self) -> LLMProvider:
        from llm_orchestrator.providers.local import LocalLLM  # noqa: PLC0415

        return LocalLLM(self._http(), self._server())

    def _server(self) -> ServerSource:
        from llm_orchestrator.providers.local_server import OnDemand  # noqa: PLC0415

        if self._settings.local_url:
            return _Fixed(clean_url("local", self._settings.local_url, "/v1"))
        return OnDemand(self._require_data_dir("local"), clock=self._clock)

    def _local_embeddings(self) -> EmbeddingProvider:
        from llm_orchestrator.providers.embed_local import LocalEmbeddings  # noqa: PLC0415

        return LocalEmbeddings()

    def _qdrant(self) -> VectorStore:
        from llm_orchestrator.providers.vectors_qdrant import QdrantVectors  # noqa: PLC0415

        settings = self._settings
        if settings.qdrant_url:
            return QdrantVectors(url=settings.qdrant_url, api_key=settings.qdrant_api_key or None)
        return QdrantVectors(path=self._require_data_dir("qdrant") / "qdrant")

    def _pinecone(self) -> VectorStore:
        from llm_orchestrator.providers.vectors_pinecone import PineconeVectors  # noqa: PLC0415

        settings = self._settings
        key = clean_key("pinecone", settings.pinecone_api_key)
        return PineconeVectors(self._http(), api_key=key, host=settings.pinecone_host or None)

    def _require_data_dir(self, name: str) -> Any:
        if self._settings.data_dir is None:
            raise ConfigError(f"{name} needs a data folder", hint="set LLM_ORCHESTRATOR_DATA")
        return self._settings.data_dir

    # -- plug-ins ---------------------------------------------------------------------------------

    def _plugin(self, group: str, name: str, method: str) -> Any:
        part = {"complete": "llm", "embed": "embedding", "search": "vectors"}[method]
        found = _entry_points(group)
        if name not in found:
            raise self._unknown(part, name)
        if (group, name) not in self._plugins:
            try:
                options = self._settings.plugins.get(name, {})
                self._plugins[group, name] = found[name].load()(clock=self._clock, options=options)
            except (ImportError, AttributeError, TypeError) as error:
                raise ConfigError(
                    f"plug-in {name!r} cannot be loaded: {error}",
                    hint="update or uninstall the package that brings it",
                ) from error
        made = self._plugins[group, name]
        if not hasattr(made, method):
            raise ConfigError(f"plug-in {name!r} has no {method!r}, so it is no {part} provider")
        return made

    def _unknown(self, part: str, name: str) -> ConfigError:
        known = self.names(part)
        near = difflib.get_close_matches(name, known, 1)
        what = {"llm": "provider", "embedding": "embedding provider", "vectors": "vector store"}
        nearest = f"; did you mean {near[0]!r}?" if near else ""
        return ConfigError(
            f"unknown {what[part]} {name!r}{nearest} (known: {', '.join(known)})",
            hint=f"use {near[0]}" if near else "name one of them, or configure this one",
        )


class _Fixed:
    """A local server whose address is configured; it is not ours to start or end."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def url(self) -> str:
        return self._url

    async def close(self) -> None:
        """Leave it running."""


def _entry_points(group: str) -> Mapping[str, Any]:
    from importlib.metadata import entry_points  # noqa: PLC0415  scans every installed package

    return {point.name: point for point in entry_points(group=group)}


def _resume(provider: str, way: str) -> Resume:
    try:
        return Resume(way)
    except ValueError:
        known = ", ".join(Resume)
        raise ConfigError(
            f"provider {provider} cannot resume by {way!r} (known: {known})"
        ) from None


def _target(
    provider: str,
    address: Address,
    *,
    url: str,
    path: str,
    variable: str,
    auth: Mapping[str, str],
) -> Target:
    from llm_orchestrator.providers.http import Target  # noqa: PLC0415

    if not (address.base_url or url):
        raise ConfigError(
            f"provider {provider} has no address", hint=f"set base_url of provider {provider}"
        )
    urls = (address.base_url or url, *address.fallback_urls)
    key = clean_key(provider, address.api_key)
    return Target(
        provider=provider,
        base_urls=tuple(clean_url(provider, one, path) for one in urls),
        headers={**(auth if key else {}), **address.headers},
        key=key,
        variable=address.variable or variable,
        timeout_s=address.timeout_s,
    )

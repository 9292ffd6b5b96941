"""What the providers are told: addresses, keys, limits. Plain data, handed in by the wiring.

Nothing here reads the environment, a file or the network. Keys never show in a `repr`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from llm_orchestrator.errors import ConfigError
from llm_orchestrator.model import Json
from llm_orchestrator.providers.base import VectorStore
from llm_orchestrator.providers.breaker import BreakerPolicy
from llm_orchestrator.providers.limits import Limit


@dataclass(frozen=True, slots=True)
class Address:
    """Where a provider is and how it is spoken to. Empty fields mean the provider's own default."""

    base_url: str = ""
    api_key: str = field(default="", repr=False)
    variable: str = ""
    """The setting that holds the key, named in hints."""
    fallback_urls: tuple[str, ...] = ()
    """Tried in order when no connection can be made to the one before."""
    api_version: str = ""
    """Azure only."""
    resume: tuple[str, ...] = ()
    """Ways to go on with a half-streamed answer: attach, prefill, restart."""
    prefill: str = ""
    """How a message to continue is marked: plain, prefix, continue_final_message."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    timeout_s: float = 300.0


@dataclass(frozen=True, slots=True)
class ProviderSettings:
    """Everything about providers that is configured."""

    openai: Address = Address()
    anthropic: Address = Address()
    cohere: Address = Address()
    compatible: Mapping[str, Address] = field(default_factory=dict)
    """Further OpenAI-compatible servers by name."""
    local_url: str = ""
    """A running llama.cpp server; empty: one is found or started in `data_dir`."""
    data_dir: Path | None = None
    qdrant_url: str = ""
    qdrant_api_key: str = field(default="", repr=False)
    pinecone_host: str = ""
    pinecone_api_key: str = field(default="", repr=False)
    limits: Mapping[str, Limit] = field(default_factory=dict)
    """By `provider` or `provider/model`; the nearer one counts."""
    breaker: BreakerPolicy = field(default_factory=BreakerPolicy)
    connections_max: int = 512
    proxy: str | None = None
    plugins: Mapping[str, Mapping[str, Json]] = field(default_factory=dict)
    """Options for plug-ins, by the plug-in's name."""
    vectors: Mapping[str, VectorStore] = field(default_factory=dict)
    """Vector stores that somebody else made and closes (`sql`)."""


def clean_url(provider: str, url: str, path: str) -> str:
    """An address without its last slash; one without any path gets `path`."""
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(
            f"the base URL of {provider} is no http address: {url!r}",
            hint=f"write it like https://host{path}",
        )
    return url.strip().rstrip("/") + ("" if parts.path.strip("/") else path)


def clean_key(provider: str, key: str) -> str:
    """A key without the blanks that come with copying it."""
    key = key.strip()
    if not key.isprintable() or not key.isascii():
        raise ConfigError(
            f"the key of {provider} has characters that no key has", hint="copy the key again"
        )
    return key

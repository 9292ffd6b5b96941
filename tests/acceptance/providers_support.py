"""What the provider tests share: a client against one address, and a record of what it streamed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llm_orchestrator.clock import RealClock
from llm_orchestrator.providers.base import LLMRequest, Partial
from llm_orchestrator.providers.http import HttpClient, Target
from llm_orchestrator.providers.openai import Dialect, OpenAI
from llm_orchestrator.providers.openai_embeddings import OpenAIEmbeddings
from llm_orchestrator.providers.prices import PriceBook


class Seen:
    """Chunks and handles, in order."""

    def __init__(self) -> None:
        self.chunks: list[str] = []
        self.handles: list[Mapping[str, Any]] = []

    async def chunk(self, text: str) -> None:
        self.chunks.append(text)

    def handle(self, handle: Mapping[str, Any]) -> None:
        self.handles.append(handle)

    @property
    def text(self) -> str:
        return "".join(self.chunks)


def ask(
    prompt: str,
    *,
    model: str = "fake",
    stream: bool = True,
    partial: Partial | None = None,
    **more: Any,
) -> LLMRequest:
    messages: Sequence[Mapping[str, Any]] = more.pop(
        "messages", [{"role": "user", "content": prompt}]
    )
    return LLMRequest(model=model, messages=messages, stream=stream, partial=partial, **more)


def target(url: str | tuple[str, ...], **more: Any) -> Target:
    provider, key = more.pop("provider", "openai"), more.pop("key", "sk-good-key-123456")
    urls = (url,) if isinstance(url, str) else tuple(url)
    headers = more.pop("headers", {"Authorization": f"Bearer {key}"})
    return Target(provider, urls, headers=headers, key=key, variable="OPENAI_API_KEY", **more)


def http_client() -> HttpClient:
    return HttpClient(clock=RealClock())


def openai(client: HttpClient, to: Target, dialect: Dialect | None = None) -> OpenAI:
    return OpenAI(to, client, dialect=dialect or Dialect(), prices=PriceBook())


def openai_embeddings(client: HttpClient, to: Target) -> OpenAIEmbeddings:
    return OpenAIEmbeddings(to, client, dialect=Dialect(), prices=PriceBook())

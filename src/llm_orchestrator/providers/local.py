"""The local language model: llama.cpp on this machine, spoken to like any OpenAI-compatible server.

It costs nothing and needs no key. A half-streamed answer goes on by attaching to the generation
that is still under way in the server, else by continuing the text that was kept. The address is
asked before every request, so that a server that died is replaced by the next request; this module
never starts a process itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

from llm_orchestrator.errors import (
    OperatorError,
    ProviderError,
    ProviderInvalidRequest,
    ProviderTransient,
)
from llm_orchestrator.model import Json
from llm_orchestrator.providers.base import LLMRequest, LLMResponse, OnChunk
from llm_orchestrator.providers.http import HttpClient, Target
from llm_orchestrator.providers.local_server import LocalServerFailed
from llm_orchestrator.providers.openai import LLAMA_CPP, OpenAI
from llm_orchestrator.providers.prices import PriceBook

ANSWER_TOKENS_MAX = 1024
"""Where a request names no limit: a small model may not find an end by itself."""

_SILENCE_S_MAX = 300.0


class ServerSource(Protocol):
    """Who knows a running server; local_server.OnDemand starts one when there is none."""

    async def url(self) -> str:
        """Base URL of a server that answers. Raises OperatorError."""
        ...

    async def close(self) -> None: ...


class LocalLLM:
    """The LLMProvider `local`. It owns `source` and closes it; `http` is whoever made it's."""

    name = "local"

    def __init__(self, http: HttpClient, source: ServerSource) -> None:
        self._http = http
        self._source = source

    async def complete(
        self,
        request: LLMRequest,
        on_chunk: OnChunk,
        on_handle: Callable[[Mapping[str, Json]], None],
    ) -> LLMResponse:
        """Ask once, or go on with `request.partial`. See base.LLMProvider."""
        target = Target(
            provider=self.name,
            base_urls=(await self._url(),),
            # llama.cpp closes connections without a word, after a stream or 5 s: a request that is
            # sent on such a one fails. A new connection costs nothing on this machine.
            headers={"Connection": "close"},
            timeout_s=_SILENCE_S_MAX,
        )
        if request.max_tokens is None:
            request = replace(request, max_tokens=ANSWER_TOKENS_MAX)
        adapter = OpenAI(target, self._http, dialect=LLAMA_CPP, prices=PriceBook())
        return await adapter.complete(request, on_chunk, on_handle)

    async def close(self) -> None:
        """End the server if it is ours."""
        await self._source.close()

    async def _url(self) -> str:
        try:
            return await self._source.url()
        except OperatorError as error:
            kind: type[ProviderError] = ProviderInvalidRequest
            if isinstance(error, LocalServerFailed):
                kind = ProviderTransient
            raise kind(error.message, provider=self.name, hint=error.hint) from error

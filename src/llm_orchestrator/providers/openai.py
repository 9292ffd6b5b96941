"""OpenAI's chat completions, and every server that speaks the same.

vLLM, llama.cpp, Ollama, Groq, Mistral, DeepSeek, OpenRouter and Azure differ in what `Dialect` says
and in nothing else. One call of ours is one request, except where a resume that was refused falls
through to the next way: asking for a lost stream costs nothing, and a refused prefill neither.

How a half-streamed answer goes on:
attach    llama.cpp goes on generating under `X-Conversation-Id` and replays the stream from its
          first byte. The replay is compared with the text we kept, so another generation's words
          can never be glued to ours. A new POST under the same id ends the old generation.
prefill   the partial answer is sent as the last message and continued. A stream brings only what
          is new; a whole answer echoes the prefix, which is cut off again.
restart   OpenAI itself offers nothing for chat completions: everything is paid for again.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from enum import StrEnum
from urllib.parse import quote

from llm_orchestrator.errors import (
    ProviderAuthentication,
    ProviderInvalidRequest,
    ProviderTransient,
)
from llm_orchestrator.model import Json, Usage
from llm_orchestrator.providers.answers import Collector, kept_tokens, prompt_tokens
from llm_orchestrator.providers.base import (
    LLMRequest,
    LLMResponse,
    OnChunk,
    Resume,
)
from llm_orchestrator.providers.failures import key_hint
from llm_orchestrator.providers.http import HttpClient, Stream, Target, parse
from llm_orchestrator.providers.prices import PriceBook
from llm_orchestrator.providers.sse import DONE

OnHandle = Callable[[Mapping[str, Json]], None]


class Prefill(StrEnum):
    """What marks the last assistant message as one to continue."""

    PLAIN = "plain"
    """llama.cpp, OpenRouter: nothing does, it is the default."""
    PREFIX = "prefix"
    """Mistral and DeepSeek: `prefix: true` on the message."""
    FINAL_MESSAGE = "continue_final_message"
    """vLLM: a flag beside the messages."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a server differs from OpenAI's own."""

    resume: tuple[Resume, ...] = (Resume.RESTART,)
    prefill: Prefill = Prefill.PLAIN
    limit_field: str = "max_tokens"
    api_version: str = ""
    """Azure: set for addresses with deployments, empty for its `/openai/v1` addresses."""
    is_key_required: bool = False


OFFICIAL = Dialect(limit_field="max_completion_tokens", is_key_required=True)
LLAMA_CPP = Dialect(resume=(Resume.ATTACH, Resume.PREFILL, Resume.RESTART))


class OpenAI:
    """A language model behind an OpenAI-compatible address."""

    def __init__(
        self, target: Target, http: HttpClient, *, dialect: Dialect, prices: PriceBook
    ) -> None:
        self.name = target.provider
        self._target = target
        self._http = http
        self._dialect = dialect
        self._prices = prices

    async def complete(
        self, request: LLMRequest, on_chunk: OnChunk, on_handle: OnHandle
    ) -> LLMResponse:
        """Ask once, or go on with `request.partial` in the best way this server has."""
        require_key(self._target, is_required=self._dialect.is_key_required)
        for way in self._ways(request):
            answer = await self._try(way, request, on_chunk, on_handle=on_handle)
            if answer is not None:
                return answer
        return await self._ask(request, on_chunk, on_handle=on_handle, kept="")

    async def close(self) -> None:
        """Nothing: whoever made the HTTP client closes it."""

    def _ways(self, request: LLMRequest) -> list[Resume]:
        if request.partial is None:
            return []
        can = {
            Resume.ATTACH: bool(request.partial.handle.get("conversation_id")),
            Resume.PREFILL: bool(request.partial.text),
        }
        return [way for way in self._dialect.resume if can.get(way)]

    async def _try(
        self, way: Resume, request: LLMRequest, on_chunk: OnChunk, *, on_handle: OnHandle
    ) -> LLMResponse | None:
        """Resume one way; None when this server refuses it."""
        assert request.partial is not None
        if way is Resume.ATTACH:
            return await self._attach(request, on_chunk, on_handle)
        try:
            return await self._ask(
                request, on_chunk, on_handle=on_handle, kept=request.partial.text
            )
        except ProviderInvalidRequest as error:
            if "prefill" in error.message.lower():
                return None
            raise

    async def _attach(
        self, request: LLMRequest, on_chunk: OnChunk, on_handle: OnHandle
    ) -> LLMResponse | None:
        assert request.partial is not None
        conversation = str(request.partial.handle["conversation_id"])
        path = f"/stream?conv_id={quote(conversation, safe='')}&from=0"
        collector = Collector()
        handle = {"kept_chars": len(request.partial.text), "conversation_id": conversation}
        on_handle(handle)
        chunks = _Replay(request.partial.text, on_chunk)
        try:
            async with self._http.stream(self._target, path) as stream:
                if not await self._read(stream, collector, chunks, handle=handle, told=on_handle):
                    return None
        except ProviderInvalidRequest as error:
            if error.status in (400, 404, 410):
                return None
            raise
        if not collector.finish and not chunks.is_ahead:
            return None
        self._require_end(collector)
        resumed = replace(self._answer(request, collector), resumed=Resume.ATTACH)
        return replace(resumed, resumed_from_tokens=kept_tokens(request))

    async def _ask(
        self, request: LLMRequest, on_chunk: OnChunk, *, on_handle: OnHandle, kept: str
    ) -> LLMResponse:
        handle: dict[str, Json] = {}
        if request.partial is not None:
            handle["kept_chars"] = len(kept)
        headers = {}
        if request.idempotency_key:
            headers["Idempotency-Key"] = request.idempotency_key
        if request.stream and request.idempotency_key and Resume.ATTACH in self._dialect.resume:
            handle["conversation_id"] = headers["X-Conversation-Id"] = request.idempotency_key
        body, collector = self._body(request, kept), Collector(kept)
        path = self._path(request.model)
        if request.stream:
            chunks = _Replay("", on_chunk)
            async with self._http.stream(self._target, path, body=body, headers=headers) as stream:
                on_handle(handle)
                await self._read(stream, collector, chunks, handle=handle, told=on_handle)
        else:
            whole = await self._http.post(self._target, path, body, headers=headers)
            on_handle(handle)
            collector.take_whole(whole)
        self._require_end(collector)
        answer = self._answer(request, collector)
        if request.partial is None:
            return answer
        how = Resume.PREFILL if kept else Resume.RESTART
        return replace(answer, resumed=how, resumed_from_tokens=kept_tokens(request) if kept else 0)

    async def _read(
        self,
        stream: Stream,
        collector: Collector,
        chunks: _Replay,
        *,
        handle: Mapping[str, Json],
        told: OnHandle,
    ) -> bool:
        """Take a stream to its end. False when it is not the one that we kept a part of."""
        if stream.whole is not None:
            return await chunks.put(collector.take_whole(stream.whole))
        try:
            async with aclosing(_data(stream)) as events:
                async for data in events:
                    text = collector.take(parse(self._target, data), self.name)
                    if not text:
                        continue
                    if not await chunks.put(text):
                        return False
                    told({**handle, "output_tokens": collector.pieces})
        except ProviderTransient:
            if not collector.finish:
                raise
        return chunks.is_whole

    def _require_end(self, collector: Collector) -> None:
        if not collector.finish:
            raise ProviderTransient(
                f"{self.name} cut its answer off after {collector.pieces} pieces",
                provider=self.name,
            )

    def _answer(self, request: LLMRequest, collector: Collector) -> LLMResponse:
        collector.raise_if_refused(self.name)
        used = collector.usage or Usage(prompt_tokens(request), collector.estimated_output)
        model = collector.model or request.model
        priced = self._prices.price(self.name, model, used=used)
        if not priced.is_priced:
            priced = self._prices.price(self.name, request.model, used=used)
        return LLMResponse(
            text=collector.text,
            model=model,
            usage=priced.usage,
            finish_reason=collector.finish,
            tool_calls=collector.tool_calls(self.name),
            response_id=collector.id,
            is_priced=priced.is_priced,
        )

    def _path(self, model: str) -> str:
        version = self._dialect.api_version
        if not version:
            return "/chat/completions"
        return f"{azure_path(self._target, model)}/chat/completions?api-version={quote(version)}"

    def _body(self, request: LLMRequest, kept: str) -> dict[str, Json]:
        messages = [dict(message) for message in request.messages]
        if request.system:
            messages.insert(0, {"role": "system", "content": request.system})
        body: dict[str, Json] = {"model": request.model, "messages": messages}
        if request.temperature is not None:
            body["temperature"] = request.temperature
        if request.max_tokens is not None:
            left = request.max_tokens - (kept_tokens(request) if kept else 0)
            body[self._dialect.limit_field] = max(left, 1)
        if request.response_schema is not None:
            body["response_format"] = _response_format(request.response_schema)
        if request.tools:
            body["tools"] = [_tool(tool) for tool in request.tools]
        if request.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if kept:
            last: dict[str, Json] = {"role": "assistant", "content": kept}
            if self._dialect.prefill is Prefill.PREFIX:
                last["prefix"] = True
            messages.append(last)
            if self._dialect.prefill is Prefill.FINAL_MESSAGE:
                body |= {"continue_final_message": True, "add_generation_prompt": False}
        body |= request.extra
        if body.get("store") and request.idempotency_key:
            own = {"idempotency_key": request.idempotency_key[:512]}
            body["metadata"] = {**own, **(body.get("metadata") or {})}
        return body


class _Replay:
    """Hands chunks on. With a kept text, first checks that the stream repeats exactly that."""

    def __init__(self, kept: str, on_chunk: OnChunk) -> None:
        self._left = kept
        self._on_chunk = on_chunk
        self.is_ahead = False
        """True once something new has been handed on."""

    @property
    def is_whole(self) -> bool:
        """True when all of the kept text has come by."""
        return not self._left

    async def put(self, text: str) -> bool:
        """False when the stream says something else than the kept text."""
        if self._left:
            size = min(len(self._left), len(text))
            if self._left[:size] != text[:size]:
                return False
            self._left, text = self._left[size:], text[size:]
        if text:
            self.is_ahead = True
            await self._on_chunk(text)
        return True


async def _data(stream: Stream) -> AsyncGenerator[str, None]:
    async with aclosing(stream.events()) as events:
        async for event in events:
            if event.data == DONE:
                return
            yield event.data


def require_key(target: Target, *, is_required: bool) -> None:
    """Refuse to call without a key where one is needed."""
    if is_required and not target.key:
        raise ProviderAuthentication(
            f"no key for {target.provider}",
            provider=target.provider,
            hint=key_hint(target.variable),
        )


def azure_path(target: Target, model: str) -> str:
    """Where a deployment lives, unless the address names it already."""
    if any("/deployments/" in url for url in target.base_urls):
        return ""
    return f"/openai/deployments/{quote(model, safe='')}"


def _tool(tool: Mapping[str, Json]) -> Json:
    if "function" in tool or tool.get("type", "function") != "function":
        return tool
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}


def _response_format(schema: Mapping[str, Json]) -> Json:
    form = {"name": "answer", "schema": schema, "strict": _is_strict(schema)}
    return {"type": "json_schema", "json_schema": form}


def _is_strict(schema: Json) -> bool:
    """May strict mode be asked for? Every object must be closed and all its properties required."""
    if isinstance(schema, list):
        return all(_is_strict(part) for part in schema)
    if not isinstance(schema, Mapping):
        return True
    if schema.get("type") == "object" or "properties" in schema:
        names = set(schema.get("properties", {}))
        if schema.get("additionalProperties") is not False or names != set(
            schema.get("required", [])
        ):
            return False
    return all(_is_strict(part) for part in schema.values())

"""Anthropic's messages API.

How a half-streamed answer goes on depends on the model. Up to 4.5 the partial answer is sent as the
last message and continued (prefill). From 4.6 on that is refused with 400: the partial answer goes
back as a finished turn, and a user turn asks to continue exactly (continue_turn). A model whose
version cannot be read gets the second way, which every model takes.

The API refuses a last message that ends in whitespace, so a kept prefix is sent without it, and as
much of it as the answer repeats is dropped from the answer: the whole text has it once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import aclosing

from llm_orchestrator.errors import (
    ProviderContentFiltered,
    ProviderInvalidRequest,
    ProviderTransient,
)
from llm_orchestrator.model import Json, Usage
from llm_orchestrator.providers.answers import kept_tokens
from llm_orchestrator.providers.base import LLMRequest, LLMResponse, OnChunk, Resume
from llm_orchestrator.providers.conversation import to_anthropic
from llm_orchestrator.providers.failures import Failure, stream_error
from llm_orchestrator.providers.http import HttpClient, Stream, Target, parse
from llm_orchestrator.providers.openai import require_key
from llm_orchestrator.providers.prices import PriceBook

OFFICIAL_URL = "https://api.anthropic.com/v1"
API_VERSION = "2023-06-01"
CONTINUE = (
    "Continue exactly where you stopped. Your next words follow directly after the last character "
    "above: repeat nothing, add no introduction and no remark."
)
_TOKENS_MAX = 4096
_VERSION = re.compile(r"claude-(?:[a-z]+-)?(\d{1,2})(?:[-.](\d{1,2}))?(?![\d])")
_FINISH = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}


class Anthropic:
    """Claude, over the messages API."""

    def __init__(
        self, target: Target, http: HttpClient, *, prices: PriceBook, is_key_required: bool = True
    ) -> None:
        self.name = target.provider
        self._target = target
        self._http = http
        self._prices = prices
        self._is_key_required = is_key_required

    async def complete(
        self,
        request: LLMRequest,
        on_chunk: OnChunk,
        on_handle: Callable[[Mapping[str, Json]], None],
    ) -> LLMResponse:
        """Ask once, or go on with `request.partial` as the model allows."""
        require_key(self._target, is_required=self._is_key_required)
        way = resume_way(request)
        try:
            return await self._ask(request, way, on_chunk, on_handle=on_handle)
        except ProviderInvalidRequest as error:
            if way is not Resume.PREFILL or "prefill" not in error.message.lower():
                raise
        return await self._ask(request, Resume.CONTINUE_TURN, on_chunk, on_handle=on_handle)

    async def close(self) -> None:
        """Nothing: whoever made the HTTP client closes it."""

    async def _ask(
        self,
        request: LLMRequest,
        way: Resume | None,
        on_chunk: OnChunk,
        *,
        on_handle: Callable[[Mapping[str, Json]], None],
    ) -> LLMResponse:
        is_resumed = way in (Resume.PREFILL, Resume.CONTINUE_TURN)
        kept = request.partial.text if request.partial and is_resumed else ""
        handle: dict[str, Json] = {} if way is None else {"kept_chars": len(kept)}
        answer = _Answer(kept)
        headers = {"Idempotency-Key": request.idempotency_key} if request.idempotency_key else {}
        body = _body(request, way, kept)
        if request.stream:
            async with self._http.stream(
                self._target, "/messages", body=body, headers=headers
            ) as stream:
                on_handle(handle)
                await self._read(stream, answer, on_chunk, handle=handle, told=on_handle)
        else:
            answer.take_whole(
                await self._http.post(self._target, "/messages", body, headers=headers), self.name
            )
            on_handle(handle)
        return self._finish(request, way, answer)

    async def _read(
        self,
        stream: Stream,
        answer: _Answer,
        on_chunk: OnChunk,
        *,
        handle: Mapping[str, Json],
        told: Callable[[Mapping[str, Json]], None],
    ) -> None:
        if stream.whole is not None:
            if text := answer.take_whole(stream.whole, self.name):
                await on_chunk(text)
            return
        try:
            async with aclosing(stream.events()) as events:
                async for event in events:
                    if text := answer.take(parse(self._target, event.data), self.name):
                        await on_chunk(text)
                        told({**handle, "output_tokens": answer.pieces})
        except ProviderTransient:
            if not answer.stop:
                raise

    def _finish(self, request: LLMRequest, way: Resume | None, answer: _Answer) -> LLMResponse:
        if not answer.stop:
            raise ProviderTransient(
                f"{self.name} cut its answer off after {answer.pieces} pieces", provider=self.name
            )
        finish = _FINISH.get(answer.stop, answer.stop)
        if finish == "content_filter":
            raise ProviderContentFiltered(
                f"{self.name} refused to answer", provider=self.name, hint="change the prompt"
            )
        model = answer.model or request.model
        priced = self._prices.price(
            "anthropic", model, used=answer.usage, cache_write_tokens=answer.written
        )
        is_resumed = way in (Resume.PREFILL, Resume.CONTINUE_TURN)
        return LLMResponse(
            text=answer.text,
            model=model,
            usage=priced.usage,
            finish_reason=finish,
            tool_calls=answer.tool_calls(self.name),
            response_id=answer.id,
            resumed=way,
            resumed_from_tokens=kept_tokens(request) if is_resumed else 0,
            is_priced=priced.is_priced,
        )


def resume_way(request: LLMRequest) -> Resume | None:
    """How this request's partial answer goes on; None without one."""
    if request.partial is None:
        return None
    if not request.partial.text.strip():
        return Resume.RESTART
    version = model_version(request.model)
    is_old = version is not None and version <= (4, 5)
    return Resume.PREFILL if is_old else Resume.CONTINUE_TURN


def model_version(model: str) -> tuple[int, int] | None:
    """(4, 5) of claude-sonnet-4-5-20250929, (3, 5) of claude-3-5-haiku-latest; None if unknown."""
    match = _VERSION.search(model)
    return (int(match[1]), int(match[2] or 0)) if match else None


def _body(request: LLMRequest, way: Resume | None, kept: str) -> dict[str, Json]:
    system, messages = to_anthropic(request.messages, request.system)
    limit = request.max_tokens or _TOKENS_MAX
    if kept:
        limit = max(limit - kept_tokens(request), 1)
        messages.append({"role": "assistant", "content": kept.rstrip()})
    if way is Resume.CONTINUE_TURN:
        messages.append({"role": "user", "content": CONTINUE})
    body: dict[str, Json] = {"model": request.model, "messages": messages, "max_tokens": limit}
    if request.temperature is not None:
        body["temperature"] = request.temperature
    if request.response_schema is not None:
        version = model_version(request.model)
        if version is not None and version < (4, 5):
            wanted = f"Answer only with JSON that fits: {json.dumps(request.response_schema)}"
            system = f"{system}\n\n{wanted}" if system else wanted
        else:
            form = {"type": "json_schema", "schema": request.response_schema}
            body["output_config"] = {"format": form}
    if system:
        body["system"] = system
    if request.tools:
        body["tools"] = [_tool(tool) for tool in request.tools]
    if request.stream:
        body["stream"] = True
    return {**body, **request.extra}


def _tool(tool: Mapping[str, Json]) -> Json:
    if "input_schema" in tool or tool.get("type", "function") != "function":
        return tool
    function = tool.get("function", tool)
    made = {"name": function["name"], "input_schema": function.get("parameters") or _ANY}
    return made | ({"description": function["description"]} if function.get("description") else {})


_ANY: Mapping[str, Json] = {"type": "object", "properties": {}}


class _Answer:
    """The answer so far, from one body or from the events of a stream."""

    def __init__(self, kept: str) -> None:
        self._kept = kept
        self._gap = kept[len(kept.rstrip()) :]
        self._parts: list[str] = []
        self._tools: dict[int, dict[str, str]] = {}
        self.pieces = 0
        self.stop = ""
        self.id = ""
        self.model = ""
        self.usage = Usage()
        self.written = 0

    @property
    def text(self) -> str:
        return self._kept + "".join(self._parts)

    def take(self, event: Json, provider: str) -> str:
        """Take one event; returns the new text."""
        kind = event.get("type") if isinstance(event, Mapping) else None
        if kind == "error":
            raise stream_error(Failure(provider), event)
        if kind == "message_start":
            self._note(event["message"])
        elif kind == "message_delta":
            self.stop = (event.get("delta") or {}).get("stop_reason") or self.stop
            self._count(event.get("usage") or {})
        elif kind == "content_block_start":
            return self._begin_block(int(event["index"]), event["content_block"])
        elif kind == "content_block_delta":
            return self._take_delta(int(event["index"]), event["delta"])
        return ""

    def take_whole(self, body: Json, provider: str) -> str:
        """Take an answer that came in one piece; returns its text."""
        if not isinstance(body, Mapping) or not isinstance(body.get("content"), list):
            raise ProviderTransient(f"{provider} answered without content", provider=provider)
        self._note(body)
        for index, block in enumerate(body["content"]):
            self._begin_block(index, block)
            if block.get("type") == "tool_use":
                self._tools[index]["json"] = json.dumps(block.get("input") or {})
        self.stop = body.get("stop_reason") or "end_turn"
        return "".join(self._parts)

    def tool_calls(self, provider: str) -> list[Mapping[str, Json]]:
        """Whole calls, in order, with their arguments parsed."""
        calls: list[Mapping[str, Json]] = []
        for _, tool in sorted(self._tools.items()):
            try:
                arguments = json.loads(tool["json"] or "{}")
            except ValueError as error:
                raise ProviderTransient(
                    f"{provider} called tool {tool['name']!r} with arguments that are not JSON",
                    provider=provider,
                ) from error
            calls.append({"id": tool["id"], "name": tool["name"], "arguments": arguments})
        return calls

    def _begin_block(self, index: int, block: Mapping[str, Json]) -> str:
        if block.get("type") == "tool_use":
            self._tools[index] = {"id": block["id"], "name": block["name"], "json": ""}
        return self._add(block.get("text") or "") if block.get("type") == "text" else ""

    def _take_delta(self, index: int, delta: Mapping[str, Json]) -> str:
        if delta.get("type") == "input_json_delta" and index in self._tools:
            self._tools[index]["json"] += delta.get("partial_json") or ""
        return self._add(delta.get("text") or "") if delta.get("type") == "text_delta" else ""

    def _add(self, text: str) -> str:
        if text:
            self.pieces += 1
        while self._gap and text.startswith(self._gap[0]):
            self._gap, text = self._gap[1:], text[1:]
        if text:
            self._gap = ""
            self._parts.append(text)
        return text

    def _note(self, message: Mapping[str, Json]) -> None:
        self.id = message.get("id") or self.id
        self.model = message.get("model") or self.model
        self._count(message.get("usage") or {})

    def _count(self, used: Mapping[str, Json]) -> None:
        if used.get("input_tokens") is not None:
            cached = int(used.get("cache_read_input_tokens") or 0)
            self.written = int(used.get("cache_creation_input_tokens") or 0)
            total = int(used["input_tokens"]) + cached + self.written
            self.usage = Usage(total, self.usage.output_tokens, cached)
        if used.get("output_tokens") is not None:
            sent = int(used["output_tokens"])
            self.usage = Usage(self.usage.input_tokens, sent, self.usage.cached_tokens)

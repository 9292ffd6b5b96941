"""What the fake LLM server reads and writes in each provider's wire format; no I/O.

One `Ask` comes out of every request, one class per format turns an answer into bytes. Shapes follow
the providers' public references; a field that no client of ours reads may be missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from llm_orchestrator.drill.fake_script import Answer, Behaviour, count, digest, text_of

Json = Any


@dataclass(frozen=True, slots=True)
class Ask:
    """A request, whichever format it came in. `turns` are (role, text) without the prefix."""

    model: str
    turns: Sequence[tuple[str, str]]
    is_stream: bool = False
    max_tokens: int = 0
    schema: Json = None
    prefix: str = ""
    is_continue_turn: bool = False
    metadata: Mapping[str, Json] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """Every turn's text, one a line."""
        return "\n".join(text for _, text in self.turns)

    @property
    def input_tokens(self) -> int:
        """What the question costs: its turns and the prefix."""
        return count(self.prompt) + (count(self.prefix) if self.prefix else 0)

    @property
    def sha(self) -> str:
        """The question's name: the same for a first attempt and a resumed one."""
        return digest([self.model, list(self.turns)])

    @property
    def has_tool_result(self) -> bool:
        """True when a tool has answered: the model then answers in words."""
        return bool(self.turns) and self.turns[-1][0] == "tool"


@dataclass(frozen=True, slots=True)
class Call:
    """A request that was recorded, with what it is to get."""

    id: str
    ask: Ask
    act: Behaviour
    answer: Answer

    @property
    def input_tokens(self) -> int:
        return self.ask.input_tokens

    @property
    def tool(self) -> str:
        """Name of the tool to call, or nothing."""
        return "" if self.ask.has_tool_result else self.act.tool

    @property
    def arguments(self) -> Json:
        return self.act.json if isinstance(self.act.json, dict) else {}


class Wire(Protocol):
    """One provider's chat format."""

    api: str

    def ask(self, body: Mapping[str, Json]) -> Ask: ...

    def refusal(self, ask: Ask, act: Behaviour) -> str:
        """Why this prefix is refused, or nothing."""
        ...

    def whole(self, call: Call) -> Json: ...

    def head(self, call: Call) -> bytes: ...

    def chunk(self, call: Call, token: str) -> bytes: ...

    def tail(self, call: Call) -> bytes: ...

    def error(self, status: int, message: str, kind: str = "") -> Json: ...

    def stream_error(self, kind: str) -> bytes: ...


def _peel(turns: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], str, bool]:
    """Take a trailing partial answer off: prefilled, or followed by a turn that says continue."""
    if turns and turns[-1][0] == "assistant":
        return turns[:-1], turns[-1][1], False
    is_turn = len(turns) > 2 and turns[-2][0] == "assistant" and turns[-1][0] == "user"
    if is_turn and turns[-1][1].lower().startswith("continue exactly"):
        return turns[:-2], turns[-2][1], True
    return turns, "", False


def _sse(data: Json, event: str = "") -> bytes:
    head = f"event: {event}\n" if event else ""
    return f"{head}data: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


class OpenAIWire:
    """Chat completions, as OpenAI, vLLM and llama.cpp speak them.

    An assistant-last message is continued; a whole answer echoes the prefix, a stream does not.
    """

    api = "openai.chat"

    def ask(self, body: Mapping[str, Json]) -> Ask:
        turns = [(str(m["role"]), text_of(m.get("content"))) for m in body["messages"]]
        turns, prefix, is_turn = _peel(turns)
        form = body.get("response_format") or {}
        return Ask(
            model=str(body["model"]),
            turns=turns,
            is_stream=bool(body.get("stream")),
            max_tokens=int(body.get("max_completion_tokens") or body.get("max_tokens") or 0),
            schema=form.get("json_schema", {}).get("schema"),
            prefix=prefix,
            is_continue_turn=is_turn,
            metadata=body.get("metadata") or {},
        )

    def refusal(self, ask: Ask, act: Behaviour) -> str:
        if ask.prefix and not ask.is_continue_turn and act.refuse_prefill:
            return "Assistant response prefill is incompatible with enable_thinking."
        return ""

    def usage(self, call: Call) -> Json:
        sent = len(call.answer.tokens)
        return {
            "prompt_tokens": call.input_tokens,
            "completion_tokens": sent,
            "total_tokens": call.input_tokens + sent,
            "prompt_tokens_details": {"cached_tokens": call.act.cached},
        }

    def _tools(self, call: Call) -> Json:
        function = {"name": call.tool, "arguments": json.dumps(call.arguments)}
        return [{"index": 0, "id": f"call_{call.id}", "type": "function", "function": function}]

    def _finish(self, call: Call) -> str:
        if call.act.filter:
            return "content_filter"
        return "tool_calls" if call.tool else call.answer.finish

    def _frame(self, call: Call, delta: Json, finish: str | None = None) -> Json:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return self._base(call, "chat.completion.chunk") | {"choices": [choice]}

    def _base(self, call: Call, kind: str) -> dict[str, Json]:
        return {"id": f"chatcmpl-{call.id}", "object": kind, "created": 0, "model": call.ask.model}

    def whole(self, call: Call) -> Json:
        message: dict[str, Json] = {"role": "assistant", "content": None}
        if call.tool:
            message["tool_calls"] = self._tools(call)
        else:
            echo = "" if call.act.no_echo or call.ask.is_continue_turn else call.ask.prefix
            message["content"] = echo + call.answer.text
        choice = {"index": 0, "message": message, "finish_reason": self._finish(call)}
        whole = self._base(call, "chat.completion") | {"choices": [choice]}
        return whole if call.act.no_usage else whole | {"usage": self.usage(call)}

    def head(self, call: Call) -> bytes:
        first = _sse(self._frame(call, {"role": "assistant", "content": ""}))
        return first + _sse(self._frame(call, {"tool_calls": self._tools(call)})) * bool(call.tool)

    def chunk(self, call: Call, token: str) -> bytes:
        return _sse(self._frame(call, {"content": token}))

    def tail(self, call: Call) -> bytes:
        end = _sse(self._frame(call, {}, self._finish(call)))
        if not call.act.no_usage:
            base = self._base(call, "chat.completion.chunk")
            end += _sse(base | {"choices": [], "usage": self.usage(call)})
        return end + b"data: [DONE]\n\n"

    def error(self, status: int, message: str, kind: str = "") -> Json:
        kinds = {401: "invalid_api_key", 429: "rate_limit_exceeded"}
        return {"error": {"message": message, "type": kind or "error", "code": kinds.get(status)}}

    def stream_error(self, kind: str) -> bytes:
        return _sse(self.error(500, f"The server had an error: {kind}", kind))


class AnthropicWire:
    """The messages API. Models from 4.6 on refuse a prefill, older ones continue it."""

    api = "anthropic.messages"

    def ask(self, body: Mapping[str, Json]) -> Ask:
        turns = [("system", text_of(body["system"]))] if body.get("system") else []
        for message in body["messages"]:
            content, role = message["content"], str(message["role"])
            blocks = content if isinstance(content, list) else []
            is_tool = any(block.get("type") == "tool_result" for block in blocks)
            turns.append(("tool" if is_tool else role, text_of(content)))
        turns, prefix, is_turn = _peel(turns)
        form = (body.get("output_config") or {}).get("format") or {}
        return Ask(
            model=str(body["model"]),
            turns=turns,
            is_stream=bool(body.get("stream")),
            max_tokens=int(body["max_tokens"]),
            schema=form.get("schema"),
            prefix=prefix,
            is_continue_turn=is_turn,
            metadata=body.get("metadata") or {},
        )

    def refusal(self, ask: Ask, act: Behaviour) -> str:
        if not ask.prefix or ask.is_continue_turn:
            return ""
        version = re.search(r"-(\d)-?(\d)?(?=-|$)", ask.model)
        newest = version is not None and (int(version[1]), int(version[2] or 0)) >= (4, 6)
        if act.refuse_prefill or newest:
            return "This model does not support assistant message prefill."
        if ask.prefix != ask.prefix.rstrip():
            return "messages: final assistant content cannot end with trailing whitespace"
        return ""

    def _usage(self, call: Call, sent: int) -> Json:
        fresh = max(call.input_tokens - call.act.cached, 0)
        cached = {"cache_read_input_tokens": call.act.cached, "cache_creation_input_tokens": 0}
        return {"input_tokens": fresh, "output_tokens": sent} | cached

    def _stop(self, call: Call) -> str:
        if call.act.filter:
            return "refusal"
        if call.tool:
            return "tool_use"
        return {"stop": "end_turn", "length": "max_tokens"}[call.answer.finish]

    def _message(self, call: Call, content: Json, stop: str | None) -> Json:
        return {
            "id": f"msg_{call.id}",
            "type": "message",
            "role": "assistant",
            "model": call.ask.model,
            "content": content,
            "stop_reason": stop,
            "usage": self._usage(call, len(call.answer.tokens) if stop else 1),
        }

    def _tool(self, call: Call, arguments: Json) -> Json:
        return {"type": "tool_use", "id": f"toolu_{call.id}", "name": call.tool, "input": arguments}

    def whole(self, call: Call) -> Json:
        block = {"type": "text", "text": call.answer.text}
        content = [self._tool(call, call.arguments) if call.tool else block]
        return self._message(call, content, self._stop(call))

    def head(self, call: Call) -> bytes:
        block = self._tool(call, {}) if call.tool else {"type": "text", "text": ""}
        start = _event("message_start", message=self._message(call, [], None))
        start += _event("content_block_start", index=0, content_block=block) + _event("ping")
        if call.tool:
            part = {"type": "input_json_delta", "partial_json": json.dumps(call.arguments)}
            start += _event("content_block_delta", index=0, delta=part)
        return start

    def chunk(self, call: Call, token: str) -> bytes:
        delta = {"type": "text_delta", "text": token}
        return _event("content_block_delta", index=0, delta=delta)

    def tail(self, call: Call) -> bytes:
        sent = {"output_tokens": len(call.answer.tokens)}
        delta = {"stop_reason": self._stop(call), "stop_sequence": None}
        end = _event("message_delta", delta=delta, usage=sent)
        return _event("content_block_stop", index=0) + end + _event("message_stop")

    def error(self, status: int, message: str, kind: str = "") -> Json:
        kinds = {401: "authentication_error", 429: "rate_limit_error", 529: "overloaded_error"}
        detail = {"type": kind or kinds.get(status, "api_error"), "message": message}
        return {"type": "error", "error": detail}

    def stream_error(self, kind: str) -> bytes:
        return _sse(self.error(500, f"The server had an error: {kind}", kind), "error")


def _event(kind: str, **data: Json) -> bytes:
    return _sse({"type": kind} | data, kind)


def openai_embeddings(body: Mapping[str, Json], vectors: Sequence[Sequence[float]]) -> Json:
    """The answer of OpenAI's /v1/embeddings."""
    data = [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(vectors)]
    tokens = sum(count(text) for text in embedding_texts(body))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": body["model"], "usage": usage}


def cohere_embeddings(body: Mapping[str, Json], vectors: Sequence[Sequence[float]]) -> Json:
    """The answer of Cohere's /v2/embed, or of /v1/embed when no embedding type is asked for."""
    tokens = sum(count(text) for text in embedding_texts(body))
    found: Json = {"float": vectors} if body.get("embedding_types") else vectors
    meta = {"api_version": {"version": "2"}, "billed_units": {"input_tokens": tokens}}
    return {"id": digest(body), "embeddings": found, "texts": body["texts"], "meta": meta}


def embedding_texts(body: Mapping[str, Json]) -> list[str]:
    """The texts to embed, of either format."""
    texts = body.get("input", body.get("texts"))
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("texts must be a list of strings")
    return texts

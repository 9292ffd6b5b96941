"""Puts an OpenAI-shaped answer together, from one body or from the pieces of a stream. No I/O."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from llm_orchestrator.errors import ProviderContentFiltered, ProviderTransient
from llm_orchestrator.model import Json, Usage
from llm_orchestrator.providers.base import LLMRequest
from llm_orchestrator.providers.failures import Failure, stream_error

_CHARS_PER_TOKEN = 4


def estimate_tokens(text: str) -> int:
    """About how many tokens a text has, where no provider says it."""
    return -(-len(text) // _CHARS_PER_TOKEN)


def prompt_tokens(request: LLMRequest) -> int:
    """About how many tokens a request sends."""
    sizes = [len(request.system or "")]
    for message in request.messages:
        content = message.get("content")
        sizes.append(len(content if isinstance(content, str) else json.dumps(content or "")) + 8)
    sizes.append(len(json.dumps(list(request.tools))) if request.tools else 0)
    return sum(sizes) // _CHARS_PER_TOKEN


def kept_tokens(request: LLMRequest) -> int:
    """About how many tokens of the answer are there already."""
    partial = request.partial
    if partial is None:
        return 0
    return partial.tokens or estimate_tokens(partial.text)


class Collector:
    """The answer so far. `kept` is the prefix that the provider continues."""

    def __init__(self, kept: str = "") -> None:
        self._kept = kept
        self._parts: list[str] = []
        self._tools: dict[int, dict[str, str]] = {}
        self._refusal = ""
        self.pieces = 0
        self.finish = ""
        self.id = ""
        self.model = ""
        self.usage: Usage | None = None

    @property
    def text(self) -> str:
        """Everything, the kept prefix included."""
        return self._kept + "".join(self._parts)

    @property
    def estimated_output(self) -> int:
        """Tokens that were made, for servers that do not say."""
        return max(self.pieces, sum(estimate_tokens(part) for part in self._parts) // 2)

    def take(self, chunk: Json, provider: str) -> str:
        """Take one event of a stream; returns the new text."""
        if not isinstance(chunk, Mapping):
            raise ProviderTransient(f"{provider} streamed {type(chunk).__name__}, not an object")
        if chunk.get("error"):
            raise stream_error(Failure(provider), chunk)
        self._note(chunk)
        choices = chunk.get("choices") or [{}]
        delta = choices[0].get("delta") or {}
        self.finish = choices[0].get("finish_reason") or self.finish
        self._take_tools(delta.get("tool_calls") or ())
        self._refusal += delta.get("refusal") or ""
        text = delta.get("content") or ""
        if text:
            self.pieces += 1
            self._parts.append(text)
        return str(text)

    def take_whole(self, body: Json) -> str:
        """Take an answer that came in one piece; returns the new text, without an echoed prefix."""
        try:
            choice = body["choices"][0]
            message = choice["message"]
            text = message.get("content") or ""
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ProviderTransient("the answer has no message") from error
        self._note(body)
        text = text.removeprefix(self._kept)
        self._parts.append(text)
        self.pieces += estimate_tokens(text)
        self._take_tools(message.get("tool_calls") or ())
        self._refusal = message.get("refusal") or ""
        self.finish = choice.get("finish_reason") or "stop"
        return str(text)

    def raise_if_refused(self, provider: str) -> None:
        """Content filters end an answer; what is left of it is no answer."""
        if self.finish == "content_filter" or self._refusal:
            raise ProviderContentFiltered(
                f"{provider} filtered the answer: {self._refusal or 'content_filter'}"[:400],
                provider=provider,
                hint="change the prompt",
            )

    def tool_calls(self, provider: str) -> Sequence[Mapping[str, Json]]:
        """Whole calls, in order, with their arguments parsed."""
        return [_tool_call(tool, provider) for _, tool in sorted(self._tools.items())]

    def _note(self, body: Mapping[str, Json]) -> None:
        self.id = body.get("id") or self.id
        self.model = body.get("model") or self.model
        used = body.get("usage")
        if used:
            details = used.get("prompt_tokens_details") or {}
            cached = details.get("cached_tokens") or used.get("prompt_cache_hit_tokens") or 0
            self.usage = Usage(
                int(used.get("prompt_tokens") or 0),
                int(used.get("completion_tokens") or 0),
                int(cached),
            )

    def _take_tools(self, parts: Sequence[Json]) -> None:
        for place, part in enumerate(parts):
            index = part.get("index")
            index = place if index is None else index
            tool = self._tools.setdefault(index, {"id": "", "name": "", "arguments": ""})
            function = part.get("function") or {}
            tool["id"] = part.get("id") or tool["id"]
            tool["name"] = function.get("name") or tool["name"]
            tool["arguments"] += function.get("arguments") or ""


def _tool_call(tool: Mapping[str, str], provider: str) -> Mapping[str, Json]:
    try:
        arguments = json.loads(tool["arguments"] or "{}")
    except ValueError as error:
        raise ProviderTransient(
            f"{provider} called tool {tool['name']!r} with arguments that are not JSON",
            provider=provider,
        ) from error
    return {"id": tool["id"], "name": tool["name"], "arguments": arguments}

"""Step type `llm`: one question to a language model, with fallbacks, re-asks and resumed streams.

It never retries one provider (the engine does, by policy) and never runs a tool: tool calls come
out as data, and other steps act on them. Invariant: what readers see of the stream, what is kept
for a resume and what comes out as `text` are the same answer; whenever another answer begins, the
stream is reset first.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from llm_orchestrator.errors import (
    AuthorError,
    ProviderAuthentication,
    ProviderError,
    ProviderTransient,
    ProviderUnavailable,
)
from llm_orchestrator.language.sandbox import aside
from llm_orchestrator.model import Effect, Json, Usage
from llm_orchestrator.providers.base import LLMRequest, LLMResponse, Partial, Resume
from llm_orchestrator.steps.base import Outputs, StepContext
from llm_orchestrator.steps.values import further_options, parse_json
from llm_orchestrator.telemetry.genai import Asked
from llm_orchestrator.telemetry.propagation import asked

FALL_BACK_ON = (ProviderTransient, ProviderAuthentication)
"""Transient, rate limit, timeout and unavailable are all ProviderTransient."""


class LLM:
    """Asks a model; `output` binds text, model, tokens, metadata, data, tool_calls."""

    type: ClassVar[str] = "llm"
    outputs: ClassVar[tuple[str, ...]] = (
        "text",
        "model",
        "tokens",
        "metadata",
        "data",
        "tool_calls",
    )
    is_paid: ClassVar[bool] = True

    def effect(self, config: Any) -> Effect:
        """Asking again costs money and changes nothing."""
        return Effect.REPEATABLE

    async def execute(self, context: StepContext, config: Any) -> Outputs:
        """Ask the first target that answers. Raises the most hopeful error when none does."""
        targets = _targets(context, config)
        if context.partial is not None and targets[0].partial is None:
            await context.reset_stream()
        failures: list[tuple[_Target, ProviderError]] = []
        for target in targets:
            if failures:
                context.note("fallback", _describe_fallback(failures, target))
                await context.reset_stream()
            try:
                return await _Conversation(context, config, target).hold()
            except FALL_BACK_ON as error:
                failures.append((target, error))
        raise _most_hopeful([error for _, error in failures])


@dataclass(frozen=True, slots=True)
class _Target:
    """A provider and model to ask, and what an earlier attempt kept of its conversation."""

    number: int
    provider: str
    model: str
    extra: Mapping[str, Json] = field(default_factory=dict)
    follow_up: Sequence[Mapping[str, Json]] = ()
    partial: Partial | None = None


@dataclass(slots=True)
class _Conversation:
    """One target's question, its re-asks included."""

    context: StepContext
    config: Any
    target: _Target
    usage: Usage = field(default_factory=Usage)

    async def hold(self) -> Outputs:
        """Ask until the answer fits `response_schema`, at most `reask_max` times more."""
        reask_max = self.config.reask_max
        follow_up = list(self.target.follow_up)
        partial = self.target.partial
        problem = ""
        for reask in range(min(len(follow_up) // 2, reask_max), reask_max + 1):
            response = await self._ask(follow_up, partial, reask)
            data, problem = await aside(functools.partial(self._read, response))
            if not problem:
                return self._outputs(response, data)
            follow_up += _ask_again(response.text, problem)
            partial = None
            if reask < reask_max:
                self.context.note("reasks", reask + 1)
                await self.context.reset_stream()
        raise AuthorError(
            f"{self.target.provider}/{self.target.model} gave no answer that fits response_schema"
            f" in {reask_max + 1} tries; the last one: {problem}",
            hint="loosen response_schema, say the shape in the prompt, or use a stronger model",
        )

    async def _ask(
        self, follow_up: Sequence[Mapping[str, Json]], partial: Partial | None, reask: int
    ) -> LLMResponse:
        provider = self.context.providers.llm(self.target.provider)
        prefix = (partial.text or None) if partial else None
        stream = _Stream(self.context, self._kept(follow_up), prefix)
        stream.begin({} if partial is None else partial.handle)
        asked(Asked("chat", self.target.provider, self.target.model))
        response = await provider.complete(
            self._request(follow_up, partial, reask), stream.show, stream.keep
        )
        self.usage += response.usage
        self.context.add_usage(response.usage)
        self._trace(response)
        await stream.settle(response)
        return response

    def _trace(self, response: LLMResponse) -> None:
        question = Asked(
            "chat",
            self.target.provider,
            self.target.model,
            response.model,
            response.response_id,
            response.finish_reason,
            self.usage.input_tokens,
            self.usage.output_tokens,
            self.usage.cached_tokens,
        )
        resumed = response.resumed_from_tokens
        asked(question, cost_usd=self.usage.cost_usd, resumed_from_tokens=resumed)

    def _request(
        self, follow_up: Sequence[Mapping[str, Json]], partial: Partial | None, reask: int
    ) -> LLMRequest:
        config = self.config
        return LLMRequest(
            model=self.target.model,
            messages=[*_messages(config), *follow_up],
            system=config.system,
            temperature=config.temperature,
            max_tokens=config.max_tokens,
            response_schema=config.response_schema,
            tools=config.tools,
            extra={**config.free, **self.target.extra},
            idempotency_key=self._key(reask),
            stream=config.stream,
            partial=partial,
        )

    def _key(self, reask: int) -> str:
        """Another question needs another key, or its receiver answers with the first one's."""
        suffix = f".{self.target.number}.{reask}" if self.target.number or reask else ""
        return self.context.idempotency_key + suffix

    def _kept(self, follow_up: Sequence[Mapping[str, Json]]) -> dict[str, Json]:
        return {
            "provider": self.target.provider,
            "model": self.target.model,
            "follow_up": list(follow_up),
        }

    def _read(self, response: LLMResponse) -> tuple[Json, str]:
        """The parsed answer and what is wrong with it. A call of a tool is no answer yet."""
        schema = self.config.response_schema
        if not schema or response.tool_calls:
            return None, ""
        try:
            data = parse_json(response.text, what="the answer")
        except AuthorError as error:
            return None, error.message
        return data, "; ".join(_find_problems(data, schema))

    def _outputs(self, response: LLMResponse, data: Json) -> Outputs:
        return {
            "text": response.text,
            "model": response.model,
            "tokens": self.usage.input_tokens + self.usage.output_tokens,
            "metadata": {
                "provider": self.target.provider,
                "finish_reason": response.finish_reason,
                "response_id": response.response_id,
                "usage": self.usage.to_json(),
                "is_priced": response.is_priced,
                "resumed_from_tokens": response.resumed_from_tokens,
            },
            "data": data,
            "tool_calls": [dict(call) for call in response.tool_calls],
        }


@dataclass(slots=True)
class _Stream:
    """Shows one answer's text, keeps its handle, and drops what of a kept prefix is of no use.

    Before its first chunk a provider that was given a partial says in its handle how many
    characters of it stand (`kept_chars`).
    """

    context: StepContext
    kept: Mapping[str, Json]
    prefix: str | None
    """The partial answer that readers have seen; None when this answer begins at its start."""
    handle: Mapping[str, Json] = field(default_factory=dict)
    kept_chars: int | None = None

    def begin(self, handle: Mapping[str, Json]) -> None:
        """Keep who is asked what, before the first chunk can be kept."""
        self.handle = {key: value for key, value in handle.items() if key != "kept_chars"}
        self.context.keep_handle({**self.kept, "handle": dict(self.handle)})

    def keep(self, handle: Mapping[str, Json]) -> None:
        """Keep the provider's handle under the name of who made it."""
        self.kept_chars = handle.get("kept_chars", self.kept_chars)
        self.begin(handle)

    async def show(self, text: str) -> None:
        """Pass new text on; first drop what the provider does not go on from."""
        if self.prefix is not None and self.kept_chars is not None:
            if self.kept_chars < len(self.prefix):
                await self._show_instead(self.prefix[: self.kept_chars])
            self.prefix = None
        await self.context.emit(text)

    async def settle(self, response: LLMResponse) -> None:
        """Note how the answer was resumed. A restart that nobody announced is mended here."""
        if response.resumed is not None:
            self.context.note("resume", response.resumed.value)
        if response.resumed_from_tokens:
            self.context.note("resumed_from_tokens", response.resumed_from_tokens)
        if self.prefix is not None and response.resumed in {None, Resume.RESTART}:
            await self._show_instead(response.text)

    async def _show_instead(self, text: str) -> None:
        await self.context.reset_stream()
        self.begin(self.handle)
        if text:
            await self.context.emit(text)


def _targets(context: StepContext, config: Any) -> list[_Target]:
    """Whom to ask, in order. Who left half an answer behind is asked first, to go on with it."""
    targets = [_Target(0, config.provider, config.model)]
    for number, other in enumerate(config.fallback, start=1):
        extra = further_options(other)
        targets.append(_Target(number, other.provider, other.model or config.model, extra))
    partial = context.partial
    if partial is None:
        return targets
    kept = partial.handle
    owner = (kept.get("provider"), kept.get("model"))
    for target in targets:
        if (target.provider, target.model) == owner:
            handle = kept.get("handle") or {}
            has_something = bool(partial.text or handle)
            own = Partial(partial.text, partial.tokens, handle) if has_something else None
            follow_up = tuple(kept.get("follow_up") or ())
            first = replace(target, follow_up=follow_up, partial=own)
            return [first, *(other for other in targets if other is not target)]
    return targets


def _messages(config: Any) -> list[Mapping[str, Json]]:
    messages: list[Mapping[str, Json]] = [dict(message) for message in config.messages or ()]
    if config.prompt is not None:
        messages.append({"role": "user", "content": config.prompt})
    if not messages:
        raise AuthorError("an llm step needs a prompt or messages, and both are empty")
    return messages


def _ask_again(answer: str, problem: str) -> list[Mapping[str, Json]]:
    request = (
        f"That answer does not fit the required JSON schema: {problem}\n"
        "Answer again with the corrected JSON only."
    )
    return [{"role": "assistant", "content": answer}, {"role": "user", "content": request}]


def _find_problems(data: Json, schema: Mapping[str, Json]) -> list[str]:
    from llm_orchestrator.steps.schema import find_problems  # noqa: PLC0415 (slow, rarely needed)

    return find_problems(data, schema)


def _describe_fallback(
    failures: Sequence[tuple[_Target, ProviderError]], target: _Target
) -> dict[str, Json]:
    return {
        "to": {"provider": target.provider, "model": target.model},
        "failed": [
            {"provider": failed.provider, "model": failed.model, "error": error.kind}
            for failed, error in failures
        ],
    }


def _most_hopeful(errors: Sequence[ProviderError]) -> ProviderError:
    """The error that decides what the engine does next.

    One worth a retry beats one that parks the run (some request was sent, so an attempt is burnt),
    and both beat a refused key.
    """
    for error in errors:
        if error.retryable and not isinstance(error, ProviderUnavailable):
            return error
    return next((error for error in errors if error.retryable), errors[-1])

"""The names of OpenTelemetry's GenAI conventions, in this one module: they are still moving.

`v1.36` is the last version that instrumentations were told to keep emitting; `latest` is what came
after it (semantic-conventions 1.37 to 1.41, then semantic-conventions-genai), in which the provider
has another name and cached tokens have one. `both` emits the two. No prompt and no answer is ever
recorded. There is no convention for money yet (semantic-conventions-genai#443 is open), so the cost
has a name of our own, in telemetry/tracing.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

Version = Literal["latest", "v1.36", "both"]
VERSIONS: tuple[Version, ...] = ("latest", "v1.36", "both")

_COMMON = {
    "operation": "gen_ai.operation.name",
    "request_model": "gen_ai.request.model",
    "response_model": "gen_ai.response.model",
    "response_id": "gen_ai.response.id",
    "finish_reasons": "gen_ai.response.finish_reasons",
    "input_tokens": "gen_ai.usage.input_tokens",
    "output_tokens": "gen_ai.usage.output_tokens",
}
_V1_36 = {**_COMMON, "provider": "gen_ai.system"}
_LATEST = {
    **_COMMON,
    "provider": "gen_ai.provider.name",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
}
NAMES: dict[Version, tuple[Mapping[str, str], ...]] = {
    "latest": (_LATEST,),
    "v1.36": (_V1_36,),
    "both": (_LATEST, _V1_36),
}


class Asked(NamedTuple):
    """One question to a model, and what is known of its answer. No content."""

    operation: Literal["chat", "embeddings"]
    provider: str
    request_model: str
    response_model: str = ""
    response_id: str = ""
    finish_reason: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0


Value = str | int | float | bool | tuple[str, ...]


def attributes(asked: Asked, version: Version) -> dict[str, Value]:
    """The span attributes of a question; what is not known is left out."""
    facts: dict[str, Value] = dict(asked._asdict())
    reason = facts.pop("finish_reason")
    if reason:
        facts["finish_reasons"] = (str(reason),)
    if not asked.response_model:  # nothing was answered: zero tokens are not known, but unknown
        facts = {key: facts[key] for key in ("operation", "provider", "request_model")}
    found: dict[str, Value] = {}
    for names in NAMES[version]:
        found.update({names[key]: value for key, value in facts.items() if key in names and value})
    return found

"""How the fake LLM server is steered, and what it answers: pure functions of the prompt.

The same prompt gives the same words in every process and after every restart, and a longer answer
begins with the shorter one, so that a resumed answer can be compared with an uninterrupted one.
Nothing here is random and nothing here keeps state.

A prompt steers the server with `[[fake: status=500 times=2 retry_after=1 reply="..." json={...}]]`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from llm_orchestrator.providers.echo import sample

Json = Any

WORDS = re.findall(
    r"\w+",
    "amber basin cedar delta ember fjord grove haven inlet jetty karst ledge maple north oasis "
    "pearl quartz ridge stone tidal umber valley willow xenon yarrow zephyr atlas beacon canyon "
    "dune estuary flint",
)
TOKEN = re.compile(r"\s*\S+|\s+$")
MARKER = "[[fake:"
_TOKENS = 20
_LIMIT_ONLY = 1000  # so much is a client's default limit, not the length that it wants


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What one request meets. `times` limits the misbehaviour to the first N of a prompt."""

    status: int = 0
    times: int = 0
    retry_after: str = ""
    retry_after_ms: str = ""
    delay_ms: float = 0
    chunk_delay_ms: float = 0
    tokens: int = 0
    cut_after: int = -1
    reply: str = ""
    json: Json = None
    tool: str = ""
    step: str = ""
    filter: bool = False
    hang: bool = False
    garbage: bool = False
    refuse_prefill: bool = False
    no_echo: bool = False
    polite: bool = False
    """A cut ends the answer as if it were whole, instead of dropping the connection."""
    no_usage: bool = False
    error: str = ""
    cached: int = 0

    def calm(self) -> Behaviour:
        """The same answer without the misbehaviour."""
        return replace(
            self, status=0, cut_after=-1, filter=False, hang=False, garbage=False, error=""
        )


_TYPES = {field.name: field.type for field in fields(Behaviour)}


def parse(text: str) -> dict[str, Json]:
    """Read `status=500 filter reply="two words" json={"a": 1}` into a dict of known keys."""
    found: dict[str, Json] = {}
    position = 0
    while match := re.compile(r"\s*([a-z_]+)").match(text, position):
        name, position = match.group(1), match.end()
        value: Json = True
        if text[position : position + 1] == "=":
            value, position = _value(text, position + 1)
        if name in _TYPES:
            found[name] = _typed(name, value)
    return found


def _value(text: str, start: int) -> tuple[Json, int]:
    if text[start : start + 1] in ('"', "{", "["):
        return json.JSONDecoder(strict=False).raw_decode(text, start)
    match = re.compile(r"[^\s\]]*").match(text, start)
    assert match is not None
    return match.group(0), match.end()


def _typed(name: str, value: Json) -> Json:
    kind = str(_TYPES[name])
    if kind == "bool":
        return value not in ("false", "0", False)
    if kind in ("int", "float"):
        return (int if kind == "int" else float)(value)
    return str(value) if kind == "str" else value


def behaviour(default: Mapping[str, Json], prompt: str, header: str = "") -> Behaviour:
    """Combine the control script's entry, a request header and every marker in the prompt."""
    found = {key: _typed(key, value) for key, value in default.items() if key in _TYPES}
    position = prompt.find(MARKER)
    while position >= 0:
        found |= parse(prompt[position + len(MARKER) :])
        position = prompt.find(MARKER, position + 1)
    return Behaviour(**(found | parse(header)))


def split(text: str) -> list[str]:
    """Cut a text into tokens; joined they give the text again."""
    return TOKEN.findall(text)


def words(seed: str, count: int) -> list[str]:
    """`count` tokens for a seed; the first N are the same whatever `count` is."""
    picks = hashlib.shake_128(seed.encode()).digest(max(count, 1))[:count]
    chosen = [WORDS[pick % len(WORDS)] for pick in picks]
    return [word if place == 0 else " " + word for place, word in enumerate(chosen)]


@dataclass(frozen=True, slots=True)
class Answer:
    """The tokens to send now, and what came before them."""

    tokens: Sequence[str]
    prefix: str = ""
    finish: str = "stop"

    @property
    def text(self) -> str:
        return "".join(self.tokens)


def answer(act: Behaviour, seed: str, *, max_tokens: int, prefix: str, schema: Json) -> Answer:
    """What the model says after `prefix`; with the prefix it is the uninterrupted answer.

    It has `tokens=` tokens if the prompt says so, else `max_tokens`, else (also when `max_tokens`
    is 1000 or more) 20.
    """
    kept = len(split(prefix))
    if act.reply or act.json is not None or schema is not None:
        full = split(act.reply or json.dumps(sample(schema) if act.json is None else act.json))
    else:
        is_target = 0 < max_tokens < _LIMIT_ONLY
        full = words(seed, act.tokens or (kept + max_tokens if is_target else max(_TOKENS, kept)))
    text = "".join(full)
    rest = split(text[len(prefix) :]) if text.startswith(prefix) else words(seed + prefix, 20)
    if max_tokens and len(rest) > max_tokens:
        return Answer(rest[:max_tokens], prefix, "length")
    return Answer(rest, prefix)


def text_of(content: Json) -> str:
    """The text of a message's content, whichever of the wire shapes it has."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(text_of(part) for part in content)
    if isinstance(content, dict):
        return text_of(content.get("text") or content.get("content") or "")
    return ""


def digest(value: Json) -> str:
    """Short name of a prompt: the same question, the same name."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def count(text: str) -> int:
    """How many tokens the server bills for a text."""
    return max(1, len(split(text)))

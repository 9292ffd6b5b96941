"""From our OpenAI-shaped messages to Anthropic's. Pure.

Anthropic wants the system text apart, user and assistant in turns, tool calls and results as blocks
of those turns, and no turn without content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from llm_orchestrator.model import Json

_DATA_URL = re.compile(r"data:([\w/+.-]+);base64,(.*)", re.DOTALL)
Block = dict[str, Json]


def to_anthropic(
    messages: Sequence[Mapping[str, Json]], system: str | None
) -> tuple[str, list[dict[str, Json]]]:
    """Return the system text and the turns."""
    systems = [system] if system else []
    turns: list[dict[str, Json]] = []
    for message in messages:
        role = message.get("role", "user")
        if role in ("system", "developer"):
            systems.append(plain_text(message.get("content")))
            continue
        blocks = _blocks(role, message)
        if not blocks:
            continue
        speaker = "assistant" if role == "assistant" else "user"
        if turns and turns[-1]["role"] == speaker:
            turns[-1]["content"] += blocks
        else:
            turns.append({"role": speaker, "content": blocks})
    return "\n\n".join(systems), [_plain_where_possible(turn) for turn in turns]


def plain_text(content: Json) -> str:
    """The text of a message's content."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return "" if content is None else str(content)


def _blocks(role: str, message: Mapping[str, Json]) -> list[Block]:
    if role == "tool":
        result = {
            "type": "tool_result",
            "tool_use_id": message.get("tool_call_id", ""),
            "content": plain_text(message.get("content")),
        }
        return [result]
    content = message.get("content")
    if isinstance(content, list):
        blocks = [_block(part) for part in content]
    else:
        blocks = [{"type": "text", "text": str(content)}] if content else []
    return blocks + [_tool_use(call) for call in message.get("tool_calls") or ()]


def _block(part: Json) -> Block:
    if not isinstance(part, Mapping):
        return {"type": "text", "text": str(part)}
    if part.get("type") != "image_url":
        return dict(part)
    link = part["image_url"]
    url = link["url"] if isinstance(link, Mapping) else str(link)
    match = _DATA_URL.match(url)
    if match is None:
        return {"type": "image", "source": {"type": "url", "url": url}}
    source = {"type": "base64", "media_type": match[1], "data": match[2]}
    return {"type": "image", "source": source}


def _tool_use(call: Mapping[str, Json]) -> Block:
    """A tool call, in OpenAI's shape or in our own."""
    function = call.get("function", call)
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    return {
        "type": "tool_use",
        "id": call.get("id", ""),
        "name": function["name"],
        "input": arguments,
    }


def _plain_where_possible(turn: dict[str, Json]) -> dict[str, Json]:
    blocks = turn["content"]
    if len(blocks) == 1 and set(blocks[0]) == {"type", "text"}:
        return {"role": turn["role"], "content": blocks[0]["text"]}
    return turn

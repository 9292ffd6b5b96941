"""Server-sent events of a run: parsing them, and holding what they add up to. No I/O."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Json = Any


class Event(NamedTuple):
    """One event. `id` is SEQ, or SEQ.ATTEMPT.OFFSET for a chunk."""

    id: str
    kind: str
    data: Json


@dataclass(slots=True)
class Parser:
    """Lines to events (the WHATWG format). One per connection."""

    last_id: str = ""
    _kind: str = ""
    _lines: list[str] = field(default_factory=list)

    def feed(self, line: str) -> Iterator[Event]:
        """Take one line without its end; gives an event at the empty one that closes it."""
        if not line:
            if self._lines:
                yield Event(self.last_id, self._kind or "message", _load("\n".join(self._lines)))
            self._kind, self._lines = "", []
            return
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "id" and "\0" not in value:
            self.last_id = value
        elif name == "event":
            self._kind = value
        elif name == "data":
            self._lines.append(value)


def _load(text: str) -> Json:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


class Held:
    """The text that each step has streamed so far, resets applied: what a reader may show."""

    def __init__(self) -> None:
        self.text: dict[str, str] = {}

    def apply(self, event: Event) -> None:
        """Take one event of the run; others than `chunk` and `reset` change nothing."""
        if event.kind not in ("chunk", "reset"):
            return
        step, offset = str(event.data["step"]), int(event.data["offset"])
        kept = self.text.get(step, "")[:offset]
        self.text[step] = kept + str(event.data.get("text", ""))

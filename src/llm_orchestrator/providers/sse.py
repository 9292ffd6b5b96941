"""A small parser for server-sent events (WHATWG HTML, section 9.2), fed with bytes as they come.

Chunks may be cut anywhere: in a line, between CR and LF, inside a UTF-8 character. An event counts
only once its empty line has come; what is left when the stream ends is dropped, as the standard
says, so half an event is never used. `Event.end` is the byte offset behind the event: where a
server that keeps the stream can be asked to go on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from llm_orchestrator.errors import ProviderTransient

DONE = "[DONE]"
_LINE_MAX = 64 << 20


class Event(NamedTuple):
    """One event. `data` joins its data lines with newlines."""

    data: str
    name: str
    id: str
    end: int


class SseParser:
    """Feed it bytes, get whole events."""

    def __init__(self) -> None:
        self._buffer = b""
        self._offset = 0
        self._data: list[str] = []
        self._name = ""
        self._id = ""

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """Yield the events that `chunk` completes."""
        buffer = self._buffer + chunk if self._buffer else chunk
        position = 0
        while True:
            end, following = _line_end(buffer, position)
            if following < 0:
                break
            event = self._line(buffer[position:end], self._offset + following)
            position = following
            if event is not None:
                yield event
        self._buffer = buffer[position:]
        self._offset += position
        if len(self._buffer) > _LINE_MAX:
            raise ProviderTransient(f"the provider streamed a line of over {_LINE_MAX} bytes")

    def _line(self, raw: bytes, end: int) -> Event | None:
        if not raw:
            return self._dispatch(end)
        if end - len(raw) <= 2 and raw.startswith(b"\xef\xbb\xbf"):
            raw = raw[3:]
        field, _, value = raw.decode("utf-8", "replace").partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            self._data.append(value)
        elif field == "event":
            self._name = value
        elif field == "id" and "\0" not in value:
            self._id = value
        return None

    def _dispatch(self, end: int) -> Event | None:
        data, self._data = self._data, []
        name, self._name = self._name, ""
        if not data:
            return None
        return Event("\n".join(data), name, self._id, end)


def _line_end(buffer: bytes, start: int) -> tuple[int, int]:
    """End of the line that begins at `start` and start of the next; (-1, -1) if it is not whole.

    A CR that is the last byte waits for the next one: it may be half of a CRLF.
    """
    feed = buffer.find(b"\n", start)
    carriage = buffer.find(b"\r", start, feed if feed >= 0 else len(buffer))
    if carriage < 0:
        return (feed, feed + 1) if feed >= 0 else (-1, -1)
    if carriage + 1 == len(buffer):
        return -1, -1
    return carriage, carriage + (2 if buffer[carriage + 1] == 0x0A else 1)

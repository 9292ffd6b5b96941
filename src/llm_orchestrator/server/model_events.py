"""The events of a streamed response, numbered so that any node gives the same numbers again.

A client that was cut off says only the last number that it has seen. So numbers follow from what is
stored, not from how it came: four events open the stream, then each delta holds DELTA_CHARS
characters of the answer (the last one what is left), then four close it. The answer's character
`n` is in event `4 + n // DELTA_CHARS`, whoever sends it. A run that fails ends the stream with the
number that follows what its reader has.

For this to hold the text itself must not change behind a reader's back. A background response
therefore tells only what is kept in the store (each second), which no crash takes back. An answer
that is begun anew (another provider, another try at a schema) voids what was told: then the stream
ends with an `error`, code `stream_reset`, and the reader fetches the response or streams it again
from the start. One in the foreground cannot be taken up again, and tells each token at once.
"""

from __future__ import annotations

from collections.abc import Iterator

from llm_orchestrator.model import Json
from llm_orchestrator.server.model_shapes import MESSAGE, Run, message, text_part

DELTA_CHARS = 4
"""About a token."""
OPENING = 4
RESET = "stream_reset"
_RESET_MESSAGE = (
    "the answer was begun anew, what was streamed of it is void; "
    "retrieve the response, or stream it again from the start"
)
Numbered = dict[str, Json]


class Script:
    """What is left to tell of one response; `after`: the last number that its reader has."""

    def __init__(self, run: Run, after: int | None = None) -> None:
        self._run = run
        self._item_id = MESSAGE + run.run_id
        self._after = -1 if after is None else after
        self.is_resumed = self._after >= OPENING
        self._deltas = max(0, self._after + 1 - OPENING)

    @property
    def told(self) -> int:
        """How many characters of the answer the reader has (more, when it has seen the end)."""
        return self._deltas * DELTA_CHARS

    def opening(self, response: dict[str, Json]) -> Iterator[Numbered]:
        """The events before the text."""
        response = {**response, "status": "in_progress", "output": [], "usage": None, "error": None}
        item = {"output_index": 0, "item": message(self._run, "", "in_progress")}
        events: tuple[tuple[str, dict[str, Json]], ...] = (
            ("response.created", {"response": response}),
            ("response.in_progress", {"response": response}),
            ("response.output_item.added", item),
            ("response.content_part.added", self._place(part=text_part(""))),
        )
        for number, (kind, data) in enumerate(events):
            if number > self._after:
                yield _event(kind, number, data)

    def deltas(self, text: str, *, is_whole: bool = False) -> Iterator[Numbered]:
        """What of `text` is new to the reader, in whole deltas unless the text is whole."""
        while True:
            delta = text[self.told : self.told + DELTA_CHARS]
            if not delta or (len(delta) < DELTA_CHARS and not is_whole):
                return
            data = self._place(delta=delta, logprobs=[])
            number = OPENING + self._deltas
            self._deltas += 1
            yield _event("response.output_text.delta", number, data)

    def closing(self, response: dict[str, Json], text: str) -> Iterator[Numbered]:
        """The events after the text of a completed run."""
        done = message(self._run, text, "completed")
        events = (
            ("response.output_text.done", self._place(text=text, logprobs=[])),
            ("response.content_part.done", self._place(part=text_part(text))),
            ("response.output_item.done", {"output_index": 0, "item": done}),
            ("response.completed", {"response": response}),
        )
        first = OPENING + -(-len(text) // DELTA_CHARS)
        for number, (kind, data) in enumerate(events, first):
            if number > self._after:
                yield _event(kind, number, data)

    def ending(self, response: dict[str, Json]) -> Numbered:
        """The last event of a run that failed or was cancelled."""
        is_failed = response["status"] == "failed"
        kind = "response.failed" if is_failed else "response.incomplete"
        return _event(kind, self._next, {"response": response})

    def error(self, code: str = RESET, text: str = _RESET_MESSAGE) -> Numbered:
        """The stream cannot go on here."""
        return _event("error", self._next, {"code": code, "message": text, "param": None})

    @property
    def _next(self) -> int:
        return max(self._after + 1, OPENING + self._deltas)

    def _place(self, **data: Json) -> dict[str, Json]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0, **data}


def _event(kind: str, number: int, data: dict[str, Json]) -> Numbered:
    return {"type": kind, "sequence_number": number, **data}

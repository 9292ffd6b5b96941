"""How journal entries look to readers of streams: bounded, and which of them is the end. Pure."""

from __future__ import annotations

import json
from typing import NamedTuple

from llm_orchestrator.model import Entry, Json, Kind, RunState, stamp

DATA_BYTES_MAX = 64 * 1024
"""A larger entry is sent without its large values; the API has it whole."""
VALUE_BYTES_MAX = 4 * 1024
OUTPUT_BYTES_MAX = 1024 * 1024


class Event(NamedTuple):
    """One event. An empty `id` leaves the reader's position as it is."""

    name: str
    id: str
    data: dict[str, Json]


class Ends:
    """Whether a run has ended, or the one step of it that is asked for."""

    def __init__(self, step: str | None) -> None:
        self._step = step
        self._of_run: dict[str, Json] = {}
        self._of_step: dict[str, Json] = {}
        self._seq = 0

    def note(self, entry: Entry, data: dict[str, Json]) -> None:
        """Take in an entry."""
        kind = Kind(entry.kind)
        if kind is Kind.STATE:
            self._of_run = data if RunState(data["state"]).is_final else {}
        elif kind is Kind.REWOUND:
            self._of_run = self._of_run if data.get("is_repair") else {}
            if self._seq > int(data.get("to_seq", entry.seq)):
                self._of_step = {}
        elif entry.step and entry.step == self._step:
            self._of_step, self._seq = _end_of_step(kind, data), entry.seq

    def last(self, seq: int) -> Event | None:
        """The last event, if it has ended. `seq`: of the last entry that was told."""
        how = self._of_step or self._of_run
        if not how:
            return None
        data: dict[str, Json] = {"state": how["state"], "reason": how.get("reason", "")}
        if self._step is not None:
            data["step"] = self._step
        output = how.get("output")
        if how.get("error") is not None:
            data["error"] = how["error"]
        elif _size(output) > OUTPUT_BYTES_MAX:
            data["cut"] = ["output"]
        else:
            data["output"] = output
        return Event("end", f"{seq}.end", data)


def _end_of_step(kind: Kind, data: dict[str, Json]) -> dict[str, Json]:
    """How a step stands after an entry of its own; empty while it goes on."""
    if kind is Kind.STEP_FINISHED:
        return {"state": "completed", "output": data.get("result")}
    if kind is Kind.STEP_SKIPPED:
        return {"state": "skipped", "reason": data.get("reason", "")}
    if kind is Kind.ATTEMPT_FAILED and data.get("final"):
        return {"state": "failed", "error": data.get("error")}
    return {}


def text_of(result: Json, *, is_known: bool) -> str | None:
    """The text that a step's result says; None for a step that has none.

    `is_known`: the step has streamed, so that `text` is what it streamed.
    """
    if not isinstance(result, dict) or not isinstance(result.get("text"), str):
        return None
    is_llm = "model" in result and "tokens" in result
    return str(result["text"]) if is_known or is_llm else None


def shown(entry: Entry, data: dict[str, Json]) -> dict[str, Json]:
    """An entry as the data of an event, at most about DATA_BYTES_MAX large."""
    head: dict[str, Json] = {
        "seq": entry.seq,
        "kind": entry.kind,
        "step": entry.step,
        "attempt": entry.attempt,
        "epoch": entry.epoch,
        "recorded_at": stamp(entry.recorded_at),
        "payload": data,
    }
    is_plain = entry.payload[:1] == b"{"
    if (len(entry.payload) if is_plain else _size(data)) > DATA_BYTES_MAX:
        small = {key: value for key, value in data.items() if _size(value) <= VALUE_BYTES_MAX}
        head |= {"payload": small, "cut": sorted(set(data) - set(small))}
    return head


def _size(value: Json) -> int:
    return len(json.dumps(value, default=str)) if value is not None else 0

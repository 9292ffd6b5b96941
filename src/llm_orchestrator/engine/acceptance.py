"""Accepting a run: entry 1 holds all that the row of `runs` holds; each can rebuild the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from hashlib import blake2b

from llm_orchestrator.model import Draft, Json, Kind, NewRun, Run
from llm_orchestrator.store.base import PutRecord
from llm_orchestrator.store.journal import encode
from llm_orchestrator.telemetry.propagation import TRACEPARENT, accepting
from llm_orchestrator.telemetry.redact import redact_data

KEY_RECORD = "idempotency_key"
REQUEST = "request"
"""In a run's origin: the digest of the request that asked for it, as whoever took it saw it."""


def in_trace(new: NewRun) -> NewRun:
    """The same run as part of the trace of whoever asks for it; one that is in a trace stays."""
    traceparent = "" if TRACEPARENT in new.origin else accepting()
    return replace(new, origin={**new.origin, TRACEPARENT: traceparent}) if traceparent else new


def without_secrets(new: NewRun) -> NewRun:
    """The same run; its input without the secrets that this process knows."""
    clean = redact_data(new.input)
    return new if clean is new.input else replace(new, input=clean)


def accepted_draft(new: NewRun) -> Draft:
    """Entry 1 of a run. The same NewRun gives the same bytes."""
    return Draft(Kind.ACCEPTED, "", 0, encode(accepted_data(new)))


def accepted_data(new: NewRun) -> dict[str, Json]:
    """The payload of entry 1."""
    data: dict[str, Json] = {
        "workflow": new.workflow,
        "version": new.version,
        "digest": new.digest,
        "input": new.input,
        "priority": new.priority,
        "queue": new.queue,
        "wake_at": new.wake_at,
        "labels": dict(new.labels),
    }
    if new.idempotency_key is not None:
        data["idempotency_key"] = new.idempotency_key
    if new.parent_run_id is not None:
        data["parent_run_id"] = new.parent_run_id
    if new.origin:
        data["origin"] = dict(new.origin)
    return data


def from_accepted(run_id: str, data: Mapping[str, Json]) -> NewRun:
    """The inverse of `accepted_data`."""
    return NewRun(
        run_id,
        data["workflow"],
        data["version"],
        data["digest"],
        priority=data["priority"],
        queue=data["queue"],
        idempotency_key=data.get("idempotency_key"),
        parent_run_id=data.get("parent_run_id"),
        wake_at=data["wake_at"],
        origin=data.get("origin", {}),
        labels=data["labels"],
        input=data["input"],
    )


def key_record(new: NewRun) -> PutRecord:
    """The record that makes an idempotency key unique. Its value tells a repeat from a misuse."""
    value = {"run_id": new.run_id, "input": input_digest(new)}
    if REQUEST in new.origin:
        value[REQUEST] = new.origin[REQUEST]
    return PutRecord(KEY_RECORD, key_of(new), value, 0, new.run_id)


def is_repeat(record: Mapping[str, Json], new: NewRun) -> bool:
    """True when a key's record is of the same request; else the key was used for another one.

    Two requests that carry a digest are the same if it is: a newer version of the workflow may
    have given the repeated one other defaults. Otherwise the inputs decide.
    """
    if REQUEST in record and REQUEST in new.origin:
        return bool(record[REQUEST] == new.origin[REQUEST])
    return bool(record["input"] == input_digest(new))


def key_of(new: NewRun | Run) -> str:
    """Keys are per workflow."""
    return f"{new.workflow}/{new.idempotency_key}"


def input_digest(new: NewRun) -> str:
    """Tells two inputs apart."""
    return blake2b(encode({"input": new.input}), digest_size=16).hexdigest()

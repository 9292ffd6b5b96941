"""From rows and journals to answers: plain dictionaries, as `models.py` describes them. Pure."""

from __future__ import annotations

import itertools

from llm_orchestrator.engine.control import Answer
from llm_orchestrator.engine.driver import End
from llm_orchestrator.engine.flows import is_code
from llm_orchestrator.engine.replay import Fold
from llm_orchestrator.errors import StoreDamaged
from llm_orchestrator.model import Entry, Json, Run, RunState, Workflow, stamp
from llm_orchestrator.store.journal import decode

_WAKE_MAX = 1 << 60
"""A wake-up beyond this is a message's, not a time's."""


def run_facts(run: Run) -> dict[str, Json]:
    """models.RunFacts."""
    return {
        "run_id": run.run_id,
        "workflow": run.workflow,
        "version": run.version,
        "digest": run.digest,
        "state": run.state.value,
        "reason": run.reason,
        "queue": run.queue,
        "priority": run.priority,
        "labels": dict(run.labels),
        "owner": run.owner,
        "epoch": run.epoch,
        "idempotency_key": run.idempotency_key,
        "parent_run_id": run.parent_run_id,
        "wake_at": stamp(run.wake_at) if run.wake_at < _WAKE_MAX else None,
        "created_at": stamp(run.created_at),
        "started_at": stamp(run.started_at),
        "finished_at": stamp(run.finished_at),
    }


def run_detail(run: Run, state: Fold) -> dict[str, Json]:
    """models.RunDetail: the row, corrected and completed by the journal, which is the truth."""
    accepted = state.accepted
    return run_facts(run) | {
        "workflow": accepted["workflow"],
        "version": accepted["version"],
        "state": state.state.value,
        "reason": state.reason,
        "input": accepted["input"],
        "output": state.output,
        "error": state.error,
        **state.usage.to_json(),
        "attempts": state.attempts,
        "repeats": state.repeats,
        "rewinds": state.rewinds,
        "entries": state.seq,
        "origin": dict(accepted.get("origin", {})),
    }


def outcome_of(end: End) -> dict[str, Json]:
    """models.Outcome of a run at rest."""
    return {
        "run_id": end.run_id,
        "state": end.state.value,
        "reason": end.reason,
        "is_ended": True,
        "output": end.output,
        "error": end.error,
    }


def moving(run_id: str, state: RunState, reason: str = "") -> dict[str, Json]:
    """models.Outcome of a run that still moves."""
    return {
        "run_id": run_id,
        "state": state.value,
        "reason": reason,
        "is_ended": False,
        "output": None,
        "error": None,
    }


def answered(answer: Answer) -> dict[str, Json]:
    """models.Answered."""
    return {
        "run_id": answer.run_id,
        "state": answer.state.value,
        "is_done": answer.is_done,
        "message": answer.message,
    }


def workflow_facts(stored: Workflow) -> dict[str, Json]:
    """models.WorkflowFacts."""
    return {
        "name": stored.name,
        "version": stored.version,
        "digest": stored.digest,
        "kind": "python" if is_code(stored) else "definition",
        "created_at": stamp(stored.created_at),
    }


def entry_facts(entry: Entry) -> dict[str, Json]:
    """models.EntryFacts. What does not decode says so instead."""
    try:
        payload: Json = decode(entry.payload)
    except StoreDamaged as error:
        payload = {"unreadable": error.message}
    return {
        "id": f"{entry.run_id}:{entry.seq}",
        "seq": entry.seq,
        "epoch": entry.epoch,
        "kind": str(entry.kind),
        "step": entry.step,
        "attempt": entry.attempt,
        "payload": payload,
        "digest": entry.digest.hex(),
        "recorded_at": stamp(entry.recorded_at),
    }


# -- pages ----------------------------------------------------------------------------------------
# A cursor says where the next page begins; whoever gets one need not know how.


def run_cursor(run_id: str) -> str:
    """Behind a run."""
    return run_id.replace("-", "")


def run_in(cursor: str | None) -> str | None:
    """The inverse; any 32 hexadecimal digits are a place among run ids."""
    if cursor is None:
        return None
    ends = (0, 8, 12, 16, 20, 32)
    return "-".join(cursor[start:end] for start, end in itertools.pairwise(ends))


def name_cursor(name: str) -> str:
    """Behind a name."""
    return name.encode().hex()


def name_in(cursor: str | None) -> str:
    """The inverse; empty for the first page."""
    return bytes.fromhex(cursor or "").decode(errors="replace")

"""Gauges about backups, from the store's records: every node shows the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from llm_orchestrator.model import MICROSECONDS, Json
from llm_orchestrator.recovery.create import LAST
from llm_orchestrator.recovery.prove import DISPROVED, PROVED
from llm_orchestrator.recovery.tally import TALLY, Outcome
from llm_orchestrator.telemetry.metrics import Sample


def backup_samples(records: Mapping[str, Json], now_us: int) -> Iterator[Sample]:
    """What the records of kind `backup` say. What never was is 0: then it is as old as can be."""
    last, proved, disproved, tally = (
        found if isinstance(found := records.get(key), dict) else {}
        for key in (LAST, PROVED, DISPROVED, TALLY)
    )
    taken_at, proved_at = _number(last, "taken_at"), _number(proved, "at")
    yield Sample("backup_last_success_timestamp_seconds", (), taken_at / MICROSECONDS)
    yield Sample("backup_last_proved_timestamp_seconds", (), proved_at / MICROSECONDS)
    failed_at = _number(tally, "failed_at")
    yield Sample("backup_last_failure_timestamp_seconds", (), failed_at / MICROSECONDS)
    yield Sample("backup_proof_failed", (), float(_number(disproved, "at") > proved_at))
    for outcome in Outcome:
        yield Sample("backup_runs_total", (outcome.value,), _number(tally, outcome.value))
    if last:
        yield Sample("backup_size_bytes", (), _number(last, "size_bytes"))
        yield Sample("backup_duration_seconds", (), _number(last, "took_s"))
        age_s = max(0.0, (now_us - taken_at) / MICROSECONDS)
        yield Sample("recovery_point_exposure_seconds", ("backup",), age_s)


def _number(record: Mapping[str, Json], name: str) -> float:
    value = record.get(name)
    return value if isinstance(value, int | float) else 0

"""From a run's journal to its trace: what a stay has to know to go on with the same spans."""

from __future__ import annotations

from llm_orchestrator.engine.execution import Execution
from llm_orchestrator.model import RunState
from llm_orchestrator.telemetry import here
from llm_orchestrator.telemetry.propagation import TRACEPARENT


def arrive(execution: Execution) -> None:
    """From now on this task drives the run: its log lines say so, and its spans begin."""
    fold, services = execution.fold, execution.services
    traceparent = str(fold.accepted.get("origin", {}).get(TRACEPARENT, ""))
    stay = here.Stay(fold.run_id, execution.head.epoch, services.node_id, traceparent)
    if services.tracing is None:
        here.enter_run(stay)
        return
    from llm_orchestrator.telemetry.tracing import Past  # noqa: PLC0415 (OpenTelemetry is slow)

    is_lost = fold.state is RunState.RUNNING
    past = Past(
        workflow=str(fold.accepted["workflow"]),
        version=str(fold.accepted["version"]),
        created_at=fold.created_at,
        stay_epoch=fold.stay[0],
        stay_at=fold.stay[1],
        lost_node=str(fold.owner) if is_lost else "",
        ends=fold.ends,
        mark=fold.mark,
    )
    execution.trace = services.tracing.begin(stay, past)

"""The log as JSON, one object a line, and where in the work each line was written.

The code logs by the standard library everywhere; structlog only renders. A line of a run's task
carries run, step, attempt, node, epoch and trace (telemetry/here.py), and so do the author's own
lines. The store's lines do not: it serves all runs at once, and whose task happened to be running
says nothing. An exception is a field, its frames without the values of variables.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from llm_orchestrator.telemetry import here

FIELDS = {
    "ts": "when, UTC with microseconds (RFC 3339)",
    "level": "`debug`, `info`, `warning`, `error` or `critical`",
    "event": "what happened, for people",
    "logger": "the module that says it",
    "run_id": "the run (in its tasks)",
    "step": "the step's whole path (in its attempts)",
    "attempt": "which attempt, counted from 1 (in an attempt)",
    "node": "the node",
    "epoch": "the fencing token under which the node drives the run",
    "trace_id": "the run's trace: the same in each life, also when nothing is traced",
    "span_id": "the span, when one is recorded",
    "exception": "`exc_type`, `exc_value`, `frames` of an exception and of its causes",
}
"""Every field that we write. What a caller adds by `extra=` stands beside them."""

Redact = Callable[[str], str]
"""Takes secrets out of a text."""
_Event = MutableMapping[str, Any]
_OF_NO_RUN = "llm_orchestrator.store."


def json_formatter(
    facts: Mapping[str, Any] | None = None, *, redact: Redact | None = None
) -> logging.Formatter:
    """Renders standard records as JSON. `facts` stand in each line; they may change."""
    import structlog  # noqa: PLC0415 (slow, and only servers log JSON)

    stdlib = structlog.stdlib
    exceptions = structlog.tracebacks.ExceptionDictTransformer(show_locals=False, use_rich=False)
    fixed: Mapping[str, Any] = {} if facts is None else facts

    def arrange(_logger: Any, _method: str, event: _Event) -> _Event:
        return _arranged(event, fixed)

    def clean(_logger: Any, _method: str, event: _Event) -> _Event:
        return event if redact is None else _each_text(event, redact)

    return stdlib.ProcessorFormatter(
        foreign_pre_chain=[stdlib.ExtraAdder()],
        processors=[
            arrange,
            stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.ExceptionRenderer(exceptions),
            clean,
            structlog.processors.JSONRenderer(default=repr),
        ],
    )


def set_up(
    handler: logging.Handler, *, level: str = "", ours: str = "warning", debug: bool = False
) -> None:
    """Log by `handler` alone: from `level` on, or if that is empty warnings and `ours` of our own.

    `debug` is everything.
    """
    root = logging.DEBUG if debug else _number(level or "warning")
    logging.basicConfig(level=root, handlers=[handler], force=True)
    own = logging.NOTSET if debug or level else _number(ours)
    logging.getLogger("llm_orchestrator").setLevel(own)
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def where(name: str) -> dict[str, Any]:
    """The fields of the place from which logger `name` speaks; {} outside of runs."""
    now = here.current()
    if now is None or name.startswith(_OF_NO_RUN):
        return {}
    stay, recording = now.stay, now.recording
    found: dict[str, Any] = {"run_id": stay.run_id}
    if now.step:
        found["step"], found["attempt"] = now.step, now.attempt
    found["node"], found["epoch"] = stay.node, stay.epoch
    found["trace_id"] = recording.trace_id if recording else here.trace_id_of(stay)
    if recording:
        found["span_id"] = recording.span_id
    return found


def _arranged(event: _Event, facts: Mapping[str, Any]) -> _Event:
    record: logging.LogRecord = event["_record"]
    moment = datetime.datetime.fromtimestamp(record.created, tz=datetime.UTC)
    line: dict[str, Any] = {
        "ts": moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "level": record.levelname.lower(),
        "event": event.pop("event"),
        "logger": record.name,
    }
    line.update(facts)
    line.update(where(record.name))
    for key, value in event.items():
        line.setdefault(key, value)  # what a caller adds never takes the place of ours
    return line


def _each_text(value: Any, redact: Redact) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {_each_text(key, redact): _each_text(each, redact) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_each_text(each, redact) for each in value]
    return value if value is None or isinstance(value, int | float) else redact(repr(value))


def _number(level: str) -> int:
    return logging.getLevelNamesMapping()[level.upper()]

"""What was asked of `llmo run`, and how a run's result is printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from llm_orchestrator.cli.output import emit, print_object, to_json
from llm_orchestrator.model import Json


class ResultFormat(StrEnum):
    """How a result is printed. `text`: texts as they are, one output after the other."""

    JSON = "json"
    YAML = "yaml"
    TEXT = "text"


@dataclass(frozen=True)
class Ask:
    """The words after `llmo run`."""

    file: str
    output: ResultFormat
    whole: str | None = None
    pairs: tuple[str, ...] = ()
    is_detached: bool = False
    is_streaming: bool = False
    steps_max: int | None = None
    key: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    priority: int | None = None
    timeout_s: float | None = None
    is_dry: bool = False


def print_result(result: Json, kind: ResultFormat) -> None:
    """A run's output on stdout."""
    if kind is not ResultFormat.TEXT:
        print_object(result, kind)
        return
    values = list(result.values()) if isinstance(result, dict) else [result]
    for value in values:
        emit(value if isinstance(value, str) else to_json(value))

"""Action `log`: a line in the program's own log.

It never logs the value of a parameter whose name says that it is a secret, and never more than one
line: control characters in a message are written out, so that nobody can forge a second entry.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

from llm_orchestrator.errors import AuthorError
from llm_orchestrator.model import Effect, Json
from llm_orchestrator.steps.base import Outputs, StepContext
from llm_orchestrator.steps.values import to_text
from llm_orchestrator.telemetry.redact import redact as redact_text

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "warn": logging.WARNING,
    "error": logging.ERROR,
}
REDACTED = "[redacted]"
TEXT_MAX = 10_000
_SECRET = re.compile(
    r"secret|passw|token$|api_?key|authorization|credential|private_?key|cookie", re.IGNORECASE
)
_log = logging.getLogger("llm_orchestrator.workflow")


class Log:
    """`message`, `level` (default info); every further parameter is a field of the entry."""

    def effect(self, parameters: Mapping[str, Json]) -> Effect:
        """A second line does no harm."""
        return Effect.REPEATABLE

    async def execute(
        self, context: StepContext, parameters: Mapping[str, Json], *, effect: Effect
    ) -> Outputs:
        """Write the line; the result is the message, without secrets."""
        level = str(parameters.get("level", "info")).lower()
        if level not in LEVELS:
            raise AuthorError(f"action log has no level {level!r}; use one of {', '.join(LEVELS)}")
        message = redact_text(to_text(parameters.get("message")))
        fields = {key: item for key, item in parameters.items() if key not in {"message", "level"}}
        _log.log(
            LEVELS[level],
            "%s",
            one_line(message),
            extra={
                "run_id": context.run_id,
                "step": context.step,
                "attempt": context.attempt,
                "fields": redact(fields),
            },
        )
        return {"result": message}


def redact(value: Json) -> Json:
    """A copy in which whatever stands under a secret's name is gone."""
    if isinstance(value, Mapping):
        return {
            key: REDACTED if _SECRET.search(str(key)) else redact(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return value


def one_line(text: str) -> str:
    """At most 10,000 characters of `text`, its control characters written out."""
    kept = text if len(text) <= TEXT_MAX else f"{text[:TEXT_MAX]}... ({len(text)} characters)"
    return "".join(
        character if character.isprintable() else repr(character)[1:-1] for character in kept
    )

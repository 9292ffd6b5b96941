"""What an exception means for a step: its kind, its words, and whether another try makes sense."""

from __future__ import annotations

from llm_orchestrator.errors import AuthorError, OrchestratorError
from llm_orchestrator.model import Json, Retry
from llm_orchestrator.telemetry.redact import redact

MESSAGE_CHARACTERS_MAX = 4_000


def describe(error: BaseException) -> dict[str, Json]:
    """An error as it stands in the journal: {kind, message} and what else helps to mend it.

    Without the secrets that this process knows.
    """
    kind = getattr(error, "kind", None) if isinstance(error, OrchestratorError) else None
    message = str(error)
    if not isinstance(error, OrchestratorError):  # a KeyError's text alone is just a key
        message = f"{type(error).__name__}: {message}" if message else type(error).__name__
    facts: dict[str, Json] = {
        "kind": kind or type(error).__name__,
        "message": redact(message)[:MESSAGE_CHARACTERS_MAX],
    }
    hint = getattr(error, "hint", None)
    if hint:
        facts["hint"] = redact(str(hint))
    status = getattr(error, "status", None)
    if status:
        facts["status"] = status
    return facts


def is_retryable(error: BaseException, retry: Retry) -> bool:
    """`retry_on` decides where given; else our own errors know, and foreign ones are retried."""
    if retry.retry_on:
        names = {kind.__name__ for kind in type(error).__mro__} | {str(describe(error)["kind"])}
        return bool(names & set(retry.retry_on))
    if isinstance(error, AuthorError):
        return False
    if isinstance(error, OrchestratorError):
        return error.retryable
    return True

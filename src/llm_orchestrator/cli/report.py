"""What an error looks like on a terminal: `error: ...`, `hint: ...`, and the exit code.

Known errors bring message, hint and code with them; an unknown one is ours to mend and says so. A
workflow file's problems stand alone, one a line, as PATH:LINE:COL: message. Nothing that came from
outside may move the reader's cursor: control characters are shown, not sent.
"""

from __future__ import annotations

import re
import sys
from typing import Any

from llm_orchestrator.telemetry.redact import redact

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """`text` without what would steer a terminal; newlines and tabs stay."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def say(text: str) -> None:
    """One line, or more, on stderr, without secrets.

    A stderr that is gone or full is no reason to stop.
    """
    text = redact(text)
    try:
        print(printable(text), file=sys.stderr, flush=True)
    except UnicodeEncodeError:
        print(printable(text).encode("ascii", "backslashreplace").decode(), file=sys.stderr)
    except OSError:
        return


def report(error: BaseException, *, is_debug: bool = False) -> int:
    """Print `error` on stderr; returns the exit code."""
    from llm_orchestrator.errors import DefinitionError, OrchestratorError, RunFailed

    if is_debug:
        import traceback

        say("".join(traceback.format_exception(error)).rstrip())
    if isinstance(error, DefinitionError):
        for problem in error.problems:
            say(str(problem))
        return _end(error.exit_code, error.hint)
    if isinstance(error, OrchestratorError):
        say(f"error: {error.message}")
        recorded = error.error if isinstance(error, RunFailed) else None
        if isinstance(recorded, dict) and recorded.get("hint"):
            say(f"hint: {recorded['hint']}")
        return _end(error.exit_code, error.hint)
    usage = _usage(error)
    if usage is not None:
        say(f"error: {usage[0]}")
        return _end(2, usage[1])
    if isinstance(error, OSError):
        say(f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        return 1
    say(f"error: internal error: {type(error).__name__}: {error}")
    return _end(1, "run it again with --debug, and report what it prints")


def _usage(error: BaseException) -> tuple[str, str] | None:
    """Message and hint of a mistake on the command line."""
    if hasattr(error, "hint") and getattr(error, "exit_code", None) == 2:
        return str(error), error.hint
    if "typer" not in sys.modules:
        return None
    from typer import Abort, TyperException

    if isinstance(error, Abort):
        return "the input ended", "llmo --help"
    if not isinstance(error, TyperException):
        return None
    context: Any = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "llmo"
    message = error.format_message().replace("Value error, ", "")
    return message[:1].lower() + message[1:], f"{path} --help"


def _end(code: int, hint: str | None) -> int:
    if hint:
        say(f"hint: {hint}")
    return code

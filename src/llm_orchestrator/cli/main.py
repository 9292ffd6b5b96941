"""The entry point: global flags, which verb, and what an error looks like.

Nothing heavy is imported here: `llmo --version` and `llmo --help` answer at once, and each verb's
module is loaded when called. Data goes to stdout, everything else to stderr; the process ends with
the exit code that the error itself carries (errors.py). Tracebacks are shown only with --debug.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

from llm_orchestrator.cli.report import report

PROGRAM = "llmo"
VERBS: dict[str, tuple[str, str]] = {
    "validate": ("validate", "check workflow files; every mistake with its line and column"),
    "run": ("run", "run a workflow and wait for its result"),
    "runs": ("runs", "list, show, explain, change and follow runs"),
    "workflows": ("workflows", "list, show, register and compare definitions"),
    "serve": ("serve", "execute the runs of a store until told to stop"),
    "nodes": ("nodes", "list the nodes that execute runs, drain one"),
    "region": ("region", "which regions work; fail over to another one, and back"),
    "maintenance": ("maintenance", "refuse new runs for a while, on every node"),
    "breakers": ("breakers", "list the providers' circuit breakers, close them by hand"),
    "journal": ("journal", "verify what is recorded, repair what is damaged"),
    "backup": ("backup", "make backup files, check, prove, list and prune them"),
    "restore": ("restore", "put the store back from a backup; the old one is kept"),
    "archive": ("archive", "the stream archive: what it holds, whether it is whole"),
    "recovery": ("recovery", "after a restore: decide about runs that would act twice"),
    "dr": ("dr", "how ready this site is: what would be lost now, what is proved"),
    "audit": ("audit", "list who did what, verify that nobody has changed it"),
    "schema": ("schema", "print the JSON Schema of workflow files, for editors"),
    "local": ("local", "fetch, start and stop the local model"),
    "lab": ("lab", "a cluster of real servers on this machine: up, status, calm, down"),
    "drill": ("drill", "inject a disaster for real and measure the recovery"),
    "config": ("config", "show the settings and where they come from"),
    "status": ("status", "what is wrong, and which command mends it"),
    "doctor": ("doctor", "check this machine, the store and the providers' keys"),
    "completions": ("completions", "print the completion script of a shell"),
}
DEFAULTS = {
    "runs": "list",
    "workflows": "list",
    "nodes": "list",
    "region": "status",
    "maintenance": "show",
    "breakers": "list",
    "audit": "list",
    "config": "show",
    "lab": "status",
    "drill": "list",
}
"""What a group does when it is called without a verb of its own."""


class Flags(NamedTuple):
    """What may stand before or after any verb."""

    store: str | None = None
    data: str | None = None
    is_debug: bool = False
    is_quiet: bool = False


class BadUsage(Exception):
    """A mistake in the words before the verb. `hint` is the command that shows the right ones."""

    exit_code = 2

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    is_debug = "--debug" in given
    try:
        flags, rest = take_flags(given)
        code = _dispatch(rest, flags)
        sys.stdout.flush()
    except BrokenPipeError:
        return _reader_left()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):
            return _reader_left()
        return error.code if isinstance(error.code, int) else 1
    except Exception as error:  # noqa: BLE001 - the last door: no traceback leaves it unasked
        return report(error, is_debug=is_debug)
    return code


def take_flags(arguments: Sequence[str]) -> tuple[Flags, list[str]]:
    """The global flags, wherever they stand before `--`, and what is left."""
    values: dict[str, Any] = {}
    rest: list[str] = []
    left = iter(arguments)
    for word in left:
        name, equals, value = word.partition("=")
        if word == "--":
            return Flags(**values), [*rest, word, *left]
        if name in ("--store", "--data"):
            if not equals:
                value = next(left, "")
            if not value:
                raise BadUsage(f"{name} needs a value", f"{PROGRAM} --help")
            values[name[2:]] = value
        elif word in ("--debug", "--quiet"):
            values[f"is_{word[2:]}"] = True
        else:
            rest.append(word)
    return Flags(**values), rest


def _dispatch(arguments: list[str], flags: Flags) -> int:
    verb = arguments[0] if arguments else "--help"
    rest = arguments[1:]
    if verb == "help" and rest:
        verb, rest = rest[0], [*rest[1:], "--help"]
    if verb in ("--help", "-h", "help"):
        print(help_text())
        return 0
    if verb in ("--version", "-V"):
        print(f"llm-orchestrator {_version()}")
        return 0
    if verb not in VERBS:
        raise _unknown(verb)
    if verb in DEFAULTS and (not rest or rest[0].startswith("-")) and "--help" not in rest:
        rest = rest if "-h" in rest else [DEFAULTS[verb], *rest]
    return call(verb, rest, flags)


def call(verb: str, arguments: list[str], flags: Flags) -> int:
    """Load the verb's module and run it."""
    from llm_orchestrator.cli.session import Session

    result = command_of(verb).main(
        args=arguments, prog_name=f"{PROGRAM} {verb}", standalone_mode=False, obj=Session(flags)
    )
    return result if isinstance(result, int) else 0


def command_of(verb: str) -> Any:
    """The verb's command tree."""
    from typer.main import get_command

    return get_command(import_module(f"llm_orchestrator.cli.{VERBS[verb][0]}").app)


def help_text() -> str:
    """What `llmo --help` prints."""
    verbs = "\n".join(f"  {name:<12}{text}" for name, (_, text) in VERBS.items())
    return f"""\
Usage: {PROGRAM} VERB ... [--store URL] [--data DIR] [--debug] [--quiet]

Durable workflows for LLM applications.

Verbs ({PROGRAM} VERB --help says more):
{verbs}

Before or after any verb:
  --store URL   the store, e.g. sqlite:///runs.db (LLM_ORCHESTRATOR_URL)
  --data DIR    where data and the local model live (LLM_ORCHESTRATOR_DATA)
  --debug       show tracebacks and the engine's log
  --quiet       show errors only
  --version     print the version

Data goes to stdout, everything else to stderr. Exit codes: 0 ok, 1 failed, 2 usage, 3 partial or
paused, 4 not found, 5 denied, 6 objective missed, 7 inconclusive, 8 integrity, 9 workflow failed,
10 store absent, 11 locked, 124 timed out, 130 and 143 signals."""


def _unknown(verb: str) -> BadUsage:
    from difflib import get_close_matches

    if verb.startswith("-"):
        options = ["--store", "--data", "--debug", "--quiet", "--version", "--help"]
        close = get_close_matches(verb, options, n=1)
        what = f"no such option: {verb}"
    else:
        close = get_close_matches(verb, VERBS, n=1)
        what = f"no such verb: {verb}"
    meant = f"; did you mean {close[0]}?" if close else ""
    command = f"{PROGRAM} {close[0]} --help" if close and not verb.startswith("-") else ""
    return BadUsage(what + meant, command or f"{PROGRAM} --help")


def _version() -> str:
    from llm_orchestrator import __version__

    return __version__


def _reader_left() -> int:
    """Whoever read our output has seen enough: that is no failure, and nothing more is said."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0

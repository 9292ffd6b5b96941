"""Every exception of the product, and what its reader must do next.

OrchestratorError                 one base class; ``hint`` is the command or edit that mends it
├── AuthorError                   the author's mistake: fix the workflow or its input
│   ├── DefinitionError           a workflow file is wrong; carries every problem at once
│   ├── InputError                a run's inputs do not fit the workflow
│   ├── TemplateError             a template or a condition cannot be evaluated
│   ├── TooLarge                  a result is bigger than a journal may hold
│   └── StepFailed                a step gave up after its last attempt
├── OperatorError                 the operator's problem: the hint names the command
│   ├── ConfigError               a setting is missing or wrong
│   ├── NotFound                  no such run, workflow, step or checkpoint
│   ├── Unauthenticated           no valid token came with the request
│   ├── Denied                    whoever asks may not do this
│   ├── Refused                   the state machine says no
│   │   ├── Overtaken             somebody else wrote to the run first
│   │   └── KeyReused             an idempotency key came back with another input
│   ├── Maintenance               no new runs are taken for now; an operator said so
│   ├── Draining                  this node takes no new runs any more; another one may
│   ├── RunPaused                 the run waits for a person's decision
│   ├── RunFailed                 the run ended failed or cancelled
│   └── StoreError                the store cannot be used as it is
│       ├── StoreAbsent           nothing there
│       ├── StoreUnavailable      it does not answer now; it will be asked again
│       │   └── StoreResting      it did not answer again and again: not asked for a moment
│       ├── StoreDenied           it does not let us in
│       ├── StoreLocked           another engine owns it
│       ├── StoreForeign          the file is not ours
│       ├── StoreIsCopy           a restored copy: no engine drives its runs
│       ├── StoreReplaced         it was restored under us: begin anew
│       ├── StoreNewer            made by a newer version of this program
│       ├── StoreFull             the disk is full
│       ├── StoreReadOnly         the file or folder cannot be written
│       ├── StoreDamaged          recorded bytes fail their check
│       ├── WrongKey              what is sealed is not sealed for the keys that are here
│       └── NotUploaded           a backup is made and is here; the second place does not have it
├── ProviderError                 a provider refused or broke; ``kind`` is what ``retry_on`` names
│   ├── ProviderTransient         5xx, reset, overloaded: try again
│   ├── ProviderRateLimited       429: try again after ``retry_after_s``
│   ├── ProviderTimeout           no answer in time, and nothing can have been done
│   ├── ProviderUnavailable       the breaker is open or a limit is spent: park, burn no attempt
│   │   └── ProviderOutage        it was asked and broke, as it does for everybody: the same
│   ├── ProviderAuthentication    the key is missing or refused
│   ├── ProviderInvalidRequest    the request can never succeed
│   ├── ProviderContentFiltered   refused for its content
│   └── ProviderUnknownOutcome    it may or may not have been done
└── StepTimeout                   a step ran longer than its own limit

Control flow that user code must not swallow is no ``Exception``:
ControlFlow(BaseException)
├── Fenced                        another owner has the run; stop at once, write nothing
├── Suspended                     the run leaves the process until a wake-up
└── Diverged                      a Python workflow left the path that its journal records
"""

from __future__ import annotations

from typing import NamedTuple


class OrchestratorError(Exception):
    """Base class. ``exit_code`` is what the command line ends with."""

    exit_code = 1
    kind = "error"
    retryable = False

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class Problem(NamedTuple):
    """One thing wrong in a file. Lines and columns count from 1; 0 means unknown."""

    path: str
    line: int
    column: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}:{self.column}: {self.message}"


class AuthorError(OrchestratorError):
    """Fix the workflow or its input."""

    kind = "author"


class DefinitionError(AuthorError):
    """A workflow file is wrong. ``problems`` lists everything found, in file order."""

    exit_code = 2
    kind = "definition"

    def __init__(self, problems: list[Problem], *, hint: str | None = None) -> None:
        super().__init__("\n".join(str(problem) for problem in problems), hint=hint)
        self.problems = problems


class InputError(AuthorError):
    """Inputs do not fit the workflow's ``inputs`` section."""

    exit_code = 2
    kind = "input"


class TemplateError(AuthorError):
    """A template or condition does not parse, or names something that is not there."""

    kind = "template"


class TooLarge(AuthorError):
    """A result is bigger than a journal may hold. Not retried: the next one would be as big."""

    kind = "too_large"


class StepFailed(AuthorError):
    """A step gave up. ``error_kind`` is the last error's kind, ``step`` its path in the run."""

    kind = "step_failed"

    def __init__(
        self, message: str, *, step: str, error_kind: str, hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.step = step
        self.error_kind = error_kind


class OperatorError(OrchestratorError):
    """Something around the run must be mended; ``hint`` names the command."""

    kind = "operator"


class ConfigError(OperatorError):
    """A setting is missing or wrong."""

    exit_code = 2
    kind = "config"


class NotFound(OperatorError):
    """No such run, workflow, step or checkpoint."""

    exit_code = 4
    kind = "not_found"


class Refused(OperatorError):
    """The request does not fit the state that the thing is in."""

    exit_code = 1
    kind = "refused"


class Overtaken(Refused):
    """Somebody else wrote to the run first. ``epoch`` is the one under which it is driven now."""

    kind = "overtaken"
    retryable = True

    def __init__(self, message: str, *, run_id: str, epoch: int) -> None:
        super().__init__(message, hint="look at the run again, then ask again")
        self.run_id = run_id
        self.epoch = epoch


class KeyReused(Refused):
    """An idempotency key came back with another input. ``run_id`` is the first one's run."""

    kind = "key_reused"

    def __init__(self, key: str, run_id: str) -> None:
        super().__init__(
            f"idempotency key {key!r} was used with another input", hint=f"llmo runs show {run_id}"
        )
        self.run_id = run_id


class Unauthenticated(OperatorError):
    """No valid token came with the request."""

    exit_code = 5
    kind = "unauthenticated"


class Denied(OperatorError):
    """Whoever asks may not do this."""

    exit_code = 5
    kind = "denied"


class Maintenance(OperatorError):
    """New runs are refused: maintenance mode. What runs goes on or waits; reads work."""

    kind = "maintenance"
    retryable = True

    def __init__(
        self, message: str, *, retry_after_s: float | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class Draining(OperatorError):
    """The node takes no new runs: it is drained, or it stops."""

    kind = "draining"
    retryable = True

    def __init__(
        self, message: str, *, retry_after_s: float | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class RunPaused(OperatorError):
    """The run waits for a person. ``reason`` is the pause's reason."""

    exit_code = 3
    kind = "paused"

    def __init__(self, message: str, *, reason: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.reason = reason


class RunFailed(OperatorError):
    """The run ended failed or cancelled. ``state`` says which, ``error`` is the recorded one."""

    exit_code = 9
    kind = "run_failed"

    def __init__(
        self, message: str, *, state: str, error: object = None, hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.state = state
        self.error = error


class StoreError(OperatorError):
    """The store cannot be used as it is."""

    kind = "store"


class StoreAbsent(StoreError):
    """There is no store at that address."""

    exit_code = 10
    kind = "store_absent"


class StoreUnavailable(StoreError):
    """The database does not answer, is failing over, or is busy. Nothing acknowledged is lost."""

    kind = "store_unavailable"
    retryable = True


class StoreResting(StoreUnavailable):
    """The store failed to answer again and again: for `retry_after_s` it is not asked at all."""

    def __init__(self, message: str, *, retry_after_s: float, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class StoreDenied(StoreError):
    """The database refuses this user or this password."""

    exit_code = 5
    kind = "store_denied"


class StoreLocked(StoreError):
    """Another engine owns the store."""

    exit_code = 11
    kind = "store_locked"


class StoreReplaced(StoreError):
    """It was restored, or another one stands in its place: what is known of it counts no more."""

    kind = "store_replaced"


class StoreIsCopy(StoreError):
    """It was restored aside: nobody may drive its runs until it takes the live store's place."""

    kind = "store_is_copy"


class StoreForeign(StoreError):
    """The file is no store of ours."""

    kind = "store_foreign"


class StoreNewer(StoreError):
    """The store was made by a newer version."""

    kind = "store_newer"


class StoreFull(StoreError):
    """The disk under the store is full. Nothing that was acknowledged is lost."""

    kind = "store_full"
    retryable = True


class StoreReadOnly(StoreError):
    """The store's file or folder cannot be written."""

    kind = "store_read_only"


class StoreDamaged(StoreError):
    """Recorded bytes fail their check. ``run_id`` names the run, if one is known."""

    exit_code = 8
    kind = "damaged"

    def __init__(self, message: str, *, run_id: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.run_id = run_id


class WrongKey(StoreError):
    """None of the keys that are here opens it."""

    exit_code = 12
    kind = "wrong_key"


class NotUploaded(StoreError):
    """A backup file is whole and in its folder, but the second place does not have it."""

    exit_code = 3
    kind = "not_uploaded"


class ProviderError(OrchestratorError):
    """A provider refused or broke. Adapters raise only the subclasses."""

    kind = "provider"

    def __init__(
        self,
        message: str,
        *,
        provider: str = "",
        status: int | None = None,
        retry_after_s: float | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.provider = provider
        self.status = status
        self.retry_after_s = retry_after_s


class ProviderTransient(ProviderError):
    """Broken for the moment, and nothing was done: try again."""

    kind = "transient"
    retryable = True


class ProviderRateLimited(ProviderTransient):
    """Too many requests or tokens; ``retry_after_s`` is the provider's word, if it gave one."""

    kind = "rate_limit"


class ProviderTimeout(ProviderTransient):
    """No answer in time."""

    kind = "timeout"


class ProviderUnavailable(ProviderTransient):
    """Our breaker is open or our own limit is spent. No request was sent, no attempt is burnt."""

    kind = "unavailable"
    breaker = ""
    """The name of the breaker that is not closed; empty when it is something else."""


class ProviderOutage(ProviderUnavailable):
    """It was asked and did not answer, and its breaker is open: no fault of this request."""


class ProviderAuthentication(ProviderError):
    """The key is missing or refused."""

    kind = "authentication"


class ProviderInvalidRequest(ProviderError):
    """The request can never succeed as it is."""

    kind = "invalid_request"


class ProviderContentFiltered(ProviderError):
    """Refused for its content."""

    kind = "content_filter"


class ProviderUnknownOutcome(ProviderError):
    """The request went out and no answer came back: it may or may not have been done."""

    kind = "unknown_outcome"
    retryable = True


class StepTimeout(OrchestratorError):
    """A step ran longer than its ``timeout_seconds``."""

    kind = "timeout"
    retryable = True


class ControlFlow(BaseException):
    """Unwinds a run's code. Never caught by workflow code."""


class Fenced(ControlFlow):
    """Another owner has the run: stop, start no effect, write nothing."""


class Suspended(ControlFlow):
    """The run is parked and leaves the process."""


class Diverged(ControlFlow):
    """The code asked for something else than the journal records; the message shows both sides."""

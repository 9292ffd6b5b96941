"""Why a run is not moving, in one sentence, and the command that moves it. Pure.

Reads the fold (what the journal says), the row of `runs` (when it wakes) and a few facts about the
surroundings. It never guesses: where the journal does not tell two causes apart, the sentence names
both.
"""

from __future__ import annotations

import datetime
from typing import NamedTuple

from llm_orchestrator.engine.control import is_held_by_restore
from llm_orchestrator.engine.gate import NEVER
from llm_orchestrator.engine.replay import Fold
from llm_orchestrator.model import MICROSECONDS, Json, Run, RunState

_APPROVAL, _CHILD = "approval:", "child:"
_SERVE = "llmo serve"


class Explanation(NamedTuple):
    """One sentence, and the command that moves the run (or shows more where nothing can)."""

    sentence: str
    command: str


class Surroundings(NamedTuple):
    """What stands around the run. `queue_max` None: its queue has no limit of its own."""

    is_engine_alive: bool
    is_python: bool = False
    queue_running: int = 0
    queue_max: int | None = None


def explain(fold: Fold, row: Run | None, now: int, *, around: Surroundings) -> Explanation:
    """Why the run stands where it stands. `now` is microseconds on the store's clock."""
    wake_at = row.wake_at if row is not None else 0
    if fold.state is RunState.PENDING:
        return _pending(fold, wake_at, now, around=around)
    if fold.state is RunState.RUNNING:
        return _running(fold, now, around)
    if fold.state is RunState.WAITING:
        return _waiting(fold, wake_at, now, around=around)
    if fold.state is RunState.PAUSED:
        return _paused(fold)
    return _ended(fold)


def _pending(fold: Fold, wake_at: int, now: int, *, around: Surroundings) -> Explanation:
    run_id = fold.run_id
    if not around.is_engine_alive:
        return Explanation("it waits for an engine: none serves the store now", _SERVE)
    if wake_at > now:
        return Explanation(
            f"it was asked to start later, {_when(wake_at, now)}", f"llmo runs watch {run_id}"
        )
    queue = fold.accepted.get("queue", "default")
    if around.queue_max is not None and around.queue_running >= around.queue_max:
        return Explanation(
            f"its queue {queue} is full: {around.queue_running} of {around.queue_max} runs are "
            "being driven",
            f"llmo runs list --queue {queue} --state running",
        )
    workflow = fold.accepted.get("workflow", "")
    if around.is_python:
        return Explanation(
            f"the engine has not claimed it: it is full, or the code of Python workflow "
            f"{workflow} is not in its process",
            "llmo serve --import MODULE",
        )
    return Explanation(
        "the engine has not claimed it yet: it is full, or just about to",
        f"llmo runs watch {run_id}",
    )


def _running(fold: Fold, now: int, around: Surroundings) -> Explanation:
    if not around.is_engine_alive:
        return Explanation(
            f"the engine that drove it ({fold.owner or 'unknown'}) is gone; the next one goes on "
            "from the last finished step",
            _SERVE,
        )
    watch = f"llmo runs watch {fold.run_id}"
    if fold.intents:
        return Explanation(f"it is executing {_some(list(fold.intents), 'step')}", watch)
    retry = _retry(fold, now)
    if retry is not None:
        return Explanation(retry, watch)
    return Explanation(f"it is being driven by {fold.owner or 'an engine'}", watch)


def _waiting(fold: Fold, wake_at: int, now: int, *, around: Surroundings) -> Explanation:
    found = _wait_for_somebody(fold, now)
    if found is not None:
        return found
    watch = f"llmo runs watch {fold.run_id}"
    if wake_at <= now:
        if around.is_engine_alive:
            return Explanation("its wait is over and an engine is about to go on with it", watch)
        return Explanation("its wait is over, but no engine serves the store", _SERVE)
    timers = [
        step
        for step, wait in fold.waits.items()
        if wait.get("for") == "timer" and int(wait.get("until", 0)) > now
    ]
    if timers:
        sentence = f"{_some(timers, 'step')} waits for its time, {_when(wake_at, now)}"
    else:
        sentence = _retry(fold, now) or (
            "a provider is unavailable or its limit is spent; the next request goes out "
            f"{_when(wake_at, now)}, no attempt is burnt"
        )
    if not around.is_engine_alive:
        return Explanation(f"{sentence}; no engine serves the store", _SERVE)
    return Explanation(sentence, watch)


def _wait_for_somebody(fold: Fold, now: int) -> Explanation | None:
    """The first open wait for a message: an approval, a signal, a child's end."""
    run_id = fold.run_id
    waits = open_waits(fold)
    for step, wait in waits.items():
        name, until = str(wait.get("name", "")), int(wait.get("until", NEVER))
        limit = "" if until >= NEVER else f", or until {_stamp(until)}"
        if until <= now:
            continue
        more = f" (and {len(waits) - 1} more)" if len(waits) > 1 else ""
        if name.startswith(_APPROVAL):
            return Explanation(
                f"step {step} waits for somebody's approval{limit}{more}",
                f"llmo runs approve {run_id} {step}",
            )
        if name.startswith(_CHILD):
            child = name.removeprefix(_CHILD)
            return Explanation(
                f"step {step} waits for the end of its child run {child}{more}",
                f"llmo runs explain {child}",
            )
        return Explanation(
            f"step {step} waits for the signal {name!r}{limit}{more}",
            f"llmo runs signal {run_id} {name}",
        )
    return None


def open_waits(fold: Fold) -> dict[str, dict[str, Json]]:
    """Waits for a message that nobody has answered, by step."""
    return {
        step: wait
        for step, wait in fold.waits.items()
        if wait.get("for") == "signal" and step not in fold.signals and step not in fold.finished
    }


def _paused(fold: Fold) -> Explanation:
    run_id, message = fold.run_id, _message(fold.error)
    resume = f"llmo runs resume {run_id}"
    if is_held_by_restore(fold):
        return Explanation(
            f"the store was put back to a point before some of its effects ({message}); say "
            "whether they stand, or are to be done again",
            f"llmo recovery reconcile accept {run_id}",
        )
    if fold.reason == "unknown_outcome":
        step = next(iter(fold.intents), "STEP")
        return Explanation(
            f"nobody knows whether {_some(list(fold.intents), 'step')} was done: the process died "
            "between asking and the answer; say what became of it",
            f"{resume} --step {step} --as retry|finished|failed",
        )
    if fold.reason == "nondeterminism":
        return Explanation(
            f"the code is not the one that began this run: {message}; bring that code back, "
            "then resume",
            resume,
        )
    if fold.reason == "damaged":
        return Explanation(
            f"a part of its journal is lost: {message}; look at it, then let it go on",
            f"llmo runs journal {run_id} && {resume}",
        )
    if fold.reason == "quarantine":
        return Explanation(
            f"it was set aside because engines died while they executed it: {message}", resume
        )
    return Explanation("an operator paused it", resume)


def _ended(fold: Fold) -> Explanation:
    run_id = fold.run_id
    if fold.state is RunState.COMPLETED:
        return Explanation("its result is recorded", f"llmo runs result {run_id}")
    if fold.state is RunState.CANCELLED:
        return Explanation(
            "it was cancelled, which is final; a fork starts anew with its results",
            f"llmo runs fork {run_id}",
        )
    message = _message(fold.error)
    if fold.reason == "timeout":
        return Explanation(
            f"it failed: {message}; its time is spent, only a fork has time again",
            f"llmo runs fork {run_id}",
        )
    return Explanation(
        f"it failed: {message}; finished steps stand and are not paid for again",
        f"llmo runs retry {run_id}",
    )


def _retry(fold: Fold, now: int) -> str | None:
    """The next try of a step that failed, if one is planned."""
    planned = [
        (failure.next_at, step, failure)
        for step, failure in fold.failures.items()
        if not failure.is_final and failure.next_at > now
    ]
    if not planned:
        return None
    next_at, step, failure = min(planned, key=lambda item: item[0])
    return (
        f"attempt {failure.attempt} of step {step} failed ({_message(failure.error)}); "
        f"the next one starts {_when(next_at, now)}"
    )


def _message(error: Json) -> str:
    if isinstance(error, dict):
        return str(error.get("message") or error.get("kind") or "no reason was recorded")
    return str(error) if error else "no reason was recorded"


def _some(names: list[str], noun: str) -> str:
    if not names:
        return f"a {noun}"
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{noun} {names[0]}{more}"


def _when(moment: int, now: int) -> str:
    seconds = (moment - now) / MICROSECONDS
    return f"in {seconds:.1f} s ({_stamp(moment)})" if seconds < 600 else f"at {_stamp(moment)}"


def _stamp(moment: int) -> str:
    try:
        at = datetime.datetime.fromtimestamp(moment / MICROSECONDS, tz=datetime.UTC)
    except (OverflowError, ValueError, OSError):
        return "the end of time"
    return at.isoformat(timespec="seconds").replace("+00:00", "Z")

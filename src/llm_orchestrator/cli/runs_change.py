"""The verbs of `llmo runs` that change runs. Each is one request to the engine's Operator.

A run that is being driven is asked through its inbox; one that nobody drives is changed at once.
With --dry-run the machine's own table says what would happen. Several ids: what can be done is
done, the rest is named, and the exit code is 3 when only some could.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from llm_orchestrator.cli.given import guess, merge_inputs, read_ids, read_json, read_pairs
from llm_orchestrator.cli.options import DryRun, Format, Output, RunIds, RunOrStdin
from llm_orchestrator.cli.output import print_rows
from llm_orchestrator.cli.report import report
from llm_orchestrator.cli.session import Session, session_of, whoami
from llm_orchestrator.errors import OrchestratorError, Refused
from llm_orchestrator.model import Json

if TYPE_CHECKING:
    from llm_orchestrator.engine.control import Answer, Operator
    from llm_orchestrator.engine.machine import Event
    from llm_orchestrator.store.base import Database, Store

T = TypeVar("T")
COLUMNS = ("run_id", "state", "message")
By = Annotated[str | None, typer.Option("--by", metavar="NAME", help="Who decides (you).")]
Act = Callable[["Operator", str], Awaitable["Answer"]]
Done = tuple[list[dict[str, Json]], list[OrchestratorError]]
"""What came of each, and the errors of those of which nothing came."""


class Choice(StrEnum):
    """What became of a step whose outcome is unknown."""

    RETRY = "retry"
    FINISHED = "finished"
    FAILED = "failed"


def cancel(
    context: typer.Context,
    run_ids: RunIds,
    *,
    by: By = None,
    is_dry: DryRun = False,
    output: Output = Format.TABLE,
) -> int:
    """End runs for good; their children too."""
    name = by or whoami()
    return _change_all(
        session_of(context),
        run_ids,
        "cancel",
        act=lambda operator, run_id: operator.cancel(run_id, by=name),
        detail={"by": name},
        is_dry=is_dry,
        output=output,
    )


def pause(
    context: typer.Context,
    run_ids: RunIds,
    *,
    by: By = None,
    is_dry: DryRun = False,
    output: Output = Format.TABLE,
) -> int:
    """Let steps in flight end, then hold the runs until `resume`."""
    name = by or whoami()
    return _change_all(
        session_of(context),
        run_ids,
        "pause",
        act=lambda operator, run_id: operator.pause(run_id, by=name),
        detail={"by": name},
        is_dry=is_dry,
        output=output,
    )


def resume(
    context: typer.Context,
    run_ids: RunIds,
    *,
    step: Annotated[
        str | None, typer.Option(help="The step whose outcome is unknown; needs --as.")
    ] = None,
    choice: Annotated[Choice | None, typer.Option("--as", help="What became of that step.")] = None,
    result: Annotated[
        str | None,
        typer.Option(metavar="JSON|@FILE|-", help="Its result, with --as finished."),
    ] = None,
    by: By = None,
    is_dry: DryRun = False,
    output: Output = Format.TABLE,
) -> int:
    """Let paused runs go on; with --step and --as, decide what became of a step."""
    if (step is None) != (choice is None):
        raise typer.BadParameter("--step and --as belong together")
    if result is not None and choice is not Choice.FINISHED:
        raise typer.BadParameter("--result belongs to --as finished")
    value = read_json(result, "--result") if result is not None else None
    name = by or whoami()

    def act(operator: Operator, run_id: str) -> Awaitable[Answer]:
        if step is None or choice is None:
            return operator.resume(run_id, by=name)
        return operator.decide(run_id, step, choice.value, result=value, by=name)

    chosen: dict[str, Json] = {"step": step, "as": choice.value} if choice is not None else {}
    return _change_all(
        session_of(context),
        run_ids,
        "resume",
        act=act,
        detail={"by": name, **chosen},
        is_dry=is_dry,
        output=output,
    )


def retry(
    context: typer.Context,
    run_ids: RunIds,
    *,
    by: By = None,
    is_dry: DryRun = False,
    output: Output = Format.TABLE,
) -> int:
    """Run failed runs again from the steps that failed; finished steps stand."""
    name = by or whoami()
    return _change_all(
        session_of(context),
        run_ids,
        "retry",
        act=lambda operator, run_id: operator.retry(run_id, by=name),
        detail={"by": name},
        is_dry=is_dry,
        output=output,
    )


def rewind(
    context: typer.Context,
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN:SEQ...",
            help="Checkpoints: see SEQ in `llmo runs show`; `-` reads them from stdin.",
        ),
    ],
    *,
    by: By = None,
    is_dry: DryRun = False,
    output: Output = Format.TABLE,
) -> int:
    """Go back to a checkpoint; what came after is hidden, never deleted."""
    targets: dict[str, int] = {}
    for checkpoint in read_ids(checkpoints):
        run_id, _, seq = checkpoint.partition(":")
        if not seq.isdecimal() or run_id in targets:
            raise typer.BadParameter(f"{checkpoint!r} is no RUN:SEQ, or not the run's only one")
        targets[run_id] = int(seq)
    name = by or whoami()
    return _change_all(
        session_of(context),
        list(targets),
        "rewind",
        act=lambda operator, one: operator.rewind(one, targets[one], by=name),
        detail={"by": name, "to": checkpoints},
        is_dry=is_dry,
        output=output,
    )


def fork(
    context: typer.Context,
    run_ids: RunIds,
    *,
    step: Annotated[
        str | None, typer.Option(help="Start again from this step; without it only what is left.")
    ] = None,
    inputs: Annotated[
        str | None, typer.Option("-i", "--inputs", metavar="JSON|@FILE|-", help="Edited inputs.")
    ] = None,
    pairs: Annotated[
        list[str] | None, typer.Option("--input", metavar="NAME=VALUE", help="One edited input.")
    ] = None,
    is_dry: DryRun = False,
    output: Output = Format.IDS,
) -> int:
    """Start new runs that share the results before a step; prints the new ids."""
    session = session_of(context)
    if inputs == "-":
        _refuse_two(run_ids, "-i")
    edited = merge_inputs(inputs, pairs or ())
    ids = read_ids(run_ids)

    async def one(store: Database, run_id: str) -> dict[str, Json] | None:
        from llm_orchestrator.cli.follow import read_fold
        from llm_orchestrator.engine.control import Operator
        from llm_orchestrator.engine.maintenance import check_admission

        if is_dry:
            state = await read_fold(store, run_id)
            session.note(f"would fork run {run_id} ({state.state}); nothing was changed")
            return None
        detail: dict[str, Json] = {"step": step, "edited": sorted(edited)}
        async with session.audited(store, "runs.fork", target=run_id, detail=detail) as told:
            await check_admission(store.shelf)
            new_id = await Operator(store, store.clock).fork(run_id, step, inputs=edited or None)
            told["new_run_id"] = new_id
        return {"run_id": new_id, "fork_of": run_id, "step": step}

    rows, failures = session.run(_do_all(session, ids, one))
    forked = [row for row in rows if row is not None]
    print_rows(forked, output, columns=("run_id", "fork_of", "step"))
    return _code(session, failures, is_partial=bool(rows))


def signal(
    context: typer.Context,
    run_id: RunOrStdin,
    name: Annotated[str, typer.Argument(help="The signal's name.")],
    *,
    payload: Annotated[
        str | None, typer.Argument(metavar="[JSON|@FILE|-]", help="What to hand over.")
    ] = None,
    key: Annotated[
        str | None, typer.Option("--key", help="The same key again changes nothing.")
    ] = None,
    is_dry: DryRun = False,
    output: Output = Format.TABLE,
) -> int:
    """Hand a message to a run."""
    if payload == "-":
        _refuse_two([run_id], "the payload")
    value = read_json(payload, "payload") if payload is not None else None
    return _change_all(
        session_of(context),
        [run_id],
        "signal",
        act=lambda operator, one: operator.signal(one, name, value, sender_key=key),
        detail={"name": name},
        is_dry=is_dry,
        output=output,
    )


def approve(
    context: typer.Context,
    run_id: RunOrStdin,
    step: Annotated[
        str | None, typer.Argument(help="The approval step, if it waits for several.")
    ] = None,
    *,
    is_rejected: Annotated[bool, typer.Option("--reject", help="Say no.")] = False,
    form: Annotated[
        list[str] | None, typer.Option("--form", metavar="NAME=VALUE", help="One field.")
    ] = None,
    whole_form: Annotated[
        str | None, typer.Option("--form-json", metavar="JSON|@FILE|-", help="All fields.")
    ] = None,
    by: By = None,
    is_dry: DryRun = False,
    output: Output = Format.TABLE,
) -> int:
    """Answer an approval step: yes, or no with --reject."""
    if whole_form == "-":
        _refuse_two([run_id], "--form-json")
    name = by or whoami()
    fields = read_json(whole_form, "--form-json") if whole_form is not None else {}
    if form:
        pairs = read_pairs(form, "--form")
        fields = {**fields, **{key: guess(text) for key, text in pairs.items()}}
    return _change_all(
        session_of(context),
        [run_id],
        "approve",
        act=lambda operator, one: operator.approve(
            one, step, approved=not is_rejected, form=fields or None, by=name
        ),
        detail={"by": name, "step": step, "approved": not is_rejected},
        is_dry=is_dry,
        output=output,
    )


# -- how ------------------------------------------------------------------------------------------


def _change_all(
    session: Session,
    given: list[str],
    verb: str,
    *,
    act: Act,
    detail: Mapping[str, Json],
    is_dry: bool,
    output: Format,
) -> int:
    """Ask for each run; print what came of it. `detail` is for the audit log."""
    ids = read_ids(given)
    asking = (
        _would_all(session, ids, verb)
        if is_dry
        else _ask_all(session, ids, verb, act=act, detail=detail)
    )
    rows, failures = session.run(asking)
    print_rows(rows, output, columns=COLUMNS)
    if is_dry and rows:
        session.note("nothing was changed")
    return _code(session, failures, is_partial=bool(rows))


def _code(session: Session, failures: list[OrchestratorError], *, is_partial: bool) -> int:
    """Name what could not be done; the exit code."""
    codes = [report(error, is_debug=session.flags.is_debug) for error in failures]
    if not codes:
        return 0
    return 3 if is_partial else codes[0]


def _refuse_two(given: list[str], other: str) -> None:
    """Stdin holds one thing: ids, or a value."""
    if "-" in given:
        raise typer.BadParameter(f"ids and {other} cannot both come from stdin")


async def _ask_all(
    session: Session, ids: list[str], verb: str, *, act: Act, detail: Mapping[str, Json]
) -> Done:
    from llm_orchestrator.engine.control import Operator

    async def one(store: Database, run_id: str) -> dict[str, Json]:
        async with session.audited(store, f"runs.{verb}", target=run_id, detail=detail) as told:
            answer = await act(Operator(store, store.clock), run_id)
            told["answer"] = answer.message
        facts = {"run_id": run_id, "state": str(answer.state), "message": answer.message}
        return {**facts, "is_done": answer.is_done}

    return await _do_all(session, ids, one)


async def _would_all(session: Session, ids: list[str], verb: str) -> Done:
    from llm_orchestrator.engine.machine import Event

    event = Event(verb) if verb in set(Event) else None  # None: it is only a message to the run
    return await _do_all(session, ids, lambda store, run_id: _would(store, run_id, event))


async def _do_all(
    session: Session, ids: list[str], one: Callable[[Database, str], Awaitable[T]]
) -> tuple[list[T], list[OrchestratorError]]:
    """What came of each, and the errors of those of which nothing came."""
    rows: list[T] = []
    failures: list[OrchestratorError] = []
    async with session.client() as store:
        for run_id in ids:
            try:
                rows.append(await one(store, run_id))
            except OrchestratorError as error:
                failures.append(error)
    return rows, failures


async def _would(store: Store, run_id: str, event: Event | None) -> dict[str, Json]:
    """What the machine's table says of it. Raises Refused when it says no."""
    from llm_orchestrator.cli.follow import read_fold
    from llm_orchestrator.engine.machine import TRANSITIONS

    state = await read_fold(store, run_id)
    facts: dict[str, Json] = {"run_id": run_id, "state": str(state.state), "is_done": False}
    if event is None:
        if state.state.is_final:
            raise Refused(f"run {run_id} is {state.state} and takes no messages")
        return facts | {"message": "would get the message"}
    following = TRANSITIONS[state.state].get(event)
    if following is None:
        raise Refused(
            f"run {run_id} is {state.state}; it takes no {event}",
            hint=f"llmo runs explain {run_id}",
        )
    return facts | {"message": f"{event} would make it {following}"}

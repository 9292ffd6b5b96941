"""`llmo backup schedule`: make this machine back up by itself, with a systemd timer or with cron.

Exactly one of the two is there afterwards. `--root DIR` writes below another folder and starts
nothing: for images, and to look before doing it.
"""

from __future__ import annotations

import subprocess
import sys
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm_orchestrator.cli.options import DryRun, ObjectFormat, ObjectOutput
from llm_orchestrator.cli.output import emit, print_object
from llm_orchestrator.cli.session import Session, session_of, whoami
from llm_orchestrator.errors import NotFound, OperatorError
from llm_orchestrator.model import Json, stamp
from llm_orchestrator.recovery.schedule_files import With

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llm_orchestrator.config import Config
    from llm_orchestrator.recovery.schedule_files import Plan

_SYSTEMCTL_S = 60
_NEXT = 3


class Act(StrEnum):
    """What to do with the schedule."""

    INSTALL = "install"
    SHOW = "show"
    REMOVE = "remove"


def schedule(
    context: typer.Context,
    act: Annotated[Act, typer.Argument(help="What to do.")] = Act.SHOW,
    *,
    cron: Annotated[
        str | None, typer.Option(help='When: "0 2 * * *", "@daily"... (as backup_schedule says).')
    ] = None,
    kind: Annotated[
        With | None, typer.Option("--with", help="Who calls (systemd where it runs, else cron).")
    ] = None,
    root: Annotated[
        Path, typer.Option(metavar="DIR", help="Put the files below this folder; start nothing.")
    ] = Path("/"),
    user: Annotated[str | None, typer.Option(help="As whom (you).")] = None,
    folder: Annotated[Path | None, typer.Option("--dir", help="As `backup create --dir`.")] = None,
    place: Annotated[str | None, typer.Option(help="As `backup create --place`.")] = None,
    keep_days: Annotated[
        int | None, typer.Option(min=0, help="As `backup prune --keep-days`.")
    ] = None,
    is_proved: Annotated[
        bool, typer.Option("--prove/--no-prove", help="Prove each backup after it was made.")
    ] = True,
    is_dry: DryRun = False,
    output: ObjectOutput = ObjectFormat.TABLE,
) -> None:
    """Install, show or remove the machine's own schedule of backups."""
    session = session_of(context)
    if act is Act.SHOW:
        _show(session, root, output)
    elif act is Act.REMOVE:
        _remove(session, root, is_dry=is_dry)
    else:
        config = session.config_with({"backup_dir": folder, "backup_place": place})
        chosen, why = _cron(session, config, cron)
        words = ["--prune", *(["--prove"] if is_proved else [])]
        words += ["--dir", str(config.backup_folder.absolute())]
        words += ["--place", place] if place else []
        words += ["--keep-days", str(keep_days)] if keep_days is not None else []
        plan = _plan(config, chosen, words, user=user or whoami())
        session.note(f"schedule: {chosen} ({why})")
        _install(session, plan, kind=kind, root=root, is_dry=is_dry)


def _cron(session: Session, config: Config, given: str | None) -> tuple[str, str]:
    from llm_orchestrator.recovery.timetable import (
        HOUR_S,
        default_cron,
        longest_gap_s,
        plain_cron,
    )

    has_archive = bool(config.archive_place or config.barman_server)
    chosen = given or config.backup_schedule
    if not chosen:
        return default_cron(has_archive=has_archive)
    gap_s = longest_gap_s(plain_cron(chosen), session.clock.now_us())
    if gap_s > HOUR_S and not has_archive:
        session.warn(
            f"up to {gap_s / HOUR_S:g} hours of work are in no backup, and nothing else keeps them:"
            " a recovery point under one hour needs an hourly schedule, archive_place, or Barman"
        )
    return plain_cron(chosen), "as given"


def _plan(config: Config, cron: str, words: list[str], *, user: str) -> Plan:
    from llm_orchestrator.recovery.schedule_files import Plan
    from llm_orchestrator.wire import is_postgres, store_path

    settings = {"LLM_ORCHESTRATOR_DATA": str(config.data_dir.absolute())}
    writes = [config.backup_folder.absolute(), config.data_dir.absolute()]
    if is_postgres(config.store_url):
        settings["LLM_ORCHESTRATOR_URL"] = config.store_url
    else:
        path = store_path(config.store_url).absolute()
        settings["LLM_ORCHESTRATOR_URL"] = f"sqlite:///{path}"
        writes.append(path.parent)
    if config.file is not None:
        settings["LLM_ORCHESTRATOR_CONFIG"] = str(config.file.absolute())
    program = [sys.executable, "-m", "llm_orchestrator"]
    command = [*program, "backup", "create", *words]
    return Plan(cron, command, user, settings, list(dict.fromkeys(writes)))


def _install(session: Session, plan: Plan, *, kind: With | None, root: Path, is_dry: bool) -> None:
    from llm_orchestrator.recovery import schedule_files as files
    from llm_orchestrator.recovery.timetable import on_calendar

    chosen = kind or files.default_kind(root)
    made = files.files_of(plan, chosen)
    if chosen is With.SYSTEMD:
        for line in on_calendar(plan.cron):
            session.note(f"systemd says it so: OnCalendar={line}")
    other = With.CRON if chosen is With.SYSTEMD else With.SYSTEMD
    leaving = files.installed(root).get(other, [])
    if is_dry:
        _print(made)
        for name in leaving:
            session.note(f"would remove {root / name}")
        return
    _warn_of_references(session, root)
    files.write(root, made)
    is_live = root == Path("/")
    if leaving:
        _stop(other, is_live=is_live)
        for name in files.remove(root, leaving):
            session.note(f"removed {root / name}: one schedule is enough")
    if is_live:
        _make_folders(plan)
        files.give(root, plan.user)
        if chosen is With.SYSTEMD:
            _systemctl("daemon-reload")
            _systemctl("enable", "--now", f"{files.NAME}.timer")
    for name in made:
        session.note(f"wrote {root / name}")


def _make_folders(plan: Plan) -> None:
    """What the service may write to must be there before it starts."""
    import shutil

    for folder in plan.writes:
        if not folder.exists():
            folder.mkdir(parents=True, mode=0o700)
            shutil.chown(folder, plan.user)


def _warn_of_references(session: Session, root: Path) -> None:
    from llm_orchestrator.recovery.schedule_files import ENVIRONMENT

    config = session.config
    for name in ("backup_identity", "s3_access_key", "s3_secret_key"):
        kind, _, variable = str(getattr(config, name)).partition(":")
        if kind == "env":
            session.warn(f"{name} is in the variable {variable}: add it to {root / ENVIRONMENT}")


def _print(made: Mapping[str, str]) -> None:
    from llm_orchestrator.recovery.schedule_files import ENVIRONMENT

    for name, content in made.items():
        emit(f"# /{name}")
        emit("(mode 0600, not shown)" if name == ENVIRONMENT else content.rstrip("\n"))


def _show(session: Session, root: Path, output: ObjectFormat) -> None:
    from llm_orchestrator.engine.schedule import times_after
    from llm_orchestrator.recovery import schedule_files as files
    from llm_orchestrator.recovery.timetable import on_calendar

    there = files.installed(root)
    cron = files.cron_of(root)
    if not there:
        raise NotFound("no schedule is installed", hint="llmo backup schedule install")
    zone = _zone()
    upcoming = islice(times_after(cron, zone, session.clock.now_us()), _NEXT) if cron else ()
    facts: dict[str, Json] = {
        "with": [kind.value for kind in there],
        "cron": cron,
        "on_calendar": [*on_calendar(cron)] if cron else [],
        "next": [stamp(moment) for moment in upcoming],
        "files": [str(root / name) for names in there.values() for name in names],
    }
    if len(there) > 1:
        session.warn("both are there: llmo backup schedule install leaves one")
    if output is not ObjectFormat.TABLE:
        print_object(facts, output.value)
        return
    for name, value in facts.items():
        shown = value if isinstance(value, list) else [value]
        emit(f"{name:<12}" + f"\n{'':<12}".join(str(each) for each in shown))


def _zone() -> str:
    """The machine's time zone, in which both timers count; UTC when it has no name."""
    try:
        target = Path("/etc/localtime").readlink().as_posix()
    except OSError:
        return "UTC"
    name = target.partition("zoneinfo/")[2]
    from llm_orchestrator.language.schedule import check_timezone

    return name if name and check_timezone(name) is None else "UTC"


def _remove(session: Session, root: Path, *, is_dry: bool) -> None:
    from llm_orchestrator.recovery import schedule_files as files

    there = files.installed(root)
    names = [name for found in there.values() for name in found]
    if not names:
        raise NotFound("no schedule is installed")
    names.append(files.ENVIRONMENT)
    if is_dry:
        for name in names:
            emit(f"would remove {root / name}")
        return
    for kind in there:
        _stop(kind, is_live=root == Path("/"))
    for name in files.remove(root, names):
        session.note(f"removed {root / name}")
    if root == Path("/") and With.SYSTEMD in there:
        _systemctl("daemon-reload")


def _stop(kind: With, *, is_live: bool) -> None:
    from llm_orchestrator.recovery.schedule_files import NAME

    if kind is With.SYSTEMD and is_live:
        _systemctl("disable", "--now", f"{NAME}.timer")


def _systemctl(*words: str) -> None:
    """Raises OperatorError with what it said."""
    command = ["systemctl", *words]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SYSTEMCTL_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise OperatorError(f"{' '.join(command)}: {error}", hint="--with cron") from error
    if done.returncode:
        raise OperatorError(f"{' '.join(command)}: {done.stderr.strip()}", hint="--with cron")

"""The files that make a machine back up by itself: a systemd timer or a line of cron, never both.

    systemd  SERVICE, TIMER      hardened; writes to the journal, which rotates by itself
    cron     CRON, LOGROTATE     a line of cron.d, its log, and how that log is rotated
    both     ENVIRONMENT         the store's address and other settings, mode 0600

`root` stands before every path, so that tests (and images) can have them elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from llm_orchestrator.errors import Denied, OperatorError, Refused
from llm_orchestrator.recovery.timetable import on_calendar, plain_cron

NAME = "llm-orchestrator-backup"
SERVICE = f"etc/systemd/system/{NAME}.service"
TIMER = f"etc/systemd/system/{NAME}.timer"
CRON = f"etc/cron.d/{NAME}"
LOGROTATE = f"etc/logrotate.d/{NAME}"
ENVIRONMENT = f"etc/llm-orchestrator/{NAME}.env"
LOG = f"var/log/{NAME}.log"
_MARK = "# Made by `llmo backup schedule install`; `llmo backup schedule remove` removes it."


class With(StrEnum):
    """Who calls."""

    SYSTEMD = "systemd"
    CRON = "cron"


OF: Mapping[With, tuple[str, ...]] = {
    With.SYSTEMD: (SERVICE, TIMER),
    With.CRON: (CRON, LOGROTATE),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be installed."""

    cron: str
    command: Sequence[str]
    """Absolute, without secrets."""
    user: str
    settings: Mapping[str, str] = field(default_factory=dict)
    """The command's environment; may hold secrets."""
    writes: Sequence[Path] = ()
    """Folders that the command writes to."""


def files_of(plan: Plan, kind: With) -> dict[str, str]:
    """Paths (without a first slash) and contents. Raises ConfigError for a wrong cron line."""
    both = {ENVIRONMENT: _environment(plan)}
    if kind is With.CRON:
        return {CRON: _cron(plan), LOGROTATE: _logrotate(), **both}
    return {SERVICE: _service(plan), TIMER: _timer(plan), **both}


def installed(root: Path) -> dict[With, list[str]]:
    """Which of them are there."""
    return {
        kind: found
        for kind, names in OF.items()
        if (found := [name for name in names if (root / name).exists()])
    }


def cron_of(root: Path) -> str:
    """The cron line that is installed; "" when none is."""
    for name in (TIMER, CRON):
        with contextlib.suppress(OSError):
            for line in (root / name).read_text().splitlines():
                if line.startswith("# cron: "):
                    return line.removeprefix("# cron: ")
    return ""


def write(root: Path, files: Mapping[str, str]) -> None:
    """Each whole or not at all. Raises Refused for what is not ours, Denied, OperatorError."""
    for name, content in files.items():
        path = root / name
        _check_ours(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, made = tempfile.mkstemp(prefix=".llmo-", dir=path.parent)
            with open(handle, "w") as file:  # noqa: PTH123 - of a handle, not of a path
                file.write(content)
            Path(made).chmod(0o600 if name == ENVIRONMENT else 0o644)
            Path(made).replace(path)
        except OSError as error:
            raise _explained(error, path) from error


def remove(root: Path, names: Sequence[str]) -> list[str]:
    """Remove those that are there; which these were. Raises Refused for what is not ours."""
    gone = []
    for name in names:
        path = root / name
        if not path.exists():
            continue
        _check_ours(path)
        try:
            path.unlink()
        except OSError as error:
            raise _explained(error, path) from error
        gone.append(name)
    return gone


def _check_ours(path: Path) -> None:
    """Raises Refused for a file that somebody else has made under one of our names."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return
    except OSError as error:
        raise _explained(error, path) from error
    if not text.startswith(_MARK):
        raise Refused(f"{path} is not ours: its first line does not say so", hint=f"cat {path}")


def give(root: Path, user: str) -> None:
    """Let `user` read the settings and write the log. Only root can. Raises OperatorError."""
    log = root / LOG
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        for path in (log, root / ENVIRONMENT):
            shutil.chown(path, user)
    except LookupError as error:
        raise OperatorError(f"there is no user {user!r}", hint="--user NAME") from error
    except OSError as error:
        raise _explained(error, log) from error


def _explained(error: OSError, path: Path) -> OperatorError:
    if isinstance(error, PermissionError):
        return Denied(f"{path} may not be written", hint="as root: sudo llmo backup schedule ...")
    return OperatorError(f"{path}: {error.strerror or error}")


# -- contents -------------------------------------------------------------------------------------


def _environment(plan: Plan) -> str:
    lines = [f"{name}={_quoted(value)}" for name, value in sorted(plan.settings.items())]
    return "\n".join([_MARK, *lines, ""])


def _quoted(value: str) -> str:
    """As both a shell and systemd read it."""
    if "\n" in value or "'" in value:
        raise Refused("a setting of the schedule has a quote or a line break in it")
    return f"'{value}'"


def _service(plan: Plan) -> str:
    writable = " ".join(_unit_word(str(folder)) for folder in plan.writes)
    return f"""\
{_MARK}
[Unit]
Description=Backup of LLM Orchestrator
After=network-online.target
Wants=network-online.target

[Service]
Type=oneshot
User={plan.user}
EnvironmentFile=/{ENVIRONMENT}
ExecStart={" ".join(_unit_word(word) for word in plan.command)}
SyslogIdentifier={NAME}
TimeoutStartSec=6h
Nice=10
IOSchedulingClass=best-effort
IOSchedulingPriority=7
UMask=0077
ReadWritePaths={writable}
PrivateTmp=yes
ProtectSystem=strict
ProtectHome=read-only
PrivateDevices=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
LockPersonality=yes
NoNewPrivileges=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
CapabilityBoundingSet=
"""


def _unit_word(word: str) -> str:
    """A word of a unit file: `%` and `$` mean nothing in it, spaces stay."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return escaped if escaped and not set(escaped) & set(" \t'\"") else f'"{escaped}"'


def _timer(plan: Plan) -> str:
    calendar = "\n".join(f"OnCalendar={line}" for line in on_calendar(plan.cron))
    return f"""\
{_MARK}
# cron: {plain_cron(plan.cron)}
[Unit]
Description=When LLM Orchestrator is backed up

[Timer]
{calendar}
AccuracySec=1s
Persistent=yes
Unit={NAME}.service

[Install]
WantedBy=timers.target
"""


def _cron(plan: Plan) -> str:
    words = shlex.join(plan.command)
    inner = f"set -a; . /{ENVIRONMENT}; exec {words}"
    line = f"/bin/sh -c {shlex.quote(inner)} >> /{LOG} 2>&1".replace("%", "\\%")
    return f"""\
{_MARK}
# cron: {plain_cron(plan.cron)}
SHELL=/bin/sh
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
MAILTO=""
{plain_cron(plan.cron)} {plan.user} {line}
"""


def _logrotate() -> str:
    return f"""\
{_MARK}
/{LOG} {{
    daily
    rotate 30
    missingok
    notifempty
    compress
    delaycompress
    copytruncate
}}
"""


def default_kind(root: Path) -> With:
    """The one that is in charge: systemd, else cron."""
    is_root = root == Path("/")
    return With.SYSTEMD if is_root and Path("/run/systemd/system").is_dir() else With.CRON


def is_superuser() -> bool:
    """True for root."""
    return os.geteuid() == 0

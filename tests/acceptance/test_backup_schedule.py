"""`llmo backup schedule`: exactly one schedule, written below --root, read by those who would."""

from __future__ import annotations

import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.acceptance.cli_support import Shell

UNITS = "etc/systemd/system/llm-orchestrator-backup"
CRON = "etc/cron.d/llm-orchestrator-backup"
LOGROTATE = "etc/logrotate.d/llm-orchestrator-backup"
SETTINGS = "etc/llm-orchestrator/llm-orchestrator-backup.env"


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "machine"


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def install(shell: Shell, root: Path, *words: str) -> str:
    done = shell("backup", "schedule", "install", "--root", str(root), *words)
    assert done.code == 0, done.err
    return done.err


def test_systemd_gets_a_timer_that_says_what_cron_means(shell: Shell, root: Path) -> None:
    said = install(shell, root, "--with", "systemd", "--cron", "30 2 1 * 5")
    assert files(root) == {f"{UNITS}.service", f"{UNITS}.timer", SETTINGS}
    timer = (root / f"{UNITS}.timer").read_text()
    assert "OnCalendar=*-*-01 02:30:00\nOnCalendar=Fri *-*-* 02:30:00\n" in timer
    assert "OnCalendar=Fri *-*-* 02:30:00" in said
    service = (root / f"{UNITS}.service").read_text()
    for hardening in ("NoNewPrivileges=yes", "ProtectSystem=strict", "CapabilityBoundingSet="):
        assert f"\n{hardening}\n" in service
    assert f"ReadWritePaths={shell.folder / 'data/backups'} {shell.folder / 'data'}" in service


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_takes_the_units(shell: Shell, root: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a folder with 100% odd $things"
    install(shell, root, "--with", "systemd", "--dir", str(odd))
    units = [root / f"{UNITS}.service", root / f"{UNITS}.timer"]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, units)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    ours = [line for line in done.stderr.splitlines() if "llm-orchestrator-backup" in line]
    assert (done.returncode, ours) == (0, [])


def test_cron_gets_one_line_and_its_log_is_rotated(shell: Shell, root: Path) -> None:
    install(shell, root, "--with", "cron", "--cron", "@daily", "--user", "nobody")
    assert files(root) == {CRON, LOGROTATE, SETTINGS}
    *_, line = (root / CRON).read_text().splitlines()
    assert line.startswith("0 0 * * * nobody /bin/sh -c ")
    assert line.endswith(">> /var/log/llm-orchestrator-backup.log 2>&1")
    assert "rotate 30" in (root / LOGROTATE).read_text()


def test_the_line_of_cron_is_a_command_that_works(shell: Shell, root: Path, tmp_path: Path) -> None:
    """What cron would hand to the shell, with the settings' path put where it is here."""
    odd = tmp_path / "it's 100%"
    install(shell, root, "--with", "cron", "--dir", str(odd))
    *_, line = (root / CRON).read_text().splitlines()
    command = line.split(" ", 6)[6].replace("\\%", "%")  # as cron reads it
    inner = shlex.split(command)[2].replace(f"/{SETTINGS}", str(root / SETTINGS))
    # say what would be called, in place of calling it
    spoken = inner.replace("exec ", 'printf "%s\\n" "$LLM_ORCHESTRATOR_URL" ')
    done = subprocess.run(["/bin/sh", "-c", spoken], capture_output=True, text=True, check=True)
    url, *words = done.stdout.splitlines()
    assert url == f"sqlite:///{shell.store}"
    assert words[:4] == [sys.executable, "-m", "llm_orchestrator", "backup"]
    assert words[-2:] == ["--dir", str(odd)]


def test_one_schedule_takes_the_place_of_the_other(shell: Shell, root: Path) -> None:
    install(shell, root, "--with", "systemd")
    said = install(shell, root, "--with", "cron")
    assert files(root) == {CRON, LOGROTATE, SETTINGS}
    assert "one schedule is enough" in said
    install(shell, root, "--with", "systemd")
    assert files(root) == {f"{UNITS}.service", f"{UNITS}.timer", SETTINGS}


def test_the_settings_are_for_one_reader_and_hold_the_password(shell: Shell, root: Path) -> None:
    url = "postgresql://someone:hunter2@database.example/runs"
    said = install(shell, root, "--with", "systemd", "--store", url)
    settings = root / SETTINGS
    assert stat.S_IMODE(settings.stat().st_mode) == 0o600
    assert f"LLM_ORCHESTRATOR_URL='{url}'" in settings.read_text()
    others = [path for path in root.rglob("*") if path.is_file() and path != settings]
    assert "hunter2" not in said + "".join(path.read_text() for path in others)


def test_hourly_unless_something_else_keeps_the_time_between(shell: Shell, root: Path) -> None:
    assert "schedule: 0 * * * * (hourly" in install(shell, root)
    said = install(shell, root, "--cron", "0 2 * * *")
    assert "warning: up to 24 hours of work are in no backup" in said
    (shell.folder / "llm-orchestrator.toml").write_text('archive_place = "/mnt/other"')
    said = install(shell, root)
    assert "schedule: 0 2 * * * (daily" in said
    assert "LLM_ORCHESTRATOR_CONFIG=" in (root / SETTINGS).read_text()
    assert "warning" not in install(shell, root, "--cron", "0 2 * * *")


def test_show_says_when_and_remove_leaves_nothing(shell: Shell, root: Path) -> None:
    at = ("--root", str(root))
    assert shell("backup", "schedule", *at).code == 4
    install(shell, root, "--with", "systemd", "--cron", "0 2 * * *")
    shown = shell("backup", "schedule", "show", *at, "-o", "json").json
    assert shown["with"] == ["systemd"]
    assert (shown["cron"], shown["on_calendar"]) == ("0 2 * * *", ["*-*-* 02:00:00"])
    assert len(shown["next"]) == 3
    would = shell("backup", "schedule", "remove", *at, "--dry-run")
    assert "would remove" in would.out
    assert len(files(root)) == 3
    assert shell("backup", "schedule", "remove", *at).code == 0
    assert files(root) == set()
    assert shell("backup", "schedule", "remove", *at).code == 4


def test_a_dry_run_shows_the_files_and_writes_none(shell: Shell, root: Path) -> None:
    done = shell("backup", "schedule", "install", "--root", str(root), "--dry-run")
    assert "0 * * * * " in done.out
    assert "rotate 30" in done.out
    assert not root.exists()


def test_somebody_elses_file_is_left_alone(shell: Shell, root: Path) -> None:
    (root / CRON).parent.mkdir(parents=True)
    (root / CRON).write_text("# mine\n")
    done = shell("backup", "schedule", "install", "--root", str(root), "--with", "cron")
    assert done.code == 1
    assert "is not ours" in done.err
    assert files(root) == {CRON}
    assert shell("backup", "schedule", "remove", "--root", str(root)).code == 1
    assert (root / CRON).read_text() == "# mine\n"


def test_a_wrong_cron_line_is_refused(shell: Shell, root: Path) -> None:
    done = shell("backup", "schedule", "install", "--root", str(root), "--cron", "at two")
    assert done.code == 2
    assert "five fields" in done.err
    assert not root.exists()

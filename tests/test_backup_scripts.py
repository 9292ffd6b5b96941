"""The four scripts of the earlier system, run for real: environment, options, exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.acceptance.cli_support import Done, Shell

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts/backup"
NAMES = ("backup", "restore", "verify_backup", "schedule_backups")
pytestmark = pytest.mark.timeout(300)


class Desk(Shell):
    """A store with a run, and the scripts."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        super().__init__(folder)
        self.environment |= {
            "LLMO": f"{sys.executable} -m llm_orchestrator",
            "BACKUP_DIR": str(folder / "kept here"),
            **(environment or {}),
        }

    def call(self, name: str, *words: str, stdin: str = "", **environment: str) -> Done:
        done = subprocess.run(
            [SCRIPTS / f"{name}.sh", *words],
            cwd=self.folder,
            env={**self.environment, **environment},
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def made(self) -> Path:
        done = self.call("backup")
        assert done.code == 0, done.err
        return Path(done.out.strip())


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    made = Desk(tmp_path)
    assert made("run", "hello.yaml").code == 0
    return made


def test_shellcheck_has_nothing_to_say() -> None:
    tool = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run(
        [tool, "-x", "-P", ROOT, *map(str, sorted(SCRIPTS.glob("*.sh")))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", NAMES)
def test_help_is_no_failure_and_names_the_environment(desk: Desk, name: str) -> None:
    for word in ("-h", "--help"):
        done = desk.call(name, word)
        assert (done.code, done.err) == (0, "")
        assert f"Usage: {name}.sh" in done.out
        assert "BACKUP_DIR" in done.out
        assert "set -euo" not in done.out
    assert not (desk.folder / "kept here").exists()


@pytest.mark.parametrize("name", ["restore", "verify_backup"])
def test_an_unknown_option_is_no_file_name(desk: Desk, name: str) -> None:
    done = desk.call(name, "--frce")
    assert (done.code, "no option --frce" in done.err) == (2, True)
    assert desk.call(name, "one", "two").code == 2


def test_a_backup_is_made_verified_and_restored(desk: Desk) -> None:
    file = desk.made()
    assert file.parent == desk.folder / "kept here"
    assert desk.call("verify_backup", str(file)).code == 0
    assert desk.call("verify_backup").code == 0
    assert desk("run", "hello.yaml").code == 0
    assert len(desk("runs", "list", "-o", "ids").out.split()) == 2
    done = desk.call("restore", "--verify", "--force", str(file))
    assert done.code == 0, done.err
    assert "is whole" in done.out
    assert "restored llm-orchestrator-backup-" in done.out
    states = {run["state"] for run in desk("runs", "list", "-o", "json").json}
    assert states == {"completed", "paused"}  # what came after is taken back, and held


def test_without_a_yes_nothing_is_touched(desk: Desk) -> None:
    desk.made()
    before = desk.store.read_bytes()
    done = desk.call("restore", "--verify")
    assert done.code == 2
    assert "is whole" in done.out
    assert "nobody is here to say yes" in done.err
    assert desk.call("restore", "--dry-run").code == 0
    assert desk.store.read_bytes() == before


def test_what_is_no_backup_destroys_nothing(desk: Desk) -> None:
    """B1: the earlier script dropped the database, and then found out."""
    file = desk.made()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    before = desk("runs", "list", "-o", "ids").out
    assert desk.call("verify_backup").code == 8
    for words in (("--force",), ("--force", "--verify")):
        done = desk.call("restore", *words)
        assert done.code == 8, done.err
    assert desk("runs", "list", "-o", "ids").out == before
    assert desk.call("restore", "--force", "nothing.tar.gz").code == 4


def test_a_failed_backup_leaves_nothing_half_made(desk: Desk) -> None:
    """B2: no store, no folder, and an exit code that says so."""
    done = desk.call("backup", LLM_ORCHESTRATOR_URL=f"sqlite:///{desk.folder}/none.db")
    assert done.code == 10
    assert not (desk.folder / "kept here").exists()


def test_a_failed_upload_keeps_the_file_prunes_and_says_so(desk: Desk) -> None:
    """B3. Nobody listens there."""
    (desk.folder / "llm-orchestrator.toml").write_text('s3_endpoint_url = "http://127.0.0.1:9"')
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b" * 20, "AWS_REGION": "here"}
    done = desk.call("backup", S3_BUCKET="bucket", S3_PREFIX="/a/b", **keys)
    assert done.code == 3, done.err
    assert "s3://bucket/a/b does not have it" in done.err
    assert Path(done.out.strip()).is_file()
    assert "0 removed, 1 kept" in done.err


def test_old_backups_go_after_so_many_days(desk: Desk) -> None:
    (desk.folder / "llm-orchestrator.toml").write_text("backup_keep_last = 0")
    old = desk.made()
    ancient = old.with_name("llm-orchestrator-backup-20200101_000000.tar.gz")
    old.rename(ancient)
    other = desk.call("backup", RETENTION_DAYS="30000")
    assert (other.code, ancient.exists()) == (0, True)
    assert desk.call("backup", RETENTION_DAYS="7").code == 0
    assert not ancient.exists()
    assert Path(other.out.strip()).exists()
    wrong = desk.call("backup", RETENTION_DAYS="a month")
    assert (wrong.code, "RETENTION_DAYS" in wrong.err) == (2, True)


def test_the_schedule_gets_the_environment(desk: Desk, tmp_path: Path) -> None:
    root = tmp_path / "machine"
    odd = {
        "DB_HOST": "database.example",
        "DB_NAME": "runs & more",
        "DB_USER": "o'hara",
        "PGPASSWORD": "p@ss:/'ü",
    }
    given = {"BACKUP_SCHEDULE": "30 2 * * 1", "RETENTION_DAYS": "7", "S3_BUCKET": "bucket", **odd}
    done = desk.call("schedule_backups", "--root", str(root), "--with", "cron", **given)
    assert done.code == 0, done.err
    cron = (root / "etc/cron.d/llm-orchestrator-backup").read_text()
    assert "\n30 2 * * 1 " in cron
    assert "--keep-days 7" in cron
    assert "--place s3://bucket/backups/llm-orchestrator" in cron
    settings = (root / "etc/llm-orchestrator/llm-orchestrator-backup.env").read_text()
    wanted = "o%27hara:p%40ss%3A%2F%27%C3%BC@database.example:5432/runs%20%26%20more"
    assert f"LLM_ORCHESTRATOR_URL='postgresql://{wanted}'" in settings
    assert "p%40ss" not in done.out + done.err + cron
    assert desk.call("schedule_backups", "show", "--root", str(root)).code == 0
    assert desk.call("schedule_backups", "remove", "--root", str(root)).code == 0
    assert [path for path in root.rglob("*") if path.is_file()] == []


def test_postgresql_by_its_five_variables(tmp_path: Path, postgres_url: str) -> None:
    parts = urlsplit(postgres_url)
    assert parts.hostname
    desk = Desk(
        tmp_path,
        {
            "DB_HOST": parts.hostname,
            "DB_PORT": str(parts.port),
            "DB_NAME": parts.path.lstrip("/"),
            "DB_USER": parts.username or "",
            "PGPASSWORD": parts.password or "",
        },
    )
    assert desk("run", "hello.yaml", "--store", postgres_url).code == 0
    file = desk.made()
    assert desk.call("verify_backup", str(file)).code == 0
    done = desk.call("restore", "--force", str(file))
    assert done.code == 0, done.err
    listed = desk("runs", "list", "-o", "ids", "--store", postgres_url)
    assert len(listed.out.split()) == 1
    assert os.fspath(file.parent) == desk.environment["BACKUP_DIR"]

"""Bad input: one clear message, the place where there is one, what to do next, the right code."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.cli_support import Done, Shell


@pytest.fixture
def llmo(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def is_clear(done: Done, code: int, words: str) -> None:
    """One message with a hint, on stderr, and the code."""
    assert done.code == code, done.err
    assert words in done.err
    assert "hint: " in done.err
    assert done.out == ""


def test_wrong_yaml_is_named_by_line_and_column_all_at_once(llmo: Shell, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: bad\nstepz: 1\nsteps:\n  - id: a\n    type: llmm\n")
    for words in (("validate", "bad.yaml"), ("run", "bad.yaml")):
        done = llmo(*words)
        assert done.code == 2
        assert "bad.yaml:2:1: unknown key `stepz`; did you mean `steps`?" in done.err
        assert "bad.yaml:5:5: unknown step type `llmm`; did you mean `llm`?" in done.err
    bad.write_text("a: [1\nb: 2\n")
    done = llmo("validate", "bad.yaml")
    assert (done.code, done.err.startswith("bad.yaml:2:")) == (2, True)


def test_validate_checks_all_files_and_tells_programs_too(llmo: Shell, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("name: bad\nsteps: []\n")
    done = llmo("validate", "hello.yaml", "bad.yaml", "none.yaml", "-o", "json")
    assert done.code == 2
    assert [item["ok"] for item in done.json] == [True, False, False]
    assert llmo("validate", "hello.yaml").out.startswith("hello.yaml: ok, hello 1.0, 1 steps")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("run", "none.yaml"), 4, "there is no file none.yaml"),
        (("run", "hello.yaml", "--input", "whoo=1"), 2, "did you mean `who`?"),
        (("run", "hello.yaml", "-i", '{"who": 5}'), 2, "should be a string, not 5"),
        (("run", "hello.yaml", "-i", "{x"), 2, "-i: not JSON: "),
        (("run", "hello.yaml", "-i", "@none.json"), 2, "cannot read none.json"),
        (("run", "hello.yaml", "--colour"), 2, "no such option: --colour"),
        (("run", "hello.yaml", "--store", "mysql://h/d"), 2, "is no store URL"),
        (("runs", "list"), 10, "there is no store at"),
        (("runs", "shwo", "x"), 2, "show"),
    ],
)
def test_a_wrong_word_is_named(llmo: Shell, words: tuple[str, ...], code: int, said: str) -> None:
    is_clear(llmo(*words), code, said)


def test_an_unknown_run_is_not_found(llmo: Shell) -> None:
    llmo("run", "hello.yaml")
    for verb in ("show", "explain", "result", "journal", "watch", "cancel", "retry", "fork"):
        is_clear(llmo("runs", verb, "01920000-0000-7000-8000-000000000000"), 4, "there is no run")
    is_clear(llmo("run", "helo"), 4, "did you mean `hello`?")


def test_a_missing_key_names_the_variable(llmo: Shell, tmp_path: Path) -> None:
    text = (tmp_path / "hello.yaml").read_text().replace("provider: echo", "provider: openai")
    (tmp_path / "key.yaml").write_text(text)
    is_clear(llmo("run", "key.yaml"), 9, "OPENAI_API_KEY")


def test_a_provider_that_refuses_is_named(llmo: Shell, tmp_path: Path) -> None:
    text = (tmp_path / "hello.yaml").read_text().replace("provider: echo", "provider: openai")
    (tmp_path / "key.yaml").write_text(text + "\ntimeout_seconds: 20\n")
    nowhere = {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": "http://127.0.0.1:9/v1"}
    is_clear(llmo("run", "key.yaml", environment=nowhere), 9, "127.0.0.1:9")


@pytest.mark.parametrize("content", [b"hello " * 100, b"\x00" * 5000])
def test_a_file_that_is_no_store_is_left_alone(llmo: Shell, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f.db").write_bytes(content)
    for words in (("run", "hello.yaml"), ("runs", "list"), ("serve", "--port", "0")):
        is_clear(llmo(*words, "--store", "sqlite:///f.db"), 1, "is not a database")
    assert (tmp_path / "f.db").read_bytes() == content


def test_somebody_elses_database_is_left_alone(llmo: Shell, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "f.db") as database:
        database.execute("CREATE TABLE theirs (x)")
    database.close()
    before = (tmp_path / "f.db").read_bytes()
    for words in (("run", "hello.yaml"), ("runs", "list")):
        is_clear(llmo(*words, "--store", "sqlite:///f.db"), 1, "not one of ours")
    assert (tmp_path / "f.db").read_bytes() == before


def test_a_store_of_a_newer_version_is_refused(llmo: Shell) -> None:
    llmo("run", "hello.yaml")
    with sqlite3.connect(llmo.store) as database:
        database.execute("PRAGMA user_version=99")
    database.close()
    for words in (("run", "hello.yaml"), ("runs", "list"), ("serve", "--port", "0")):
        is_clear(llmo(*words), 1, "made by a newer version (schema 99")
    done = llmo("doctor", "-o", "json")
    assert done.code == 1
    assert [row["check"] for row in done.json if row["state"] == "error"] == ["store"]


def test_a_folder_that_cannot_be_written_is_named(llmo: Shell, tmp_path: Path) -> None:
    is_clear(llmo("run", "hello.yaml", "--store", "sqlite:////proc/none/x.db"), 1, "/proc/none")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o755)
    if os.getuid() == 0:  # a folder is never closed to root: be somebody else
        return
    closed.chmod(0o555)
    is_clear(llmo("run", "hello.yaml", "--data", str(closed)), 1, str(closed))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True).returncode:  # noqa: PLW1510
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_said_at_once_and_nothing_is_half_made(
    llmo: Shell, small_disk: Path
) -> None:
    store = f"sqlite:///{small_disk}/x.db"
    is_clear(llmo("run", "hello.yaml", "--store", store), 1, "takes no more")
    detached, served = ("run", "hello.yaml", "--detach"), ("serve", "--port", "0")
    for words in (("run", "hello.yaml"), detached, served):
        is_clear(llmo(*words, "--store", store), 1, "takes no more")


def test_a_full_disk_under_stdout_is_an_error_not_a_silence(llmo: Shell) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "llm_orchestrator", "schema"],
            env=llmo.environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, "No space left" in done.stderr) == (1, True)
    assert "Traceback" not in done.stderr


def test_damage_is_found_and_never_printed_as_a_result(llmo: Shell) -> None:
    llmo("run", "hello.yaml")
    [run_id] = llmo("runs", "-o", "ids").out.split()
    assert llmo("journal", "verify", "--all").code == 0
    with sqlite3.connect(llmo.store) as database:
        database.execute(
            "UPDATE journal SET payload = CAST(replace(CAST(payload AS TEXT), 'Hello', 'Jello') "
            "AS BLOB) WHERE kind = 'step_finished'"
        )
    database.close()
    for verb in ("show", "result", "journal", "explain"):
        done = llmo("runs", verb, run_id)
        assert done.code == 8, (verb, done)
        assert "Jello" not in done.out
    found = llmo("journal", "verify", "--all", "-o", "json")
    assert (found.code, found.json[0]["run_id"]) == (8, run_id)
    assert llmo("journal", "verify", run_id).code == 8
    assert llmo("doctor").code == 1
    plan = llmo("journal", "repair", run_id, "--dry-run")
    assert (plan.code, "greet" in plan.out) == (8, True)
    assert llmo("journal", "verify", run_id).code == 8
    assert llmo("journal", "repair", run_id).code == 0
    assert llmo("journal", "verify", "--all").code == 0
    assert "Jello" not in llmo("runs", "show", run_id).out


def test_a_row_that_contradicts_its_journal_is_found_and_rebuilt(llmo: Shell) -> None:
    llmo("run", "hello.yaml")
    [run_id] = llmo("runs", "-o", "ids").out.split()
    with sqlite3.connect(llmo.store) as database:
        database.execute("UPDATE runs SET state = 'failed', output = NULL")
    database.close()
    assert llmo("runs", "result", run_id).json == {"text": "echo: Hello world"}
    assert llmo("journal", "verify", "--all").code == 8
    assert llmo("journal", "repair", run_id, "--dry-run").code == 8
    assert llmo("journal", "repair", run_id).code == 0
    assert llmo("journal", "verify", run_id).code == 0


def test_a_traceback_is_shown_only_with_debug(llmo: Shell) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llm_orchestrator", "runs", "list", "--debug"],
        cwd=llmo.folder,
        env=llmo.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, "Traceback" in done.stderr) == (10, True)
    assert "error: there is no store at" in done.stderr

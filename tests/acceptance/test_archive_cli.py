"""`llmo archive` and `llmo restore --from-archive` as operators meet them."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest

from tests.acceptance.cli_support import Shell

RUNS = 3


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    made = Shell(tmp_path)
    toml = f'archive_place = "{tmp_path / "elsewhere"}"\n'
    (tmp_path / "llm-orchestrator.toml").write_text(toml)
    for n in range(RUNS):
        assert made("run", "hello.yaml", "--input", f"who={n}").code == 0
    return made


def store_of(shell: Shell) -> Path:
    [found] = shell.folder.rglob("*.db")
    return found


def destroy(shell: Shell) -> None:
    file = store_of(shell)
    for path in file.parent.glob(f"{file.name}*"):
        path.unlink()


def test_a_store_that_is_gone_comes_back_whole(shell: Shell) -> None:
    [row] = shell("archive", "status", "--json").json
    assert (row["generation"], row["alone"], row["now"]) == (1, True, True)
    before = shell("runs", "list", "-o", "json").json
    destroy(shell)
    plan = shell("restore", "--from-archive", "--dry-run", "--json").json
    assert (plan["up_to"], plan["backup_id"]) == ("its end", "none: segments alone")
    done = shell("restore", "--from-archive", "--yes")
    assert done.code == 0, done.err
    assert f"{RUNS} runs" in done.out
    assert shell("runs", "list", "-o", "json").json == before
    assert shell("journal", "verify", "--all").code == 0
    assert shell("audit", "verify").code == 0
    new, old = shell("archive", "status", "--json").json
    assert (new["generation"], new["alone"], old["generation"]) == (2, False, 1)
    assert shell("run", "hello.yaml", "--input", "who=again").code == 0
    [exposed] = [r for r in shell("dr", "status", "--json").json["exposure"] if is_archive(r)]
    assert exposed["seconds"] == 0  # its engine has made the backup that the archive needs
    assert len(shell("backup", "list", "--json").json) == 1


def is_archive(row: dict[str, object]) -> bool:
    return row["mechanism"] == "archive"


def test_back_to_one_entry(shell: Shell) -> None:
    [*_, first] = shell("runs", "list", "-o", "ids").out.split()
    done = shell("restore", "--to", f"{first}:2", "--yes", "--json")
    assert done.code == 0, done.err
    assert done.json["old"]
    assert done.json["rewound"]["runs"] == RUNS
    missing = shell("restore", "--to", f"{first}:999", "--yes")
    assert missing.code == 4
    assert "is not in the stream archive" in missing.err
    early = shell("restore", "--to", "2020-01-01T00:00Z", "--yes")
    assert early.code == 4
    assert "began only after" in early.err


@pytest.mark.parametrize("what", ["flip", "cut", "remove", "swap", "foreign"])
def test_a_damaged_archive_is_named_and_nothing_is_changed(shell: Shell, what: str) -> None:
    assert shell("archive", "verify").code == 0
    segments = (shell.folder / "elsewhere" / "segments").glob("*/00000001")
    streams = [each.parent for each in sorted(segments, key=lambda file: file.stat().st_mtime)]
    first, second = (stream / "00000001" for stream in streams[:2])
    content = first.read_bytes()
    if what == "flip":
        first.write_bytes(content[:900] + bytes([content[900] ^ 1]) + content[901:])
    elif what == "cut":
        first.write_bytes(content[:-200])
    elif what == "remove":
        first.unlink()
    elif what == "swap":
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
    else:
        shutil.rmtree(streams[0])
        shutil.copytree(streams[1], streams[0])
    destroy(shell)
    done = shell("restore", "--from-archive", "--yes")
    assert done.code in (4, 8), done.err
    assert done.err.startswith("error: ") or "\nerror: " in done.err
    assert list(store_of_folder(shell)) == []


def store_of_folder(shell: Shell) -> list[Path]:
    return list(shell.folder.rglob("*.db"))


def test_who_does_not_archive_may_look_and_not_write(shell: Shell) -> None:
    (shell.folder / "llm-orchestrator.toml").write_text("")
    assert len(shell("runs", "list", "-o", "ids").out.split()) == RUNS
    refused = shell("run", "hello.yaml", "--input", "who=x")
    assert refused.code != 0
    assert "llmo archive stop" in refused.err
    assert shell("archive", "stop").code == 0
    assert shell("archive", "stop").code == 4
    assert shell("run", "hello.yaml", "--input", "who=x").code == 0


def test_a_damaged_entry_is_mended_from_the_archive(shell: Shell) -> None:
    [run_id, *_] = shell("runs", "list", "-o", "ids").out.split()
    before = shell("runs", "show", run_id, "-o", "json").json
    with sqlite3.connect(store_of(shell)) as database:
        database.execute(
            "UPDATE journal SET payload = CAST('{\"result\": 1}' AS BLOB)"
            " WHERE run_id = ? AND kind = 'step_finished'",
            (run_id,),
        )
    database.close()
    assert shell("journal", "verify", run_id).code == 8
    done = shell("journal", "repair", run_id)
    assert done.code == 0, done.err
    assert "the stream archive" in done.out
    assert shell("journal", "verify", run_id).code == 0
    assert shell("runs", "show", run_id, "-o", "json").json == before

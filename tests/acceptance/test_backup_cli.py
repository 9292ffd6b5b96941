"""`llmo backup` as operators meet it: verbs, exit codes and words, on both databases."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from tests.acceptance.cli_support import Shell
from tests.acceptance.cluster.nodes import until

ID = "llm-orchestrator-backup-"


class Yard(Shell):
    """A shell whose store has two runs."""

    def __init__(self, folder: Path, url: str) -> None:
        super().__init__(folder)
        if url:
            self.environment["LLM_ORCHESTRATOR_URL"] = url
        for name in ("one", "two"):
            assert self("run", "hello.yaml", "--input", f"who={name}").code == 0

    @property
    def backups(self) -> Path:
        return self.folder / "data/backups"

    def make(self, *words: str) -> Path:
        """A new backup's file."""
        done = self("backup", "create", *words)
        assert done.code == 0, done.err
        return Path(done.out.strip())


DATABASES = ["sqlite", "postgresql"]


@pytest.fixture(params=DATABASES)
def yard(request: pytest.FixtureRequest, tmp_path: Path) -> Yard:
    url = "" if request.param == "sqlite" else str(request.getfixturevalue("postgres_url"))
    return Yard(tmp_path, url)


@pytest.fixture
def lone(tmp_path: Path) -> Yard:
    """On SQLite, for what has nothing to do with the database."""
    return Yard(tmp_path, "")


def test_a_backup_is_made_found_verified_and_proved(yard: Yard) -> None:
    made = yard("backup", "create", "--json").json
    assert Path(made["file"]).parent == yard.backups
    assert made["runs"] == 2
    assert yard("backup", "latest").out.strip() == made["file"]
    [row] = yard("backup", "list", "--json").json
    assert (row["backup_id"], row["is_proved"]) == (made["backup_id"], False)
    shown = yard("backup", "show", made["backup_id"], "--json").json
    assert shown["counts"]["runs"] == 2
    verified = yard("backup", "verify")
    assert (verified.code, "is whole" in verified.out) == (0, True)
    proved = yard("backup", "prove", made["backup_id"].removeprefix(ID), "--json")
    assert proved.code == 0, proved.err
    assert proved.json["is_good"]
    assert proved.json["runs"] == 2
    [row] = yard("backup", "list", "--json").json
    assert row["is_proved"]
    assert row["is_verified"]
    assert yard("backup", "check").code == 0


def test_what_a_proof_leaves_behind_is_its_result(yard: Yard) -> None:
    yard.make("--prove")
    runs = yard("runs", "list", "-o", "json").json
    assert len(runs) == 2  # the synthetic one was the copy's
    assert [path.name for path in yard.backups.iterdir() if path.name.startswith(".")] == []


def test_damage_is_exit_code_8_and_says_where(lone: Yard) -> None:
    file = lone.make()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    done = lone("backup", "verify")
    assert done.code == 8
    assert file.name in done.err
    proof = lone("backup", "prove", "--json")
    assert (proof.code, proof.json["is_good"]) == (8, False)
    assert "error: backups: " not in lone("backup", "list").err


def test_a_sealed_backup_needs_its_key(lone: Yard) -> None:
    pyrage = pytest.importorskip("pyrage")
    own, other, stranger = (pyrage.x25519.Identity.generate() for _ in range(3))
    keys = lone.folder / "keys.txt"
    keys.write_text(f"# ours\n{own.to_public()}\n")
    file = lone.make("--encrypt-to", str(keys), "--encrypt-to", str(other.to_public()))
    assert file.name.endswith(".tar.gz.age")
    assert b"hello" not in file.read_bytes()
    without = lone("backup", "verify")
    assert without.code == 12
    assert "backup_identity" in without.err
    settings = lone.folder / "llm-orchestrator.toml"
    settings.write_text(f'backup_identity = "file:{lone.folder}/identity.txt"')
    identity = lone.folder / "identity.txt"
    identity.write_text(str(stranger))
    wrong = lone("backup", "verify")
    assert wrong.code == 12
    assert str(stranger) not in wrong.err
    identity.write_text(str(other))
    assert lone("backup", "prove").code == 0
    assert lone("backup", "show", "--json").json["encryption"] == "age, 2 recipients"


def test_a_second_place_gets_a_copy_and_its_failure_is_exit_code_3(lone: Yard) -> None:
    away = lone.folder / "away"
    made = lone("backup", "create", "--place", str(away), "--json").json
    assert made["place"] == str(away)
    assert (away / Path(made["file"]).name).read_bytes() == Path(made["file"]).read_bytes()
    (lone.folder / "file").write_text("no folder")
    done = lone("backup", "create", "--place", str(lone.folder / "file/below"), "--prune")
    assert done.code == 3
    kept = Path(done.out.strip())
    assert kept.is_file()
    assert "does not have it" in done.err
    assert "1 removed" not in done.err  # what was to follow followed, and found nothing to do
    assert "0 removed, 2 kept" in done.err
    Path(made["file"]).unlink()
    [row] = [
        row
        for row in lone("backup", "list", "--place", str(away), "--json").json
        if row["backup_id"] == made["backup_id"]
    ]
    assert (row["file"], row["is_remote"]) == (None, True)
    assert lone("backup", "verify", made["backup_id"], "--place", str(away)).code == 0


def test_two_at_a_time_are_refused_with_exit_code_11(lone: Yard) -> None:
    slow = lone.start("backup", "create", "--bytes-per-s", "2000")
    try:
        until(lambda: any(lone.backups.glob(".making-*/database.*")), "a dump begins")
        done = lone("backup", "create")
        assert done.code == 11
        assert str(slow.pid) in done.err
    finally:
        slow.terminate()
        slow.communicate(timeout=60)
    assert lone.make().is_file()  # the lock of a dead maker holds nobody up
    assert list(lone.backups.glob(".making-*")) == []


def test_pruning_says_what_and_why_and_keeps_the_last_proved_one(lone: Yard) -> None:
    proved = lone.make("--prove")
    newer = [lone.make(), lone.make()]
    words = ("backup", "prune", "--keep-days", "0", "--keep-last", "1", "--json")
    would = {row["backup_id"]: row for row in lone(*words, "--dry-run").json}
    assert all(file.exists() for file in (proved, *newer))
    done = lone(*words)
    assert done.code == 0
    found = {row["backup_id"]: (row["verdict"], row["why"]) for row in done.json}
    named = {file: file.name.removesuffix(".tar.gz") for file in (proved, *newer)}
    assert found[named[proved]] == ("kept", "the last proved one")
    assert found[named[newer[1]]] == ("kept", "the newest")
    assert found[named[newer[0]]][0] == "removed"
    assert would[named[newer[0]]]["verdict"] == "would go"
    assert [file.exists() for file in (proved, *newer)] == [True, False, True]


def test_a_policy_that_keeps_nothing_is_refused(lone: Yard) -> None:
    done = lone("backup", "prune", "--keep-days", "0", "--keep-last", "0")
    assert done.code == 2
    assert "keeps nothing" in done.err


def test_what_is_not_there_is_exit_code_4_and_no_store_10(lone: Yard) -> None:
    assert lone("backup", "latest").code == 4
    assert lone("backup", "show", "19700101_000000").code == 4
    assert lone("backup", "verify", str(lone.folder / "nothing.tar.gz")).code == 4
    elsewhere = ("--store", f"sqlite:///{lone.folder}/none.db")
    assert lone("backup", "create", *elsewhere).code == 10
    assert lone("backup", "check").code == 1


def test_backups_are_found_when_the_store_is_gone(lone: Yard) -> None:
    file = lone.make()
    lone.store.unlink()
    listed = lone("backup", "list", "-o", "ids")
    assert (listed.code, listed.out.strip()) == (0, file.name.removesuffix(".tar.gz"))
    assert "nothing is known of proofs" in listed.err
    assert lone("backup", "verify").code == 0


def test_no_secret_of_the_settings_is_in_a_backup(lone: Yard) -> None:
    (lone.folder / "llm-orchestrator.toml").write_text(
        'token = "env:PLANTED"\n[providers.house]\nbase_url = "http://u:hunter3@127.0.0.1:9"\n'
        'api_key = "hunter4"\n'
    )
    done = lone("backup", "create", environment={"PLANTED": "hunter2hunter2"})
    with tarfile.open(done.out.strip()) as file:
        config = file.extractfile("config.json")
        assert config is not None
        text = config.read().decode()
        names = file.getnames()
    assert '"providers"' in text
    for secret in ("hunter2", "hunter3", "hunter4"):
        assert secret not in text
    assert names[0] == "metadata.json"
    assert names[-1] == "checksums.sha256"

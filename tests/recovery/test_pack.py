"""A backup file is read as what an enemy wrote: each byte of it counts, none can do harm."""

from __future__ import annotations

import gzip
import hashlib
import io
import random
import re
import resource
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyrage
import pytest
import zstandard

from llm_orchestrator.errors import (
    ConfigError,
    NotFound,
    OperatorError,
    StoreDamaged,
    StoreFull,
    WrongKey,
)
from llm_orchestrator.recovery import frames, pack
from llm_orchestrator.recovery.frames import read_keys, read_recipients
from llm_orchestrator.recovery.manifest import CHECKSUMS, METADATA, Manifest
from tests.recovery.backup_support import manifest_of

KEY = pyrage.x25519.Identity.generate()
OTHER = pyrage.x25519.Identity.generate()
FORMS = [(form, sealed) for form in ("gzip", "zstd") for sealed in (False, True)]
DUMP = b"".join(hashlib.sha256(b"%d" % n).digest() for n in range(600))
NOISE = random.Random(1).randbytes(300_000)
SMALL = {"definitions/a-1.json": b"{}", "config.json": b"{}\n", "report.txt": b"fine\n"}


def recipients(*keys: object) -> list[object]:
    return read_recipients([str(key.to_public()) for key in keys])  # type: ignore[attr-defined]


def packed(
    folder: Path, form: str = "gzip", *, is_sealed: bool = False, dump: bytes = DUMP
) -> Path:
    source = folder / "database.sqlite"
    source.write_bytes(dump)
    content = pack.Content(manifest_of(dump_bytes=len(dump)), source, SMALL)
    file = folder / f"file-{form}-{is_sealed}"
    who = recipients(KEY, OTHER) if is_sealed else []
    done = pack.write(file, content, compression=form, recipients=who)
    assert done == (file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest())
    source.unlink()
    return file


def keys(key: object = KEY) -> list[object]:
    return read_keys(f"# made by age-keygen\n{key}\n")


@pytest.mark.parametrize(("form", "is_sealed"), FORMS)
def test_what_is_packed_comes_back(tmp_path: Path, form: str, is_sealed: bool) -> None:
    file = packed(tmp_path, form, is_sealed=is_sealed)
    for key in (KEY, OTHER):
        done = pack.read(file, keys=keys(key), into=tmp_path)
        assert done.manifest == manifest_of(dump_bytes=len(DUMP))
        assert done.dump is not None
        assert done.dump.read_bytes() == DUMP
        assert list(done.members) == [METADATA, "database.sqlite", *SMALL]
        assert done.dump.stat().st_mode & 0o777 == 0o600
        done.dump.unlink()
    assert pack.read_metadata(file, keys()) == manifest_of(dump_bytes=len(DUMP))
    assert pack.read(file, keys=keys()).dump is None
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("form", ["gzip", "zstd"])
def test_any_tar_reads_it_and_the_checksums_are_sha256sums(tmp_path: Path, form: str) -> None:
    content = packed(tmp_path, form).read_bytes()
    if form == "gzip":
        plain = gzip.decompress(content)
    else:
        plain = zstandard.ZstdDecompressor().decompressobj().decompress(content)
    (tmp_path / "out").mkdir()
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        tar.extractall(tmp_path / "out", filter="data")
    command = ["sha256sum", "--strict", "-c", CHECKSUMS]
    said = subprocess.run(command, cwd=tmp_path / "out", capture_output=True, check=True)
    assert said.stdout.count(b"OK") == 2 + len(SMALL)


def test_the_beginning_of_a_file_tells_its_manifest(tmp_path: Path) -> None:
    for form, is_sealed in FORMS:
        content = packed(tmp_path, form, is_sealed=is_sealed, dump=NOISE).read_bytes()
        tells = [
            size
            for size in range(0, len(content), 1024)
            if pack.read_metadata_of(io.BytesIO(content[:size]), "x", keys()) is not None
        ]
        assert tells, (form, is_sealed)
        assert tells == list(range(tells[0], len(content), 1024))
        assert tells[0] < 140_000


# -- damage ---------------------------------------------------------------------------------------


def refused(file: Path, folder: Path) -> OperatorError:
    """What reading it raises; nothing is left behind."""
    with pytest.raises((StoreDamaged, WrongKey)) as caught:
        pack.read(file, keys=keys(), into=folder)
    assert not (folder / "database.sqlite").exists()
    assert file.name in caught.value.message
    return caught.value


@pytest.mark.parametrize(("form", "is_sealed"), FORMS)
def test_every_flipped_byte_is_found(tmp_path: Path, form: str, is_sealed: bool) -> None:
    file = packed(tmp_path, form, is_sealed=is_sealed)
    whole = file.read_bytes()
    spoilt = tmp_path / "spoilt"
    edges = [*range(600), *range(len(whole) - 64, len(whole))]
    for at in sorted({*edges, *range(0, len(whole), 97)}):
        content = bytearray(whole)
        content[at] ^= 0xFF
        spoilt.write_bytes(content)
        error = refused(spoilt, tmp_path)
        if not is_sealed:
            assert error.exit_code == 8, at
    spoilt.write_bytes(whole)
    pack.read(spoilt, keys=keys())  # it was the flip


@pytest.mark.parametrize(("form", "is_sealed"), FORMS)
def test_every_truncation_and_every_addition_is_found(
    tmp_path: Path, form: str, is_sealed: bool
) -> None:
    file = packed(tmp_path, form, is_sealed=is_sealed)
    whole = file.read_bytes()
    spoilt = tmp_path / "spoilt"
    ends = [*range(300), *range(len(whole) - 300, len(whole)), *range(300, len(whole), 171)]
    for end in ends:
        spoilt.write_bytes(whole[:end])
        refused(spoilt, tmp_path)
    for more in (b"\0", b"x", b"\0" * 10_000, whole):
        spoilt.write_bytes(whole + more)
        assert refused(spoilt, tmp_path).exit_code == 8


def test_a_wrong_key_and_a_missing_one_are_told_apart_from_damage(tmp_path: Path) -> None:
    file = packed(tmp_path, is_sealed=True)
    stranger = pyrage.x25519.Identity.generate()
    for wrong in ([], keys(stranger)):
        for read in (pack.read, pack.read_metadata):
            with pytest.raises(WrongKey) as caught:
                read(file, keys=wrong)
            assert caught.value.exit_code == 12
            assert "backup_identity" in str(caught.value.hint)
            assert str(stranger) not in caught.value.message


def test_a_file_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        pack.read(tmp_path / "gone")


def test_keys_are_never_repeated_in_an_error() -> None:
    secret = str(KEY)
    with pytest.raises(ConfigError) as caught:
        read_keys(secret[:-1] + "?")
    assert secret[:-1] not in f"{caught.value}{caught.value.hint}{caught.value.__cause__}"
    with pytest.raises(ConfigError, match="no public key"):
        read_recipients(["age1nonsense"])
    with pytest.raises(ConfigError, match="names no public key"):
        read_recipients(["# nothing\n"])
    assert read_recipients([]) == []
    assert read_keys("\n") == []


# -- what an enemy would write --------------------------------------------------------------------

Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, content: bytes, **more: object) -> Member:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in more.items():
        setattr(info, key, value)
    return info, content


def whole(*, dump: bytes = DUMP, manifest: Manifest | None = None) -> list[Member]:
    manifest = manifest or manifest_of(dump_bytes=len(dump))
    metadata = manifest.model_dump_json().encode()
    found = [member(METADATA, metadata), member("database.sqlite", dump)]
    return [*found, *(member(name, content) for name, content in SMALL.items())]


def sums(members: list[Member]) -> Member:
    lines = [f"{hashlib.sha256(content).hexdigest()}  {info.name}\n" for info, content in members]
    return member(CHECKSUMS, "".join(lines).encode())


def tar(
    members: list[Member], *, form: int = tarfile.GNU_FORMAT, end: bytes = b"\0" * 1024
) -> bytes:
    plain = b""
    for info, content in members:
        plain += info.tobuf(tarfile.GNU_FORMAT) + content + b"\0" * (-len(content) % 512)
    return plain + end


def stored(folder: Path, plain: bytes) -> Path:
    """Compressed as we compress."""
    file = folder / "hostile"
    with file.open("wb") as raw:
        deflater = frames.Deflater(raw, "gzip")
        deflater.write(plain)
        deflater.finish()
    return file


def test_what_we_would_write_is_taken(tmp_path: Path) -> None:
    members = whole()
    done = pack.read(stored(tmp_path, tar([*members, sums(members)])), into=tmp_path)
    assert done.manifest.dump_bytes == len(DUMP)


EVIL = ["../evil", "/tmp/evil", "definitions/../../evil", "definitions/", "definitions/.x", "x\ny"]


@pytest.mark.parametrize("name", [*EVIL, "database.other", METADATA, "definitions/" + "x" * 81])
def test_names_that_we_do_not_give_are_refused(tmp_path: Path, name: str) -> None:
    members = [*whole(), member(name, b"evil")]
    before = {*tmp_path.parent.iterdir(), *Path("/tmp").glob("evil*")}
    error = refused(stored(tmp_path, tar([*members, sums(members)])), tmp_path)
    assert "does not belong there" in error.message
    assert {*tmp_path.parent.iterdir(), *Path("/tmp").glob("evil*")} == before


KINDS = [
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.CHRTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_SPARSE,
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [0, 1, 3])
def test_only_plain_files_are_taken(tmp_path: Path, kind: bytes, at: int) -> None:
    members = whole()
    members.insert(at, member("config.json", b"x", type=kind, linkname="/etc/passwd"))
    error = refused(stored(tmp_path, tar([*members, sums(members)])), tmp_path)
    assert "plain file" in error.message


def named(dump: str) -> Callable[[], list[Member]]:
    def make() -> list[Member]:
        manifest = manifest_of(dump_bytes=len(DUMP)).model_copy(update={"dump": dump})
        members = whole(manifest=manifest)
        members[1][0].name = dump
        return members

    return make


def changed(at: int, content: bytes) -> Callable[[], list[Member]]:
    def make() -> list[Member]:
        members = whole()
        right = sums(members)
        members[at] = member(members[at][0].name, content)
        return [*members, right]

    return make


def reordered(*order: int) -> Callable[[], list[Member]]:
    def make() -> list[Member]:
        members = whole()
        members = [members[at] for at in order]
        return [*members, sums(members)]

    return make


def exchanged() -> list[Member]:
    """Two members' contents, the sums as they were."""
    members = whole()
    right = sums(members)
    one, two = members[3], members[4]
    members[3], members[4] = member(one[0].name, two[1]), member(two[0].name, one[1])
    return [*members, right]


def without_sums() -> list[Member]:
    return whole()


def summed_twice() -> list[Member]:
    members = whole()
    return [*members, sums(members), sums(members)]


def sums_of_more() -> list[Member]:
    members = whole()
    return [*members, sums([*members, member("report2.txt", b"")])]


WRONG: list[tuple[str, Callable[[], list[Member]], str]] = [
    ("dump elsewhere", named("../../database.sqlite"), "no name of a dump"),
    ("dump absolute", named("/tmp/database.sqlite"), "no name of a dump"),
    ("dump is metadata", named(METADATA), "no name of a dump"),
    (
        "metadata edited",
        changed(0, manifest_of(dump_bytes=len(DUMP), epoch=9).model_dump_json().encode()),
        f"{METADATA} does not fit",
    ),
    ("metadata nonsense", changed(0, b"{"), "makes no sense"),
    (
        "metadata of a newer layout",
        changed(0, manifest_of(dump_bytes=len(DUMP), format=2).model_dump_json().encode()),
        "newer version",
    ),
    ("dump edited", changed(1, DUMP[:-1] + b"x"), "database.sqlite does not fit"),
    ("dump shorter", changed(1, DUMP[:-1]), "must come second"),
    ("report edited", changed(4, b"FINE\n"), "report.txt does not fit"),
    ("dump first", reordered(1, 0, 2, 3, 4), "must come first"),
    ("dump later", reordered(0, 2, 1, 3, 4), "must come second"),
    ("no dump", reordered(0, 2, 3, 4), "must come second"),
    ("twice", reordered(0, 1, 2, 3, 3), "does not belong"),
    ("exchanged", exchanged, "does not fit"),
    ("no checksums", without_sums, f"has no {CHECKSUMS}"),
    ("checksums twice", summed_twice, f"follows {CHECKSUMS}"),
    ("a sum of what is not there", sums_of_more, "missing"),
]


@pytest.mark.parametrize(("make", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_each_wrong_structure_is_named(
    tmp_path: Path, make: Callable[[], list[Member]], message: str
) -> None:
    error = refused(stored(tmp_path, tar(make())), tmp_path)
    assert error.exit_code == 8
    assert message in error.message


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"x" * 5000, b"\x1f\x8b\x08\x08" + b"x" * 100])
def test_a_file_of_another_system_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "foreign"
    file.write_bytes(content)
    refused(file, tmp_path)
    file.write_bytes(gzip.compress(tar([member("dump.sql", b"SELECT 1")])))
    assert "no backup of this program" in refused(file, tmp_path).message
    file = stored(tmp_path, tar([member("dump.sql", b"SELECT 1")]))
    assert "metadata.json must come first" in refused(file, tmp_path).message


def claims(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def test_sizes_that_are_only_claimed_cost_nothing(tmp_path: Path) -> None:
    file = stored(tmp_path, claims(METADATA, 1 << 40))
    assert "too big" in refused(file, tmp_path).message
    members = whole()
    file = stored(tmp_path, tar(members, end=claims("config2.json", 1 << 40)))
    refused(file, tmp_path)
    file = stored(tmp_path, tar(members[:3], end=claims("report.txt", 1 << 40)))
    assert "too big" in refused(file, tmp_path).message
    huge = manifest_of(dump_bytes=1 << 60)
    metadata = member(METADATA, huge.model_dump_json().encode())
    file = stored(tmp_path, tar([metadata], end=claims("database.sqlite", 1 << 60)))
    with pytest.raises(StoreFull, match="has room for"):
        pack.read(file, into=tmp_path)
    assert not (tmp_path / "database.sqlite").exists()


# -- bounded --------------------------------------------------------------------------------------

BIG_BYTES = 256 << 20
BOUND_BYTES = 100 << 20
"""More than the libraries need by themselves, far less than what passes."""


def child(code: str, folder: Path) -> str:
    command = [sys.executable, "-c", CHILD_HEAD + code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


CHILD_HEAD = """
import resource, sys
from pathlib import Path
from llm_orchestrator.errors import StoreDamaged
from llm_orchestrator.recovery import pack
from llm_orchestrator.recovery.frames import read_keys, read_recipients
from llm_orchestrator.recovery.manifest import Manifest
folder = Path(sys.argv[1])
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
"""


@pytest.mark.parametrize(("form", "is_sealed"), [("gzip", False), ("zstd", True)])
def test_memory_is_bounded_both_ways(tmp_path: Path, form: str, is_sealed: bool) -> None:
    with (tmp_path / "database.sqlite").open("wb") as dump:
        dump.truncate(BIG_BYTES)
    manifest = manifest_of(dump_bytes=BIG_BYTES).model_dump_json()
    (tmp_path / "manifest").write_text(manifest)
    who = [str(KEY.to_public())] if is_sealed else []
    code = f"""
manifest = Manifest.model_validate_json((folder / "manifest").read_text())
begun = peak()
content = pack.Content(manifest, folder / "database.sqlite", {{}})
pack.write(folder / "packed", content, compression={form!r}, recipients=read_recipients({who!r}))
pack.read(folder / "packed", keys=read_keys({str(KEY)!r}))
print(peak() - begun)
"""
    assert int(child(code, tmp_path)) < BOUND_BYTES


def test_a_bomb_does_not_go_off(tmp_path: Path) -> None:
    """Each compressor at its worst, where a header should be: a few kilobytes that become 4 GiB."""
    block = (131_072 << 3 | 1 << 1).to_bytes(3, "little") + b"\0"  # run-length, 128 KiB of zeros
    (tmp_path / "bomb").write_bytes(frames._ZSTD_HEAD + block * 32_768)
    bomb = zstandard.ZstdDecompressor().stream_reader((tmp_path / "bomb").read_bytes())
    assert len(bomb.read(1 << 20)) == 1 << 20  # it is one
    code = """
begun = peak()
try:
    pack.read(folder / "bomb")
except StoreDamaged as error:
    print(peak() - begun, error)
"""
    said = child(code, tmp_path)
    assert int(said.split()[0]) < BOUND_BYTES
    assert "must come first" in said


def test_a_full_disk_is_said_and_what_was_begun_can_be_removed(tmp_path: Path) -> None:
    (tmp_path / "database.sqlite").write_bytes(DUMP * 50)
    content = pack.Content(manifest_of(dump_bytes=len(DUMP) * 50), tmp_path / "database.sqlite", {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for form, is_sealed in FORMS:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        try:
            with pytest.raises(StoreFull, match="no room"):
                pack.write(
                    tmp_path / "packed",
                    content,
                    compression=form,
                    recipients=recipients(KEY) if is_sealed else [],
                )
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        (tmp_path / "packed").unlink()


def test_a_dump_that_changes_under_us_is_no_backup(tmp_path: Path) -> None:
    (tmp_path / "database.sqlite").write_bytes(DUMP)
    content = pack.Content(manifest_of(dump_bytes=len(DUMP) + 1), tmp_path / "database.sqlite", {})
    with pytest.raises(OperatorError, match=re.escape("changed while it was packed")):
        pack.write(tmp_path / "packed", content, compression="gzip")

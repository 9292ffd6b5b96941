"""A place keeps what it was given, or says that it does not; a server's word is not enough."""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill.proxy import Proxy
from llm_orchestrator.errors import (
    ConfigError,
    Denied,
    NotFound,
    OperatorError,
    Overtaken,
    Refused,
    StoreError,
    StoreFull,
    StoreUnavailable,
)
from llm_orchestrator.recovery import places_s3
from llm_orchestrator.recovery.places import Place
from llm_orchestrator.recovery.places_folder import FolderPlace
from llm_orchestrator.recovery.places_s3 import S3Place
from llm_orchestrator.recovery.s3_client import TRIES, S3Options, parse_s3_url
from tests.recovery import s3_support
from tests.recovery.lying_proxy import (
    Answer,
    Lie,
    LyingProxy,
    cut,
    fail,
    flipped,
    lying,
    swallow,
    without,
)

PART = 5 << 20
BIG = os.urandom(2 * PART + 12_345)
SMALL = b"a small thing"


class HurriedClock(RealClock):
    """Waits for nothing, and remembers how long it would have."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places_s3, "PART_BYTES", PART)
    monkeypatch.setattr(places_s3, "PAGE", 3)


@pytest.fixture(scope="module")
def moto_port() -> Iterator[int]:
    with s3_support.moto() as port:
        yield port


@pytest.fixture(scope="module")
def locking_port() -> Iterator[int]:
    with s3_support.moto(has_lock=True) as port:
        yield port


@pytest.fixture(scope="module")
def rclone_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with s3_support.rclone(tmp_path_factory.mktemp("rclone")) as port:
        yield port


def s3(port: int, **more: object) -> S3Place:
    return S3Place(s3_support.options(port, **more), HurriedClock())


@pytest.fixture(params=["folder", "rclone", "moto"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return FolderPlace(tmp_path / "place" / "deep")
    port: int = request.getfixturevalue(f"{request.param}_port")
    return s3(port, prefix=f"of/{tmp_path.name}")


def file_of(folder: Path, content: bytes, name: str = "given") -> Path:
    file = folder / name
    file.write_bytes(content)
    return file


def parts(folder: Path) -> list[Path]:
    return list(folder.glob(".part-*"))


# -- every place ----------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", SMALL, BIG], ids=["empty", "small", "big"])
async def test_what_is_put_is_there(place: Place, tmp_path: Path, content: bytes) -> None:
    told: list[tuple[int, int]] = []
    kept = await place.put(
        file_of(tmp_path, content), "some/name", advance=lambda *each: told.append(each)
    )
    assert (kept.name, kept.size_bytes) == ("some/name", len(content))
    assert not content or told[-1] == (len(content), len(content))
    assert await place.read("some/name") == content
    assert await place.peek("some/name", 5) == content[:5]
    assert await place.peek("some/name", 1 << 30) == content
    await place.get("some/name", tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == content
    assert [(one.name, one.size_bytes) for one in await place.list()] == [
        ("some/name", len(content))
    ]
    await place.put(file_of(tmp_path, b"another"), "some/name")
    assert await place.read("some/name") == b"another"
    await place.remove("some/name")
    await place.remove("some/name")
    assert list(await place.list()) == []


async def test_a_list_has_all_that_begins_so_in_order(place: Place) -> None:
    assert list(await place.list("x")) == []
    names = [f"x/{number:02}" for number in range(8)] + ["y", "x.txt", "z/x/1"]
    for name in reversed(names):
        await place.create(name, name.encode())
    assert [one.name for one in await place.list()] == sorted(names)
    assert [one.name for one in await place.list("x/")] == names[:8]
    assert [one.name for one in await place.list("x/0")] == names[:8]
    assert [one.name for one in await place.list("x")] == sorted([*names[:8], "x.txt"])


async def test_what_is_not_there_is_not_found(place: Place, tmp_path: Path) -> None:
    await place.create("there", b"")
    for ask in (place.read("x"), place.peek("x", 3), place.get("x", tmp_path / "got")):
        with pytest.raises(NotFound):
            await ask
    assert not (tmp_path / "got").exists()
    assert parts(tmp_path) == []
    with pytest.raises(NotFound):
        await place.put(tmp_path / "no such file", "name")


@pytest.mark.parametrize("name", ["", "/x", "../x", "a/../x", "a//x", ".", "a/"])
async def test_no_name_leads_out_of_it(place: Place, tmp_path: Path, name: str) -> None:
    file = file_of(tmp_path, SMALL)
    asked: list[Callable[[], Awaitable[object]]] = [
        lambda: place.put(file, name),
        lambda: place.create(name, SMALL),
        lambda: place.read(name),
        lambda: place.remove(name),
        lambda: place.get(name, tmp_path / "got"),
    ]
    for ask in asked:
        with pytest.raises(Refused):
            await ask()


async def test_its_check_leaves_nothing(place: Place) -> None:
    assert await place.check(is_exclusive=False) == ""
    assert list(await place.list()) == []
    assert list(await place.list(".")) == []


@pytest.mark.parametrize("kind", ["folder", "moto"])
async def test_a_thing_is_created_once(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    places: list[Place] = []
    for _ in range(8):
        if kind == "folder":
            places.append(FolderPlace(tmp_path / "p"))
        else:
            places.append(s3(request.getfixturevalue("moto_port"), prefix=tmp_path.name))
    tries = [each.create("one", b"%d" % number) for number, each in enumerate(places)]
    done = await asyncio.gather(*tries, return_exceptions=True)
    won = [number for number, error in enumerate(done) if error is None]
    assert len(won) == 1
    assert all(isinstance(error, Overtaken) for error in done if error is not None)
    assert await places[0].read("one") == b"%d" % won[0]
    assert [each.name for each in await places[0].list()] == ["one"]
    assert await places[0].check() == ""


# -- a folder -------------------------------------------------------------------------------------


async def test_a_folder_flushes_the_file_then_names_it_then_flushes_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str]] = []
    real_fsync, real_link, real_replace = os.fsync, os.link, Path.replace

    def fsync(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        done.append(("flush", path.name[:6]))
        real_fsync(handle)

    def link(source: Path, target: Path) -> None:
        done.append(("name", target.name))
        real_link(source, target)

    def replace(source: Path, target: Path) -> Path:
        done.append(("name", target.name))
        return real_replace(source, target)

    place = FolderPlace(tmp_path / "folder")
    await place.create("first", b"")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(Path, "replace", replace)
    expected = [("flush", ".part-"), ("name", "name"), ("flush", "folder")]
    await place.put(file_of(tmp_path, SMALL), "name")
    assert done == expected
    done.clear()
    await place.remove("name")
    assert done == [("flush", "folder")]
    done.clear()
    await place.create("name", SMALL)
    assert done == expected


async def test_a_full_disk_leaves_nothing_in_a_folder(tmp_path: Path) -> None:
    place, file = FolderPlace(tmp_path / "p"), file_of(tmp_path, BIG)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(StoreFull):
            await place.put(file, "name")
        with pytest.raises(StoreFull):
            await place.create("name", BIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "p").iterdir()) == []


async def test_what_a_killed_copy_left_goes_when_it_is_old(tmp_path: Path) -> None:
    place = FolderPlace(tmp_path)
    old, young = file_of(tmp_path, b"", ".part-old"), file_of(tmp_path, b"", ".part-young")
    os.utime(old, (1, 1))
    await place.put(file_of(tmp_path, SMALL), "name")
    assert not old.exists()
    assert young.exists()
    assert [one.name for one in await place.list()] == ["given", "name"]


# -- an object store ------------------------------------------------------------------------------


async def test_a_server_that_ignores_conditions_is_found_out(rclone_port: int) -> None:
    place = s3(rclone_port, prefix="check")
    assert "ignores conditions" in await place.check()
    assert await place.check(is_exclusive=False) == ""
    assert list(await place.list(".")) == []


async def test_storage_class_and_sizes_arrive(moto_port: int, tmp_path: Path) -> None:
    place = s3(moto_port, prefix="class", storage_class="STANDARD_IA")
    client = s3_support.connect(moto_port)
    for name, content in (("small", SMALL), ("big", BIG)):
        await place.put(file_of(tmp_path, content), name)
        about = client.head_object(Bucket=s3_support.BUCKET, Key=f"class/{name}")
        assert about["StorageClass"] == "STANDARD_IA"


async def test_what_is_locked_cannot_be_removed(locking_port: int, tmp_path: Path) -> None:
    place = s3(locking_port, prefix="lock", object_lock_days=3)
    client = s3_support.connect(locking_port)
    for name, content in (("small", SMALL), ("big", BIG)):
        await place.put(file_of(tmp_path, content), name)
        about = client.head_object(Bucket=s3_support.BUCKET, Key=f"lock/{name}")
        assert about["ObjectLockMode"] == "COMPLIANCE"
        with pytest.raises(Denied, match="locked until"):
            await place.remove(name)
        assert await place.read(name) == content
    await place.create("made", SMALL)
    with pytest.raises(Denied, match="locked until"):
        await place.remove("made")
    assert await place.check() == ""


async def test_a_lock_that_a_server_does_not_keep_is_an_error(
    rclone_port: int, moto_port: int, tmp_path: Path
) -> None:
    """rclone says that it has locked what it has not: but it has no versions."""
    for port in (rclone_port, moto_port):
        place = s3(port, prefix="unlocked", object_lock_days=3)
        with pytest.raises(OperatorError):
            await place.put(file_of(tmp_path, SMALL), "name")


async def test_uploads_are_paced(moto_port: int, tmp_path: Path) -> None:
    clock = HurriedClock()
    options = s3_support.options(moto_port, prefix="paced", bytes_per_s=1 << 20)
    await S3Place(options, clock).put(file_of(tmp_path, BIG), "big")
    assert sum(clock.slept) == pytest.approx(len(BIG) / (1 << 20))


@pytest.fixture
def liar(moto_port: int) -> Iterator[LyingProxy]:
    """Before moto, which believes every signature, so that bodies can be changed on the way."""
    with lying(moto_port) as proxy:
        yield proxy


def through(proxy: LyingProxy, tmp_path: Path, **more: object) -> S3Place:
    return s3(proxy.port, prefix=f"liar/{tmp_path.name}", **more)


@pytest.mark.parametrize("content", [SMALL, BIG], ids=["small", "big"])
async def test_a_flaky_server_is_asked_again(
    liar: LyingProxy, tmp_path: Path, content: bytes
) -> None:
    """Every kind of request fails once, before it is done and after."""
    place, file = through(liar, tmp_path), file_of(tmp_path, content)
    for is_done in (False, True):
        for method in ("PUT", "POST", "HEAD", "GET"):
            for status in (500, 503):
                liar.lie(fail(method, status=status, is_done=is_done))
        await place.put(file, "name")
        await place.get("name", tmp_path / "got")
        assert (tmp_path / "got").read_bytes() == content
        assert await place.read("name") == content
        liar.lies.clear()


async def test_a_server_that_keeps_failing_is_unavailable(liar: LyingProxy, tmp_path: Path) -> None:
    place, file = through(liar, tmp_path), file_of(tmp_path, SMALL)
    liar.lie(fail("PUT", times=100))
    with pytest.raises(StoreUnavailable, match="503 SlowDown") as caught:
        await place.put(file, "name")
    assert caught.value.retryable
    assert len([each for each in liar.requests if each.startswith("PUT")]) == TRIES
    big = file_of(tmp_path, BIG, "big")
    with pytest.raises(StoreUnavailable):
        await place.put(big, "big")
    liar.lies.clear()
    assert list(await place.list()) == []
    client = s3_support.connect(liar.upstream)
    uploads = client.list_multipart_uploads(Bucket=s3_support.BUCKET).get("Uploads", [])
    assert not [each for each in uploads if tmp_path.name in each["Key"]]


async def test_a_thing_that_is_taken_and_lost_is_found_out(
    liar: LyingProxy, tmp_path: Path
) -> None:
    place, file = through(liar, tmp_path), file_of(tmp_path, SMALL)
    liar.lie(swallow())
    with pytest.raises(StoreUnavailable, match="it is not there"):
        await place.put(file, "name")
    await place.put(file, "name")
    liar.lie(swallow())  # now an older thing of that name is there
    with pytest.raises(StoreUnavailable, match=r"it has 13 bytes of 7"):
        await place.put(file_of(tmp_path, b"another", "other"), "name")
    liar.lie(swallow())
    with pytest.raises(StoreUnavailable, match="its digest is"):
        await place.put(file_of(tmp_path, SMALL[::-1], "other"), "name")


@pytest.mark.parametrize("change", [flipped, lambda b: b[:-1], lambda _: b""])
@pytest.mark.parametrize("content", [SMALL, BIG], ids=["small", "big"])
async def test_a_thing_that_is_spoilt_on_its_way_is_found_out(
    liar: LyingProxy, tmp_path: Path, content: bytes, change: Callable[[bytes], bytes]
) -> None:
    place, file = through(liar, tmp_path), file_of(tmp_path, content)
    liar.lie(Lie("PUT", before=change))
    with pytest.raises(StoreUnavailable, match="said that it took"):
        await place.put(file, "name")
    if content is SMALL:
        liar.lie(Lie("PUT", before=change))
        with pytest.raises(StoreUnavailable, match="said that it took"):
            await place.create("made", content)


NO_DIGEST = without("etag", "x-amz-checksum-sha256")


async def test_without_a_digest_every_byte_is_read_back(liar: LyingProxy, tmp_path: Path) -> None:
    place, file = through(liar, tmp_path), file_of(tmp_path, SMALL)
    liar.lie(Lie("PUT", after=NO_DIGEST, times=100))
    liar.lie(Lie("HEAD", after=NO_DIGEST, times=100))
    await place.put(file, "name")
    await place.create("made", SMALL)
    assert sum(each.startswith("GET") for each in liar.requests) == 2
    liar.lies.insert(0, Lie("PUT", before=flipped, after=NO_DIGEST, times=2))
    with pytest.raises(StoreUnavailable, match="it gives back other bytes"):
        await place.put(file, "name")
    with pytest.raises(StoreUnavailable, match="it gives back other bytes"):
        await place.create("made2", SMALL)


async def test_a_create_whose_answer_is_lost_is_known_again(
    liar: LyingProxy, tmp_path: Path
) -> None:
    place = through(liar, tmp_path)
    liar.lie(fail("PUT", is_done=True))
    await place.create("name", SMALL)  # the second try is told that it is taken: by us
    liar.lie(fail("PUT"))
    with pytest.raises(Overtaken):
        await place.create("name", b"of somebody else")
    with pytest.raises(Overtaken):
        await place.create("name", SMALL)  # no try was lost: somebody else has the same to say
    assert await place.read("name") == SMALL


async def test_a_download_goes_on_where_it_broke(liar: LyingProxy, tmp_path: Path) -> None:
    place = through(liar, tmp_path)
    await place.put(file_of(tmp_path, BIG), "name")
    liar.lie(cut("name", times=2))
    told: list[int] = []
    await place.get("name", tmp_path / "got", advance=lambda done, _: told.append(done))
    assert (tmp_path / "got").read_bytes() == BIG
    assert told == sorted(told)
    liar.lie(cut("name", times=100))
    with pytest.raises(StoreUnavailable):
        await place.get("name", tmp_path / "half")
    assert not (tmp_path / "half").exists()
    assert parts(tmp_path) == []


async def test_a_download_of_other_bytes_is_refused(liar: LyingProxy, tmp_path: Path) -> None:
    def spoil(answer: Answer) -> Answer:
        answer.body = flipped(answer.body)
        return answer

    place = through(liar, tmp_path)
    await place.put(file_of(tmp_path, SMALL), "name")
    liar.lie(Lie("GET", "name", after=spoil, times=100))
    with pytest.raises(StoreUnavailable, match="other bytes"):
        await place.get("name", tmp_path / "got")
    assert not (tmp_path / "got").exists()
    with pytest.raises(StoreUnavailable, match="other bytes"):
        await place.read("name")


async def test_a_thing_that_is_exchanged_meanwhile_is_refused(
    liar: LyingProxy, tmp_path: Path
) -> None:
    place = through(liar, tmp_path)
    await place.put(file_of(tmp_path, BIG), "name")
    client = s3_support.connect(liar.upstream)

    def exchange(answer: Answer) -> Answer:
        key = f"liar/{tmp_path.name}/name"
        client.put_object(Bucket=s3_support.BUCKET, Key=key, Body=BIG[::-1])
        answer.is_cut = True
        return answer

    liar.lie(Lie("GET", "name", after=exchange))
    with pytest.raises(StoreUnavailable, match="exchanged"):
        await place.get("name", tmp_path / "got")
    assert not (tmp_path / "got").exists()


async def test_a_server_that_stalls_or_resets_is_unavailable(
    moto_port: int, tmp_path: Path
) -> None:
    file = file_of(tmp_path, SMALL)
    with Proxy(moto_port) as proxy:
        place = s3(proxy.port, prefix="stall", read_timeout_s=0.2, connect_timeout_s=0.2)
        await place.put(file, "name")
        proxy.black_hole()
        with pytest.raises(StoreUnavailable, match="does not answer"):
            await place.put(file, "name")
        assert "does not answer" in await place.check()
        proxy.heal(is_old_lost=True)
        await place.put(file, "name")
        proxy.reset()  # the connection that is kept open
        assert await place.read("name") == SMALL
    with pytest.raises(StoreUnavailable, match="does not answer"):
        await place.read("name")


SECRETS = (s3_support.SECRET, "another-secret")


@pytest.mark.parametrize(
    ("more", "kind"),
    [
        ({"secret_key": "another-secret"}, Denied),
        ({"access_key": "nobody"}, Denied),
        ({"bucket": "nowhere"}, NotFound),
        ({"endpoint_url": "http://user:another-secret@127.0.0.1:1"}, StoreUnavailable),
    ],
)
async def test_refusals_are_in_our_words_and_tell_no_secret(
    rclone_port: int, tmp_path: Path, more: dict[str, str], kind: type[Exception]
) -> None:
    place = s3(rclone_port, **more)
    file = file_of(tmp_path, SMALL)
    asked: list[Callable[[], Awaitable[object]]] = [
        lambda: place.put(file, "name"),
        lambda: place.create("x", SMALL),
        place.list,
        lambda: place.read("x"),
    ]
    for ask in asked:
        with pytest.raises(kind) as caught:
            await ask()
        assert isinstance(caught.value, OperatorError)
        said = f"{caught.value} {caught.value.hint} {place.shown} {s3_support.options(1, **more)}"
        assert not any(secret in said for secret in SECRETS)
    assert await place.check()


async def test_a_server_that_repeats_our_secret_is_not_quoted(
    liar: LyingProxy, tmp_path: Path
) -> None:
    said = f"<Error><Code>Odd</Code><Message>key {s3_support.SECRET}</Message></Error>".encode()
    xml = [("Content-Type", "application/xml")]
    liar.lie(Lie("GET", before=lambda _: None, after=lambda _: Answer(418, xml, said)))
    with pytest.raises(StoreError, match=r"418 Odd: key \*\*\*") as caught:
        await through(liar, tmp_path).read("name")
    assert s3_support.SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("s3://bucket", ("bucket", "")),
        ("s3://bucket/a/b/", ("bucket", "a/b")),
        ("s3://", None),
        ("s3://B/x", None),
        ("http://bucket", None),
    ],
)
def test_addresses_are_read(url: str, found: tuple[str, str] | None) -> None:
    if found is None:
        with pytest.raises(ConfigError):
            parse_s3_url(url)
    else:
        assert parse_s3_url(url) == found
        bucket, prefix = found
        assert S3Options(bucket, prefix).shown == url.rstrip("/")

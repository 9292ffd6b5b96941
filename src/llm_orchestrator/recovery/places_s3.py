"""A place in an object store (Amazon's, or what speaks like it), through boto3.

A server is not believed. What was put is asked for again: its size, and the digest that the server
computed (ETag, x-amz-checksum); where it tells none that can be compared, the thing is read back.
Whether `create` is exclusive is up to the server too, and some ignore the condition: `check` tries
it, and whoever needs it (segments) must ask first. A lock that the server does not keep (it has no
versions) is an error.

Things up to one part's size go in one request, bigger ones in parts that are repeated one by one.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import (
    Denied,
    NotFound,
    OperatorError,
    Overtaken,
    Refused,
    StoreError,
    StoreUnavailable,
)
from llm_orchestrator.model import MICROSECONDS
from llm_orchestrator.recovery.pack import explained
from llm_orchestrator.recovery.places import Kept
from llm_orchestrator.recovery.s3_client import Requests, S3Options
from llm_orchestrator.recovery.s3_digests import (
    Digests,
    digests,
    md5,
    md5_base64,
    sha256_base64,
    whole_md5,
)
from llm_orchestrator.recovery.s3_get import download
from llm_orchestrator.recovery.s3_parts import Parts, lies, read_local
from llm_orchestrator.store.copying import Advance

PART_BYTES = 16 << 20
_PART_BYTES_MIN = 5 << 20
"""The protocol's, but for the last part."""
_PARTS_MAX = 9_000
PAGE = 1_000
READ_BYTES_MAX = 512 << 20
_HIDDEN = "."
_LOCK = "ObjectLockRetainUntilDate"


class S3Place:
    """See Place."""

    def __init__(self, options: S3Options, clock: Clock) -> None:
        self._options = options
        self._clock = clock
        self._requests = Requests(options, clock)

    @property
    def shown(self) -> str:
        return self._options.shown

    # -- putting ------------------------------------------------------------------------------

    async def put(self, file: Path, name: str, *, advance: Advance | None = None) -> Kept:
        def told(done: int, _: int) -> None:
            if advance is not None:
                advance(done, size)

        size = await asyncio.to_thread(_size, file)
        part = self._part_bytes(size)
        if size <= part:
            content = await read_local(file, 0, size)
            wanted = digests(content)
            options = self._put_options(name, content)
            await self._requests.ask(lambda client: client.put_object(**options), name)
        else:
            parts = Parts(
                self._requests,
                self._target(name),
                shown=self.shown,
                clock=self._clock,
                bytes_per_s=self._options.bytes_per_s,
            )
            wanted = await parts.send(file, part, how=self._how(name), advance=told)
        if advance is not None:
            advance(size, size)
        return await self._confirm(name, wanted)

    async def create(self, name: str, content: bytes) -> None:
        wanted, is_unsure = digests(content), False

        def again() -> None:
            nonlocal is_unsure
            is_unsure = True

        options = self._put_options(name, content) | {"IfNoneMatch": "*"}
        try:
            answer = await self._requests.ask(
                lambda client: client.put_object(**options), name, is_again=again
            )
        except Overtaken:
            if is_unsure and await self.read(name) == content:
                return  # an earlier try had landed, and its answer was lost
            raise
        self._need_version(name, answer)
        if not wanted.is_told(answer):
            await self._confirm(name, wanted)
        elif flaw := wanted.differs(answer):
            raise lies(self.shown, name, flaw)

    def _put_options(self, name: str, content: bytes) -> dict[str, Any]:
        return {
            **self._target(name),
            **self._how(name),
            "Body": content,
            "ContentMD5": md5_base64(content),
            "ChecksumSHA256": sha256_base64(content),
        }

    async def _confirm(self, name: str, wanted: Digests) -> Kept:
        """What the place says of a thing that it took. Raises StoreError when it is another one."""
        try:
            answer = await self._head(name)
        except NotFound as error:
            raise lies(self.shown, name, "it is not there") from error
        size = int(answer["ContentLength"])
        if size != wanted.size:
            raise lies(self.shown, name, f"it has {size} bytes of {wanted.size}")
        if flaw := wanted.differs(answer):
            raise lies(self.shown, name, flaw)
        self._need_version(name, answer)
        if self._is_locked(name) and _LOCK not in answer:
            await self._lock(name, answer["VersionId"])
        if not wanted.is_told(answer):
            await self._read_back(name, wanted)
        modified = answer["LastModified"].timestamp()
        return Kept(name, size, modified, str(answer.get("ETag", "")).strip('"'))

    async def _lock(self, name: str, version: str) -> None:
        """For a server that does not lock what comes in parts by itself."""
        how = self._how(name)
        retention = {"Mode": how["ObjectLockMode"], "RetainUntilDate": how[_LOCK]}
        options = self._target(name) | {"VersionId": version, "Retention": retention}
        await self._requests.ask(lambda client: client.put_object_retention(**options), name)
        if _LOCK not in await self._head(name):
            raise StoreError(f"{self.shown} did not lock {name}", hint="make a bucket with locks")

    async def _read_back(self, name: str, wanted: Digests) -> None:
        """No digest of the server's can be compared, so every byte is."""
        target = self._target(name)

        def work(client: Any) -> str:
            digest = hashlib.sha256()
            for piece in client.get_object(**target)["Body"].iter_chunks(1 << 20):
                digest.update(piece)
            return base64.b64encode(digest.digest()).decode()

        if await self._requests.ask(work, name) not in wanted.sha256:
            raise lies(self.shown, name, "it gives back other bytes")

    # -- reading ------------------------------------------------------------------------------

    async def read(self, name: str) -> bytes:
        return await self._bytes(name, READ_BYTES_MAX)

    async def peek(self, name: str, size: int) -> bytes:
        """Its first `size` bytes. Raises NotFound."""
        if not int((await self._head(name))["ContentLength"]):
            return b""
        return await self._bytes(name, size, Range=f"bytes=0-{size - 1}")

    async def _bytes(self, name: str, size: int, **more: str) -> bytes:
        target = self._target(name) | more

        def work(client: Any) -> bytes:
            answer = client.get_object(**target)
            content = bytes(answer["Body"].read(size + 1))
            told = "" if more else whole_md5(answer)
            if told and told != md5(content).hexdigest():
                raise StoreUnavailable(f"{name}: {self.shown} gave other bytes than it has")
            return content

        content = await self._requests.ask(work, name)
        if len(content) > size:
            if more:  # a server that knows no ranges
                return content[:size]
            raise StoreError(f"{name} in {self.shown} is too big to be read at once")
        return content

    async def get(self, name: str, file: Path, *, advance: Advance | None = None) -> None:
        target, about = self._target(name), await self._head(name)
        try:
            await download(self._requests, target, file, about=about, advance=advance)
        except OSError as error:
            raise explained(error, file) from error

    async def list(self, prefix: str = "") -> Sequence[Kept]:
        base = f"{self._options.prefix}/" if self._options.prefix else ""
        found: list[Kept] = []
        wanted: dict[str, Any] = {"Bucket": self._options.bucket, "Prefix": base + prefix}
        wanted["MaxKeys"] = PAGE
        while True:
            page = await self._requests.ask(partial(_page, dict(wanted)), "the list")
            for each in page.get("Contents", ()):
                name = str(each["Key"]).removeprefix(base)
                if not name.startswith(_HIDDEN):
                    modified = each["LastModified"].timestamp()
                    etag = str(each.get("ETag", "")).strip('"')
                    found.append(Kept(name, int(each["Size"]), modified, etag))
            if not page.get("IsTruncated"):
                return sorted(found)
            wanted["ContinuationToken"] = str(page["NextContinuationToken"])

    # -- removing, checking -------------------------------------------------------------------

    async def remove(self, name: str) -> None:
        try:
            answer = await self._head(name)
        except NotFound:
            return
        until = answer.get(_LOCK)
        now = datetime.fromtimestamp(self._clock.now_us() / MICROSECONDS, UTC)
        if answer.get("ObjectLockLegalHoldStatus") == "ON" or (until is not None and until > now):
            raise Denied(f"{name} in {self.shown} is locked until {until}")
        target = self._target(name)
        await self._requests.ask(lambda client: client.delete_object(**target), name)

    async def check(self, *, is_exclusive: bool = True) -> str:
        name = f"{_HIDDEN}check-{self._clock.random_bytes(8).hex()}"
        try:
            await self.create(name, b"1")
            try:
                flaw = await self._tries_twice(name) if is_exclusive else ""
                return flaw or ("" if await self.read(name) == b"1" else "it reads other bytes")
            finally:
                await self.remove(name)
        except OperatorError as error:
            return error.message

    async def _tries_twice(self, name: str) -> str:
        try:
            await self.create(name, b"2")
        except Overtaken:
            return ""
        return (
            f"{self.shown} ignores conditions: it lets a thing be made twice,"
            " so one node could write over another's segments"
        )

    # -- small --------------------------------------------------------------------------------

    def _target(self, name: str) -> dict[str, Any]:
        parts = name.split("/")
        if not all(parts) or {".", ".."} & set(parts):
            raise Refused(f"{name!r} is no name of a thing in {self.shown}")
        prefix = f"{self._options.prefix}/" if self._options.prefix else ""
        return {"Bucket": self._options.bucket, "Key": prefix + name}

    def _how(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self._options.storage_class and not name.startswith(_HIDDEN):
            found["StorageClass"] = self._options.storage_class
        if self._is_locked(name):
            now = datetime.fromtimestamp(self._clock.now_us() / MICROSECONDS, UTC)
            found["ObjectLockMode"] = "COMPLIANCE"
            found[_LOCK] = now + timedelta(days=self._options.object_lock_days)
        return found

    def _is_locked(self, name: str) -> bool:
        return self._options.object_lock_days > 0 and not name.startswith(_HIDDEN)

    def _need_version(self, name: str, answer: Any) -> None:
        """Locks need versions: a server without them says "locked", and lets it be removed."""
        if self._is_locked(name) and not answer.get("VersionId"):
            raise StoreError(
                f"{self.shown} keeps no versions, so it cannot lock {name}",
                hint="make a bucket with object lock, or set s3_object_lock_days to 0",
            )

    def _part_bytes(self, size: int) -> int:
        wanted = PART_BYTES
        if self._options.bytes_per_s:
            wanted = min(wanted, max(_PART_BYTES_MIN, self._options.bytes_per_s))
        return max(wanted, -(-size // _PARTS_MAX))

    async def _head(self, name: str) -> Any:
        target = self._target(name) | {"ChecksumMode": "ENABLED"}
        return await self._requests.ask(lambda client: client.head_object(**target), name)


def _page(wanted: dict[str, Any], client: Any) -> Any:
    return client.list_objects_v2(**wanted)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise explained(error, file) from error

"""A big file on its way to an object store, in parts that are repeated one by one."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import NotFound, OperatorError, StoreUnavailable
from llm_orchestrator.recovery.pack import explained
from llm_orchestrator.recovery.s3_client import Requests
from llm_orchestrator.recovery.s3_digests import (
    Digests,
    digests,
    md5,
    md5_base64,
    sha256_base64,
)
from llm_orchestrator.store.copying import Advance


def lies(shown: str, name: str, flaw: str) -> StoreUnavailable:
    """A server has said that it took a thing."""
    return StoreUnavailable(
        f"{shown} said that it took {name}, but {flaw}",
        hint="what it says cannot be trusted: llmo backup check",
    )


async def read_local(file: Path, start: int, size: int) -> bytes:
    """A piece of a local file. Raises NotFound, StoreError."""

    def work() -> bytes:
        with file.open("rb") as opened:
            opened.seek(start)
            return opened.read(size)

    try:
        return await asyncio.to_thread(work)
    except OSError as error:
        raise explained(error, file) from error


class Parts:
    """One upload. `bytes_per_s` bounds it (0: no bound)."""

    def __init__(
        self,
        requests: Requests,
        target: Mapping[str, Any],
        *,
        shown: str,
        clock: Clock,
        bytes_per_s: int,
    ) -> None:
        self._requests = requests
        self._target = dict(target)
        self._shown = shown
        self._clock = clock
        self._bytes_per_s = bytes_per_s

    async def send(
        self, file: Path, part_bytes: int, *, how: Mapping[str, Any], advance: Advance | None
    ) -> Digests:
        """All of it; what a server may say of the whole. Raises StoreError; then nothing is left.

        `how`: storage class and the like.
        """
        begin = {**self._target, **how, "ChecksumAlgorithm": "SHA256"}
        begun = await self._requests.ask(
            lambda client: client.create_multipart_upload(**begin), self._name
        )
        upload = self._target | {"UploadId": begun["UploadId"]}
        try:
            return await self._send(upload, file, part_bytes, advance=advance)
        except BaseException:
            with contextlib.suppress(OperatorError):
                await self._requests.ask(
                    lambda client: client.abort_multipart_upload(**upload), self._name, tries=1
                )
            raise

    @property
    def _name(self) -> str:
        return str(self._target["Key"])

    async def _send(
        self, upload: dict[str, Any], file: Path, part_bytes: int, *, advance: Advance | None
    ) -> Digests:
        done, whole, md5s, sha256s = 0, md5(b""), b"", b""
        parts: list[dict[str, Any]] = []
        while content := await read_local(file, done, part_bytes):
            whole.update(content)
            md5s += md5(content).digest()
            sha256s += hashlib.sha256(content).digest()
            parts.append(await self._one(upload, len(parts) + 1, content))
            done += len(content)
            if advance is not None:
                advance(done, done)
        await self._end(upload, parts)
        etags = {f"{md5(md5s).hexdigest()}-{len(parts)}", whole.hexdigest()}
        sha256 = base64.b64encode(hashlib.sha256(sha256s).digest()).decode()
        return Digests(done, etags, {sha256})

    async def _one(self, upload: dict[str, Any], number: int, content: bytes) -> dict[str, Any]:
        sha256 = sha256_base64(content)
        options = upload | {
            "PartNumber": number,
            "Body": content,
            "ContentMD5": md5_base64(content),
            "ChecksumSHA256": sha256,
        }
        what = f"part {number} of {self._name}"
        answer = await self._requests.ask(lambda client: client.upload_part(**options), what)
        if flaw := digests(content).differs(answer):
            raise lies(self._shown, what, flaw)
        if self._bytes_per_s:
            await self._clock.sleep(len(content) / self._bytes_per_s)
        return {"PartNumber": number, "ETag": answer["ETag"], "ChecksumSHA256": sha256}

    async def _end(self, upload: dict[str, Any], parts: list[dict[str, Any]]) -> None:
        options = upload | {"MultipartUpload": {"Parts": parts}}
        is_repeated = False

        def again() -> None:
            nonlocal is_repeated
            is_repeated = True

        try:
            await self._requests.ask(
                lambda client: client.complete_multipart_upload(**options),
                self._name,
                is_again=again,
            )
        except NotFound:
            if not is_repeated:
                raise
            # An earlier try has ended it, and its answer was lost: what is there is asked next.

"""A thing of an object store, into a local file: what is here already is not asked for again."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from llm_orchestrator.errors import StoreUnavailable
from llm_orchestrator.recovery.places_folder import made_beside, sync_folder
from llm_orchestrator.recovery.s3_client import Requests
from llm_orchestrator.recovery.s3_digests import md5, whole_md5
from llm_orchestrator.store.copying import Advance

_PIECE_BYTES = 1 << 20


async def download(
    requests: Requests,
    target: Mapping[str, Any],
    file: Path,
    *,
    about: Mapping[str, Any],
    advance: Advance | None,
) -> None:
    """`about` is what the store says of it; what came must fit it.

    Raises StoreError and OSError; then there is no file.
    """
    size = int(about["ContentLength"])
    made = await asyncio.to_thread(made_beside, file)
    try:
        with made.open("wb") as opened:
            piece = _Download(
                dict(target),
                opened,
                size=size,
                etag=str(about.get("ETag", "")),
                advance=advance,
            )
            await requests.ask(piece.work, str(target["Key"]))
            await asyncio.to_thread(_flush, opened)
        _compare(str(target["Key"]), about, piece.md5.hexdigest())
        await asyncio.to_thread(_name, made, file)
    finally:
        await asyncio.to_thread(made.unlink, missing_ok=True)


def _compare(name: str, about: Mapping[str, Any], found: str) -> None:
    if whole_md5(about) not in ("", found):
        raise StoreUnavailable(f"{name} came with other bytes than the store says that it has")


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _name(made: Path, file: Path) -> None:
    made.replace(file)
    sync_folder(file.parent)


class _Download:
    """`work` goes on where the last try ended."""

    def __init__(
        self,
        target: dict[str, Any],
        file: BinaryIO,
        *,
        size: int,
        etag: str,
        advance: Advance | None,
    ) -> None:
        self.md5: Any = md5(b"")
        self._target = target
        self._file = file
        self._size = size
        self._etag = etag
        self._advance = advance
        self._done = 0

    def work(self, client: Any) -> None:
        """Blocks. Raises whatever boto3 raises, and StoreUnavailable when it is another thing."""
        more = {"Range": f"bytes={self._done}-"} if self._done else {}
        if self._done == self._size:
            return
        answer = client.get_object(**self._target, **more)
        if str(answer.get("ETag", "")) != self._etag:
            raise StoreUnavailable(f"{self._target['Key']} was exchanged while it was read")
        if more and f"bytes {self._done}-" not in str(answer.get("ContentRange", "")):
            self._begin_again()
        for piece in answer["Body"].iter_chunks(_PIECE_BYTES):
            self._file.write(piece)
            self.md5.update(piece)
            self._done += len(piece)
            if self._advance is not None:
                self._advance(self._done, self._size)
        if self._done != self._size:
            raise StoreUnavailable(
                f"{self._target['Key']} came with {self._done} bytes of {self._size}"
            )

    def _begin_again(self) -> None:
        """The server knows no ranges."""
        self._file.seek(0)
        self._file.truncate()
        self.md5, self._done = md5(b""), 0

"""Action `file_write`: a whole file, or a line more of one.

Overwriting is atomic: readers and a crash see the old content or the new, never half of it (a
temporary file beside it, flushed to disk, then renamed over it). Its name comes from the
idempotency key, so that a repeat after a crash takes the leftover along. Appending cannot be
repeated without harm and is issued once.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from llm_orchestrator.errors import AuthorError, OperatorError
from llm_orchestrator.model import Effect, Json
from llm_orchestrator.steps.action import check_parameters
from llm_orchestrator.steps.base import Outputs, StepContext
from llm_orchestrator.steps.values import describe, to_json


class FileWrite:
    """`path`, `content`, `mode` (text or json; default by what content is), `append`."""

    known = ("path", "content", "mode", "append")

    def effect(self, parameters: Mapping[str, Json]) -> Effect:
        """Writing the same file again changes nothing; appending again does."""
        return Effect.ONCE if parameters.get("append") else Effect.REPEATABLE

    async def execute(
        self, context: StepContext, parameters: Mapping[str, Json], *, effect: Effect
    ) -> Outputs:
        """Write; the result is {path, bytes}. Raises OperatorError when the disk says no."""
        check_parameters("file_write", parameters, self.known, required=["path"])
        content = _encode(parameters)
        path = Path(str(parameters["path"]))
        write = append_to if parameters.get("append") else replace
        try:
            await asyncio.to_thread(write, path, content, context.idempotency_key)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise OperatorError(
                f"file_write cannot write {path}: {reason}",
                hint=f"make {path.parent} writable and free some space, then: llmo runs retry",
            ) from error
        return {"result": {"path": str(path), "bytes": len(content)}}


def replace(path: Path, content: bytes, key: str) -> None:
    """Put `content` in place of the file, all or nothing, durably. Links are followed."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
    scratch = path.with_name(f".{path.name[:100]}.{mark}.tmp")
    try:
        _write(scratch, content, os.O_TRUNC)
        if path.exists():
            scratch.chmod(path.stat().st_mode & 0o7777)
        scratch.replace(path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def append_to(path: Path, content: bytes, key: str) -> None:
    """Add `content` to the end of the file, durably. `key` is not used: nobody can take it back."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    _write(path, content, os.O_APPEND)
    if is_new:
        _flush_folder(path.parent)


def _write(path: Path, content: bytes, flag: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | flag
    number = os.open(path, flags, 0o666)
    with open(number, "wb") as file:  # noqa: PTH123 (a Path cannot open a descriptor)
        file.write(content)
        file.flush()
        os.fsync(number)


def _flush_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _encode(parameters: Mapping[str, Json]) -> bytes:
    content = parameters.get("content", "")
    mode = parameters.get("mode") or ("text" if isinstance(content, str) else "json")
    if mode not in {"text", "json"}:
        raise AuthorError(f"file_write has no mode {mode!r}; use text or json")
    if mode == "text" and not isinstance(content, str):
        raise AuthorError(f"the content is {describe(content)}; text mode needs text")
    text = content if mode == "text" else to_json(content, indent=2) + "\n"
    return text.encode("utf-8", "surrogatepass")

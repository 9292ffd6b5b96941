"""The local socket through which other processes hand their batches to the engine.

One request, one answer: four bytes of length, then JSON. The one request that is no batch asks the
engine to step aside for a restore: it does so for as long as the connection lasts. A batch is sent
complete (seq, digests), so the engine needs no trust in it: the writing statement judges it like
any other. The socket lives in a private folder, because a Unix socket's path is limited to about
100 bytes and a data folder's is not.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import json
import os
import struct
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from llm_orchestrator.errors import (
    StoreDamaged,
    StoreError,
    StoreFull,
    StoreLocked,
    StoreReadOnly,
    StoreUnavailable,
)
from llm_orchestrator.model import Entry, NewRun, Workflow
from llm_orchestrator.store import base
from llm_orchestrator.store.audit import Audit, AuditEntry, ForgetAudit
from llm_orchestrator.store.base import Append, Batch, Outcome, Receipt, StateChange
from llm_orchestrator.store.escape import default

_LENGTH = struct.Struct(">I")
_BYTES_MAX = 256 << 20
_ASIDE = {"step": "aside"}
_TYPES: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        Append,
        StateChange,
        Entry,
        NewRun,
        Workflow,
        base.Post,
        base.Consume,
        base.Register,
        base.PutRecord,
        base.PutBlob,
        base.PutProgress,
        base.DropProgress,
        base.PutVectors,
        base.Expire,
        base.Mend,
        base.RunRow,
        base.Reindex,
        base.TrimCommits,
        Audit,
        AuditEntry,
        ForgetAudit,
        base.Unregister,
    )
}


_ERRORS: dict[str, type[StoreError]] = {
    kind.kind: kind
    for kind in (StoreDamaged, StoreFull, StoreLocked, StoreReadOnly, StoreUnavailable)
}


def socket_path(database: Path) -> Path:
    """Where the engine of `database` listens; the same for every process of this user."""
    name = blake2b(str(database.resolve()).encode(), digest_size=12).hexdigest()
    return Path(tempfile.gettempdir()) / f"llmo-{os.getuid()}" / f"{name}.sock"


async def send_batch(path: Path, batch: Batch) -> Receipt | None:
    """Hand `batch` to the engine that listens at `path`; None when nobody does.

    Raises the engine's own error. A lost answer raises StoreError: the outcome is unknown, and
    sending the same batch again is safe.
    """
    try:
        reader, writer = await asyncio.open_unix_connection(str(path))
    except OSError:
        return None
    try:
        await _write(writer, encode(batch))
        answer = await _read(reader)
    except (OSError, asyncio.IncompleteReadError) as error:
        raise StoreError(
            "the engine went away before it answered; the request may have been done",
            hint="llmo runs list",
        ) from error
    finally:
        writer.close()
    if "error" in answer:
        raise _ERRORS.get(answer["kind"], StoreError)(answer["error"], hint=answer.get("hint"))
    refused = {run_id: Outcome(value) for run_id, value in answer["refused"].items()}
    return Receipt(refused, is_refused=answer["is_refused"])


@contextlib.asynccontextmanager
async def asked_aside(path: Path) -> AsyncIterator[bool]:
    """The engine that listens at `path` has let go of its file while the block lasts.

    However this process ends, the engine takes its file again. False when there is no engine, or
    none that does so.
    """
    try:
        reader, writer = await asyncio.open_unix_connection(str(path))
    except OSError:
        yield False
        return
    try:
        try:
            await _write(writer, _ASIDE)
            answer = await _read(reader)
        except (OSError, ValueError, asyncio.IncompleteReadError):
            answer = {}
        yield "is_aside" in answer
    finally:
        writer.close()


Gone = Callable[[], Awaitable[object]]


class ShareServer:
    """Listens for batches and commits them through `commit`.

    `step_aside(gone)` lets go of the file, then waits for `gone()`, then takes it again.
    """

    def __init__(
        self,
        path: Path,
        commit: Callable[[Batch], Awaitable[Receipt]],
        step_aside: Callable[[Gone], Awaitable[None]],
    ) -> None:
        self._path = path
        self._commit = commit
        self._step_aside = step_aside
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Bind, private to this user. The lock is held: a socket that is there is a dead one's."""
        self._path.parent.mkdir(mode=0o700, exist_ok=True)
        if self._path.parent.stat().st_uid != os.getuid():
            raise StoreError(
                f"{self._path.parent} belongs to another user",
                hint="export TMPDIR=/a/private/folder",
            )
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, str(self._path))
        self._path.chmod(0o600)

    async def stop(self) -> None:
        """Stop listening and drop open connections."""
        if self._server is not None:
            self._server.close()
            for client in list(self._clients):
                client.cancel()
            await asyncio.gather(*self._clients, return_exceptions=True)
            await self._server.wait_closed()
            self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        try:
            while True:
                request = await _read(reader)
                if request == _ASIDE:
                    await self._make_room(reader, writer)
                    return
                await _write(writer, await self._answer(request))
        except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client is gone or speaks no JSON, or we are at our end
        finally:
            self._clients.discard(task)
            writer.close()

    async def _make_room(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def gone() -> None:
            with contextlib.suppress(OSError):
                await _write(writer, {"is_aside": True})
                await reader.read()

        try:
            await self._step_aside(gone)
        except StoreError as error:
            await _write(writer, {"error": error.message})

    async def _answer(self, request: Any) -> dict[str, Any]:
        try:
            receipt = await self._commit(decode(request))
        except StoreError as error:
            return {"error": error.message, "kind": error.kind, "hint": error.hint}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            return {"error": f"not a batch: {error}", "kind": "", "hint": None}
        return {"refused": dict(receipt.refused), "is_refused": receipt.is_refused}


async def _write(writer: asyncio.StreamWriter, data: Any) -> None:
    body = json.dumps(data, default=default).encode()
    writer.write(_LENGTH.pack(len(body)) + body)
    await writer.drain()


async def _read(reader: asyncio.StreamReader) -> Any:
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > _BYTES_MAX:
        raise OSError(f"a message of {length} bytes")
    return json.loads(await reader.readexactly(length))


def encode(value: object) -> Any:
    """Plain JSON for a batch: typed records as {"$": type, fields}, bytes as {"$b": base64}."""
    if isinstance(value, bytes):
        return {"$b": base64.b64encode(value).decode()}
    if isinstance(value, Batch):
        return {"appends": encode(value.appends), "changes": encode(value.changes)}
    name = type(value).__name__
    if name in _TYPES:
        return {"$": name, **{key: encode(item) for key, item in _fields(value).items()}}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if isinstance(value, Mapping):
        return {"$m": {key: encode(item) for key, item in value.items()}}
    return value


def decode(value: Any) -> Batch:
    """The inverse of `encode` for a whole batch."""
    return Batch(_decode(value["appends"]), _decode(value["changes"]))


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(item) for item in value)
    if not isinstance(value, dict):
        return value
    if "$b" in value:
        return base64.b64decode(value["$b"])
    if "$m" in value:
        return {key: _plain(item) for key, item in value["$m"].items()}
    with contextlib.suppress(KeyError):
        kind = _TYPES[value["$"]]
        return kind(**{key: _decode(item) for key, item in value.items() if key != "$"})
    raise ValueError(f"unknown record {value.get('$')!r}")


def _plain(value: Any) -> Any:
    """User data inside a mapping: lists stay lists."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return _decode(value) if isinstance(value, dict) else value


def _fields(value: Any) -> dict[str, Any]:
    if isinstance(value, tuple):
        fields: dict[str, Any] = value._asdict()  # type: ignore[attr-defined]
        return fields
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


async def answers(path: Path) -> bool:
    """True when an engine listens on a socket."""
    try:
        _, writer = await asyncio.open_unix_connection(str(path))
    except OSError:
        return False
    writer.close()
    return True

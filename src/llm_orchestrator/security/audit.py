"""The audit log: who did what to what, when, and what came of it, so that later changes show.

The picture: one chain per process life (a node, or one call of the command line). Each entry's
digest covers every field and the digest before it, each with its length:

    digest(n) = blake2b-256(lengths | digest(n-1) | chain | n | recorded_at | actor | action |
    target | result | detail | request_id)

A chain's head (number, digest) is a record of its own, moved in the same transaction by
compare-and-swap. A chain begins with an entry `audit.begin` that names the heads of the chains that
moved last. What shows therefore (security/audit_check.py looks for it):

- an edited field, a removed, added or swapped row: the digests do not fit;
- a removed tail or a removed chain: its head says otherwise; a head that was changed or removed
  with it: the beginnings of later chains say otherwise.

What cannot show from within: whoever may write to the database can rewrite all of it from some
moment on. So each entry is also a line of the process's log, and `llmo audit verify` prints the
heads, to be kept elsewhere.

When an entry is written. What an operator does is rarely one commit, so an entry `intended` is
durable before it begins and one with its result before the caller hears of it (`action`). Both name
each other by number. An intention without a result: the process died between them; look. What
leaves a durable record of its own first (starting a run: its journal) needs no intention.

`detail` holds few small facts and never a secret: values under a secret's name are replaced, long
ones are cut. A log that cannot be written stops what it should record: the caller gets the error.
Only the command line goes on when the log is damaged (and says so): it is what mends.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from math import isfinite
from typing import NamedTuple

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import AuthorError, OrchestratorError, StoreDamaged, StoreError
from llm_orchestrator.model import Json, stamp
from llm_orchestrator.steps.action_log import redact
from llm_orchestrator.store.audit import Audit, AuditEntry, AuditFilter, AuditShelf
from llm_orchestrator.store.base import Batch, PutRecord, Store
from llm_orchestrator.store.journal import GENESIS, canonical
from llm_orchestrator.store.rows import row_digest
from llm_orchestrator.telemetry.metrics import Metrics
from llm_orchestrator.telemetry.redact import redact_json

logger = logging.getLogger(__name__)
HEAD = "audit"
"""The kind of the records that hold the heads; their key is the chain."""
BEGIN, FORGET = "audit.begin", "audit.forget"
SYSTEM = "system"
CHAIN_ENTRIES_MAX = 10_000
"""A longer chain goes on as another one, so that old entries can go (chains go as a whole)."""
DETAIL_BYTES_MAX = 4096
_TEXT_MAX = 200
_VALUE_MAX = 500
_ITEMS_MAX = 32
_DEPTH_MAX = 4
_DIGITS_MAX = 15
_HEADS_NAMED = 8
_LOOK_BACK = 64
_TOGETHER = 200
"""Entries per commit."""


class Result(StrEnum):
    """What came of an action."""

    INTENDED = "intended"
    """It was about to begin."""
    SUCCESS = "success"
    REFUSED = "refused"
    """Not allowed, not possible, not there: nothing was changed."""
    FAILED = "failed"
    """Something broke: look what was done."""


class Head(NamedTuple):
    """The end of a chain. Number 0: it has not begun."""

    chain_id: str
    number: int
    digest: bytes
    recorded_at: int = 0
    version: int = 0
    """Of its record."""


@dataclass(slots=True)
class _Draft:
    """An entry that waits for its place."""

    actor: str
    action: str
    target: str
    result: Result
    detail: bytes
    done: asyncio.Future[AuditEntry] | None = None
    request_id: str = ""


class AuditLog:
    """A process's own chain. Calls may overlap: what waits meanwhile goes into one commit."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        chain_id: str,
        *,
        metrics: Metrics | None = None,
        on_damage: Callable[[StoreDamaged], None] | None = None,
    ) -> None:
        """`on_damage` is told of a damaged log, and then what it should record goes on."""
        self._store = store
        self._on_damage = on_damage
        self._clock = clock
        self._chain_id = chain_id
        self._metrics = metrics or Metrics()
        self._part = 1
        self._head: Head | None = None
        self._waiting: list[_Draft] = []
        self._writing: asyncio.Task[None] | None = None

    async def write(
        self,
        *,
        actor: str,
        action: str,
        target: str = "",
        result: Result = Result.SUCCESS,
        detail: Mapping[str, Json] | None = None,
        request_id: str = "",
    ) -> AuditEntry:
        """Make an entry durable. Raises StoreError: then it is not known whether it is there."""
        done: asyncio.Future[AuditEntry] = asyncio.get_running_loop().create_future()
        draft = _Draft(tidy(actor), tidy(action), tidy(target), result, pack(detail or {}), done)
        draft.request_id = tidy(request_id)
        self._waiting.append(draft)
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_all())
        try:
            return await done
        except StoreDamaged as error:
            if self._on_damage is None:
                raise
            self._on_damage(error)
            return _entry(draft, (self._chain_id, 0, 0), GENESIS)

    @asynccontextmanager
    async def action(
        self,
        *,
        actor: str,
        action: str,
        target: str = "",
        detail: Mapping[str, Json] | None = None,
        request_id: str = "",
        is_announced: bool = True,
    ) -> AsyncIterator[dict[str, Json]]:
        """An entry before the block (if `is_announced`) and one after it, with its result.

        Yields a dict: facts put into it become part of the second one's detail; `target` there
        replaces the target (an id that is not known before).
        """
        facts: dict[str, Json] = dict(detail or {})
        if is_announced:
            intent = await self.write(
                actor=actor,
                action=action,
                target=target,
                result=Result.INTENDED,
                detail=detail,
                request_id=request_id,
            )
            facts["intent"] = [intent.chain_id, intent.number]

        async def end(result: Result) -> None:
            found = str(facts.pop("target", None) or target)
            await self.write(
                actor=actor,
                action=action,
                target=found,
                result=result,
                detail=facts,
                request_id=request_id,
            )

        try:
            yield facts
        except OrchestratorError as error:
            facts["error"] = reason(error)
            await end(Result.FAILED if isinstance(error, StoreError) else Result.REFUSED)
            raise
        except Exception as error:
            facts["error"] = type(error).__name__
            await end(Result.FAILED)
            raise
        await end(Result.SUCCESS)

    # -- how -----------------------------------------------------------------------------------

    async def _write_all(self) -> None:
        while self._waiting:
            some, self._waiting = self._waiting[:_TOGETHER], self._waiting[_TOGETHER:]
            try:
                entries = await self._land(some)
            except Exception as error:  # noqa: BLE001 - whoever waits is told, whatever it is
                for draft in some:
                    if draft.done is not None and not draft.done.done():
                        draft.done.set_exception(error)
                continue
            for draft, entry in zip(some, entries, strict=True):
                _tell(entry)
                self._metrics.count("audit_entries_total", self._metrics.words(entry.action))
                if draft.done is not None and not draft.done.done():
                    draft.done.set_result(entry)

    async def _land(self, drafts: Sequence[_Draft]) -> list[AuditEntry]:
        """Commit them behind the head. Whatever goes wrong, the head is read anew afterwards."""
        for _ in range(2):
            head = self._head or await self._find_head()
            first = [] if head.number else [await self._beginning(head.chain_id)]
            now, entries = self._clock.now_us(), []
            number, digest = head.number, head.digest
            for draft in [*first, *drafts]:
                number += 1
                entries.append(_entry(draft, (head.chain_id, number, now), digest))
                digest = entries[-1].digest
            moved = Head(head.chain_id, number, digest, now, head.version + 1)
            self._head = None
            receipt = await self._store.commit(
                Batch(changes=(Audit(tuple(entries)), put_head(moved)))
            )
            if not receipt.is_refused:
                self._head = moved if number < CHAIN_ENTRIES_MAX else None
                return entries[len(first) :]
        raise StoreDamaged(
            f"the audit log does not take entry {number} of chain {head.chain_id}",
            hint="llmo audit verify",
        )

    async def _find_head(self) -> Head:
        """The last part of our chain that has room."""
        while True:
            chain_id = self._chain_id if self._part == 1 else f"{self._chain_id}.{self._part}"
            head = await read_head(self._store, chain_id)
            if head.number < CHAIN_ENTRIES_MAX:
                return head
            self._part += 1

    async def _beginning(self, chain_id: str) -> _Draft:
        """What a chain begins with: the heads that it found, the ones that moved last."""
        heads: dict[str, AuditEntry] = {}
        try:
            newest = await self._store.shelf.audit(AuditFilter(limit=_LOOK_BACK))
        except StoreDamaged:
            newest = []  # what is left of the others is no reason not to begin
        for entry in newest:
            known = heads.get(entry.chain_id)
            if known is None or known.number < entry.number:
                heads[entry.chain_id] = entry
        named: list[Json] = [
            [each.chain_id, each.number, each.digest.hex(), each.recorded_at]
            for each in list(heads.values())[:_HEADS_NAMED]
        ]
        return _Draft(SYSTEM, BEGIN, chain_id, Result.SUCCESS, pack({"heads": named}))


def _tell(entry: AuditEntry) -> None:
    """The second copy, for whoever keeps logs: it says what was written and under which digest."""
    logger.info(
        "audit %s: %s %s by %s: %s",
        f"{entry.chain_id}/{entry.number} {entry.digest.hex()}",
        entry.action,
        entry.target or "-",
        entry.actor,
        entry.result,
    )


def _entry(draft: _Draft, where: tuple[str, int, int], previous: bytes) -> AuditEntry:
    bare = AuditEntry(
        *where,
        draft.actor,
        draft.action,
        draft.target,
        draft.result.value,
        draft.detail,
        draft.request_id,
        previous,
        b"",
    )
    return bare._replace(digest=digest_of(bare))


def digest_of(entry: AuditEntry) -> bytes:
    """What an entry's digest must be."""
    return row_digest(entry.previous, *entry[:9])


def facts_of(entry: AuditEntry) -> dict[str, Json]:
    """An entry for programs: command line and API."""
    try:
        detail: Json = json.loads(entry.detail)
    except (ValueError, TypeError):
        detail = None  # damaged: `llmo audit verify` says so
    return {
        "id": id_of(entry),
        "at": stamp(entry.recorded_at),
        "actor": entry.actor,
        "action": entry.action,
        "target": entry.target,
        "result": entry.result,
        "detail": detail,
        "request_id": entry.request_id,
        "digest": entry.digest.hex(),
    }


def id_of(entry: AuditEntry) -> str:
    """How people name an entry."""
    return f"{entry.chain_id}/{entry.number}"


async def find_entry(shelf: AuditShelf, entry_id: str) -> AuditEntry | None:
    """The entry of an id; None when there is none."""
    chain_id, _, number = entry_id.rpartition("/")
    if not number.isdecimal() or len(number) > _DIGITS_MAX:
        return None
    found = await shelf.audit_chains((chain_id, int(number) - 1), 1)
    return found[0] if found and found[0][:2] == (chain_id, int(number)) else None


async def read_head(store: Store, chain_id: str) -> Head:
    """A chain's head as its record says. Raises StoreDamaged."""
    value, version = await store.shelf.record(HEAD, chain_id)
    return head_of(chain_id, value, version)


def head_of(chain_id: str, value: Json, version: int = 0) -> Head:
    """A record's value as a head. Raises StoreDamaged when it is none."""
    if value is None:
        return Head(chain_id, 0, GENESIS)
    try:
        return Head(
            chain_id,
            int(value["number"]),
            bytes.fromhex(value["digest"]),
            int(value["at"]),
            version,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StoreDamaged(
            f"the head of the audit log's chain {chain_id} is damaged", hint="llmo audit verify"
        ) from error


def put_head(head: Head) -> PutRecord:
    """Move a chain's head from the version before."""
    value = {"number": head.number, "digest": head.digest.hex(), "at": head.recorded_at}
    return PutRecord(HEAD, head.chain_id, value, head.version - 1)


def reason(error: OrchestratorError) -> str:
    """Why something was not done. Mistakes of authors are not told: they quote what users wrote."""
    return error.kind if isinstance(error, AuthorError) else f"{error.kind}: {error.message}"


def tidy(text: str) -> str:
    """What every column takes: at most 200 characters, all printable."""
    kept = text[:_TEXT_MAX]
    if kept.isprintable():
        return kept
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in kept)


def pack(detail: Mapping[str, Json]) -> bytes:
    """A JSON object of at most 4096 bytes, without secrets."""
    packed = canonical(_small(redact(redact_json(dict(detail))), _DEPTH_MAX))
    if len(packed) <= DETAIL_BYTES_MAX:
        return packed
    kept = {key: value for key, value in detail.items() if isinstance(value, int | bool)}
    return canonical({**kept, "cut": f"{len(packed)} bytes"})


def _small(value: Json, depth: int) -> Json:
    if isinstance(value, str):
        kept = value if len(value) <= _VALUE_MAX else f"{value[:_VALUE_MAX]}…"
        return kept.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")
    if isinstance(value, bool | int) or value is None:
        return value
    if isinstance(value, float) and isfinite(value):
        return value
    if isinstance(value, Mapping) and depth:
        some = list(value.items())[:_ITEMS_MAX]
        return {tidy(str(key)): _small(item, depth - 1) for key, item in some}
    if isinstance(value, list | tuple) and depth:
        return [_small(item, depth - 1) for item in value[:_ITEMS_MAX]]
    return _small(repr(value), depth)

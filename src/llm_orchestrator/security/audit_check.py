"""Checking the audit log: whether every entry is still there, as it was written.

Reads only, page by page, while others go on writing. Four witnesses are heard: each entry's digest,
its place in its chain, the chain's head (a record), and the beginnings of other chains, which name
the heads that they found. Heads that were noted elsewhere (`known`) are a fifth.

Retention takes whole chains, and says so in an entry of its own before it does: a chain that ended
before that time may be missing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from llm_orchestrator.errors import StoreDamaged
from llm_orchestrator.model import Json
from llm_orchestrator.security.audit import BEGIN, FORGET, HEAD, Head, digest_of, head_of, read_head
from llm_orchestrator.store.audit import AuditEntry, AuditFilter
from llm_orchestrator.store.base import Store
from llm_orchestrator.store.journal import GENESIS

_PAGE = 500


class Flaw(NamedTuple):
    """Something that is not as it was written. Number 0: the chain as a whole."""

    chain_id: str
    number: int
    what: str


class _Named(NamedTuple):
    """A head as a witness tells it."""

    number: int
    digest: str
    recorded_at: int
    witness: str


@dataclass(slots=True)
class Checked:
    """What a check found."""

    chains: int = 0
    entries: int = 0
    heads: list[Head] = field(default_factory=list)
    """Of all chains, as their entries say. To be kept elsewhere."""
    flaws: list[Flaw] = field(default_factory=list)


async def check_audit(store: Store, *, known: Sequence[Head] = ()) -> Checked:
    """Check the whole log. `known`: heads of an earlier check, kept where nobody else writes.

    Raises StoreError when the log cannot be read.
    """
    return await _Check(store, known).run()


class _Check:
    """One pass over the log."""

    def __init__(self, store: Store, known: Sequence[Head]) -> None:
        self._store = store
        self._heads: Mapping[str, Json] = {}
        self._named: dict[str, _Named] = {}
        self._begun: dict[str, int] = {}
        self._previous = GENESIS
        self._expected = 1
        self._last: AuditEntry | None = None
        self.found = Checked()
        for head in known:
            told = (head.number, head.digest.hex(), head.recorded_at, "the heads noted elsewhere")
            self._name(head.chain_id, _Named(*told))

    async def run(self) -> Checked:
        """Heads first: what moves afterwards has only become longer."""
        self._heads = await self._store.shelf.records(HEAD)
        after = ("", 0)
        while page := await self._store.shelf.audit_chains(after, _PAGE):
            for entry in page:
                await self._take(entry)
            after = page[-1][:2]
            if not _is_text(after[0]):
                self._complain("?", 0, f"a chain's name is damaged: {after[0]!r}")
                break
        await self._end_chain()
        for chain_id in self._heads:
            if chain_id not in self._begun:
                await self._look_for_missing(chain_id)
        await self._hear_witnesses()
        return self.found

    def _complain(self, chain_id: str, number: int, what: str) -> None:
        self.found.flaws.append(Flaw(chain_id, number, what))

    # -- one chain -----------------------------------------------------------------------------

    async def _take(self, entry: AuditEntry) -> None:
        if self._last is None or entry.chain_id != self._last.chain_id:
            await self._end_chain()
            self._previous, self._expected = GENESIS, 1
            self._begun[entry.chain_id] = entry.recorded_at
        self._last = entry
        self.found.entries += 1
        number: object = entry.number
        if not isinstance(number, int):
            self._complain(entry.chain_id, self._expected, "its number is damaged")
            return
        is_whole = self._is_whole(entry)
        self._previous, self._expected = entry.digest, entry.number + 1
        if entry.number == 1 and is_whole:
            self._hear(entry)
        told = self._told(entry.chain_id)
        if told and told.number == entry.number and told.digest != entry.digest:
            self._complain(entry.chain_id, entry.number, "its digest is not the one of the head")

    def _is_whole(self, entry: AuditEntry) -> bool:
        chain_id, number = entry[:2]
        if number > self._expected:
            missing = _span(self._expected, number - 1)
            self._complain(chain_id, self._expected, f"{missing} missing")
        elif entry.previous != self._previous:
            self._complain(chain_id, number, "it does not follow the entry before it")
        if entry.digest == digest_of(entry):
            return True
        self._complain(chain_id, number, "it does not fit its digest: a field was changed")
        return False

    def _told(self, chain_id: str) -> Head | None:
        """The head as it was when the check began."""
        try:
            return head_of(chain_id, self._heads[chain_id]) if chain_id in self._heads else None
        except StoreDamaged:
            return None

    async def _end_chain(self) -> None:
        last = self._last
        if last is None:
            return
        self.found.chains += 1
        self.found.heads.append(Head(last.chain_id, self._expected - 1, last.digest, last[2]))
        number, told = self._expected - 1, self._told(last.chain_id)
        if told is None or told.number < number:
            try:
                told = await read_head(self._store, last.chain_id)
            except StoreDamaged as error:
                self._complain(last.chain_id, 0, error.message)
                return
            if told.number == 0 and await self._entry(last.chain_id, number) is None:
                return  # forgotten while we looked
        if told.number == 0:
            self._complain(last.chain_id, 0, "its head is missing")
        elif told.number > number and await self._entry(last.chain_id, number + 1) is None:
            self._complain(
                last.chain_id, number + 1, f"{_span(number + 1, told.number)} missing at its end"
            )
        elif told.number < number:
            what = f"{_span(told.number + 1, number)} behind its head"
            self._complain(last.chain_id, told.number + 1, what)

    async def _look_for_missing(self, chain_id: str) -> None:
        try:
            head = await read_head(self._store, chain_id)
        except StoreDamaged as error:
            self._complain(chain_id, 0, error.message)
            return
        if head.number and await self._entry(chain_id, 1) is None:
            what = f"the whole chain is missing: {_span(1, head.number)}"
            self._complain(chain_id, 0, what)

    async def _entry(self, chain_id: str, number: int) -> AuditEntry | None:
        found = await self._store.shelf.audit_chains((chain_id, number - 1), 1)
        return found[0] if found and found[0][:2] == (chain_id, number) else None

    # -- what others say of it -----------------------------------------------------------------

    def _hear(self, entry: AuditEntry) -> None:
        """The first entry of a chain names the heads that it found."""
        if entry.action != BEGIN:
            self._complain(entry.chain_id, 1, "a chain begins with its beginning: this is none")
            return
        for chain_id, number, digest, recorded_at in json.loads(entry.detail)["heads"]:
            self._name(chain_id, _Named(number, digest, recorded_at, f"chain {entry.chain_id}"))

    def _name(self, chain_id: str, named: _Named) -> None:
        before = self._named.get(chain_id)
        if before is None or before.number < named.number:
            self._named[chain_id] = named

    async def _hear_witnesses(self) -> None:
        """Only the furthest head that was named: the digests vouch for what lies before it."""
        horizon = await self._horizon()
        missing = {flaw.chain_id for flaw in self.found.flaws if flaw.number == 0}
        for chain_id, named in self._named.items():
            begun = self._begun.get(chain_id)
            is_gone = begun is None or begun > named.recorded_at
            if chain_id in missing or (is_gone and named.recorded_at < horizon):
                continue
            entry = await self._entry(chain_id, named.number)
            if entry is None and begun is None:
                what = f"the whole chain is missing: {named.witness} names its entry {named.number}"
                self._complain(chain_id, 0, what)
            elif entry is None:
                what = f"it is missing: {named.witness} names it"
                self._complain(chain_id, named.number, what)
            elif entry.digest.hex() != named.digest:
                what = f"it was written anew: {named.witness} names another digest"
                self._complain(chain_id, named.number, what)

    async def _horizon(self) -> int:
        """What ended before this time may have been forgotten."""
        horizon = 0
        for entry in await self._store.shelf.audit(AuditFilter(action=FORGET, limit=_PAGE)):
            if entry.digest == digest_of(entry):
                horizon = max(horizon, int(json.loads(entry.detail).get("before", 0)))
        return horizon


def _is_text(name: object) -> bool:
    """False for what only damage writes into a column."""
    try:
        return isinstance(name, str) and bool(name.encode())
    except UnicodeEncodeError:
        return False


def _span(first: int, last: int) -> str:
    return f"entry {first}" if first == last else f"entries {first} to {last}"

"""Second copies of a journal, from which a damaged one is mended (P6).

A copy is believed where it tells the same story: its own chain is whole, and every row of the
damaged journal that is still good is in it, byte for byte. Then what it has in the place of a
damaged or missing row is what was there, for a digest vouches for everything before it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from llm_orchestrator.errors import StoreError
from llm_orchestrator.model import Entry, Journal
from llm_orchestrator.store import journal as chains
from llm_orchestrator.store.base import Look, PutBlob
from llm_orchestrator.store.check import whole

logger = logging.getLogger(__name__)


class SecondCopy(Protocol):
    """A place that may know a run: the stream archive, a replica, a backup put aside."""

    @property
    def name(self) -> str:
        """For messages: `the stream archive`."""
        ...

    async def entries(self, run_id: str) -> Sequence[Entry]:
        """The run as far as this copy has it, whole by its chain. Raises StoreError."""
        ...


class StoreCopy:
    """Another store that has the run: a standby, a backup that was put aside."""

    def __init__(self, name: str, look: Look) -> None:
        self.name = name
        self._look = look

    async def entries(self, run_id: str) -> Sequence[Entry]:
        journal = (await self._look.load([run_id])).get(run_id)
        return () if journal is None else whole(journal)


class Found(NamedTuple):
    """What a copy has in place of a flawed row, as it is stored."""

    entry: Entry
    blobs: tuple[PutBlob, ...]
    where: str


async def ask(
    copies: Sequence[SecondCopy], journal: Journal, wanted: Sequence[int]
) -> dict[int, Found]:
    """For each `wanted` place the first copy that tells the same story and has it.

    Where the end is damaged, also what that copy has behind it: the row of `runs` knows of the end
    at its last change of state only.
    """
    found: dict[int, Found] = {}
    good = {entry.seq: entry for entry in journal.entries}
    for seq in {flaw.seq for flaw in journal.flaws}:
        good.pop(seq, None)
    for copy in copies:
        missing = [seq for seq in wanted if seq not in found]
        if not missing:
            break
        try:
            known = {entry.seq: entry for entry in await copy.entries(journal.run_id)}
        except StoreError as error:
            logger.error("%s does not say what it knows: %s", copy.name, error.message)
            continue
        if not _agrees(known, good):
            logger.error("%s tells another story of run %s", copy.name, journal.run_id)
            continue
        last = max(wanted)
        if last in missing and last > max(good, default=0):
            missing += [seq for seq in known if seq > last]
        for seq in missing:
            if seq in known:
                entry, blobs = as_stored(known[seq], _before(known, seq))
                found[seq] = Found(entry, blobs, copy.name)
    return found


def _agrees(known: Mapping[int, Entry], good: Mapping[int, Entry]) -> bool:
    """True when every good row that the copy reaches is in it."""
    last = max(known, default=0)
    return all(
        known[seq].digest == entry.digest if seq in known else seq > last
        for seq, entry in good.items()
    )


def _before(known: Mapping[int, Entry], seq: int) -> bytes:
    return known[seq - 1].digest if seq > 1 else chains.GENESIS


def as_stored(entry: Entry, previous: bytes) -> tuple[Entry, tuple[PutBlob, ...]]:
    """An entry whose payload was filled in from a blob, as it stands in its row again."""
    if chains.chain_or_none(previous, entry) == entry.digest:
        return entry, ()
    reference = chains.blob_reference(entry.payload)
    blob = PutBlob(entry.run_id, reference[1:], entry.payload)
    return entry._replace(payload=reference), (blob,)

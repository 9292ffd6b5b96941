"""Reading with suspicion: a run's rows become a Journal whose flaws are named.

Three things vouch for each other: the chain, the row of `runs` (which repeats the digest of the
entry of its last state change: the anchor), and the repairs of the past. A repair never deletes.
It appends a `rewound` entry whose payload lists, under `lost`, the seq and stored digest of every
row that it gives up; from then on those rows are skipped, here and in the fold.

A flaw with seq 0 is one of the row of `runs`, not of the journal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

from llm_orchestrator.errors import StoreDamaged
from llm_orchestrator.model import Entry, Flaw, Journal, Kind
from llm_orchestrator.store import journal

ReadBlob = Callable[[bytes], bytes | None]
TAIL_MAX = 100
INDEX_DAMAGED = "the index of the journal contradicts the table"
"""A flaw of the store that hides rows of a run; making the index anew is its cure."""


class Anchor(NamedTuple):
    """What the row of `runs` says of the entry of its last state change."""

    seq: int
    digest: bytes


def definition_digest(definition: bytes) -> str:
    """The digest by which a definition is known: hex blake2b-256 of its canonical bytes."""
    return blake2b(definition, digest_size=32).hexdigest()


def entry_of(row: Sequence[Any]) -> Entry | None:
    """A row as an Entry. What has no right type becomes a neutral value, which fits no digest.

    None when not even its number can be read.
    """
    run_id, seq, epoch, kind, step, attempt, payload, digest, recorded_at = row
    if not isinstance(seq, int) or not isinstance(run_id, str):
        return None
    return Entry(
        run_id,
        seq,
        _fit(epoch, int, 0),
        _fit(kind, str, ""),
        _fit(step, str, "?"),
        _fit(attempt, int, 0),
        _fit(payload, bytes, b""),
        _fit(digest, bytes, b""),
        _fit(recorded_at, int, 0),
    )


def _fit(value: Any, kind: type, neutral: Any) -> Any:
    return value if isinstance(value, kind) else neutral


def check_journal(
    run_id: str,
    entries: Sequence[Entry],
    read_blob: ReadBlob,
    *,
    broken: Sequence[Flaw] = (),
    anchor: Anchor | None = None,
) -> Journal:
    """Entries with blobs filled in and given-up rows left out, and every flaw that is left."""
    entries = within_reach(entries)
    lost = given_up(entries)
    flaws = [flaw for flaw in broken if flaw.seq not in lost]
    copy = anchor.digest if anchor and entries and anchor.seq == entries[-1].seq else b""
    flaws += journal.verify(run_id, entries, known=lost.items(), anchor=copy)
    if anchor is not None:
        flaws += _against(run_id, entries, anchor, lost=lost, flaws=flaws)
    bad = {flaw.seq for flaw in flaws if not flaw.is_mendable}
    whole: dict[int, Entry] = {}
    for entry in entries:
        if entry.seq in bad or lost.get(entry.seq) == entry.digest:
            continue
        reference = journal.blob_digest(entry.payload)
        if reference is not None:
            content = read_blob(reference)
            if content is None or not journal.is_blob_intact(entry.payload, content):
                flaws.append(Flaw(run_id, entry.seq, "its blob is missing or damaged", False))
                continue
            entry = entry._replace(payload=content)
        whole[entry.seq] = entry
    ordered = tuple(sorted(flaws, key=lambda flaw: flaw.seq))
    return Journal(run_id, tuple(whole.values()), ordered)


def whole(journal: Journal) -> Sequence[Entry]:
    """The entries up to the first flaw: behind it the chain vouches for nothing."""
    bad = min((flaw.seq for flaw in journal.flaws if flaw.seq), default=1 << 62)
    return [entry for entry in journal.entries if entry.seq < bad]


def within_reach(entries: Sequence[Entry]) -> Sequence[Entry]:
    """Without rows whose number is absurdly high: a flipped bit put them there."""
    last = 0
    for position, entry in enumerate(entries):
        if entry.seq > last + journal.GAP_MAX:
            return entries[:position]
        last = entry.seq
    return entries


def _against(
    run_id: str,
    entries: Sequence[Entry],
    anchor: Anchor,
    *,
    lost: dict[int, bytes],
    flaws: Sequence[Flaw],
) -> list[Flaw]:
    """A missing tail, or a row of `runs` that contradicts the journal."""
    if anchor.seq in lost or any(flaw.seq == anchor.seq for flaw in flaws):
        return []  # that entry is damaged itself, and known to be
    last = entries[-1].seq if entries else 0
    known = {entry.digest: entry.seq for entry in entries}
    if known.get(anchor.digest) == anchor.seq:
        return []
    if last < anchor.seq <= last + journal.GAP_MAX and anchor.digest not in known:
        what = "row missing at the end: the row of runs knows of it"
        end = min(anchor.seq, last + TAIL_MAX)
        return [Flaw(run_id, seq, what, False) for seq in range(last + 1, end + 1)]
    return [Flaw(run_id, 0, "the row of runs names another head than the journal has")]


def given_up(entries: Sequence[Entry]) -> dict[int, bytes]:
    """Rows that repairs have given up: seq to stored digest (empty for a row that was gone)."""
    lost: dict[int, bytes] = {}
    for entry in entries:
        if entry.kind != Kind.REWOUND:
            continue
        try:
            data = journal.decode(entry.payload)
            lost.update((int(seq), bytes.fromhex(digest)) for seq, digest in data.get("lost", ()))
        except (StoreDamaged, ValueError, TypeError):
            continue  # a damaged repair entry gives nothing up; its own flaw is found by the chain
    return lost

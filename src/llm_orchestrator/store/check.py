"""Reading with suspicion: a run's rows become a Journal whose flaws are named.

A repair never deletes. It appends a `rewound` entry whose payload lists, under `lost`, the seq and
stored digest of every row that it gives up; from then on those rows are skipped, here and in the fold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b

from llm_orchestrator.errors import StoreDamaged
from llm_orchestrator.model import Entry, Flaw, Journal, Kind
from llm_orchestrator.store import journal

ReadBlob = Callable[[bytes], bytes | None]


def definition_digest(definition: bytes) -> str:
    """The digest by which a definition is known: hex blake2b-256 of its canonical bytes."""
    return blake2b(definition, digest_size=32).hexdigest()


def check_journal(
    run_id: str, entries: Sequence[Entry], broken: Sequence[Flaw], read_blob: ReadBlob
) -> Journal:
    """Entries with blobs filled in and given-up rows left out, and every flaw that is left."""
    lost = given_up(entries)
    flaws = [flaw for flaw in broken if flaw.seq not in lost]
    flaws += journal.verify(run_id, entries, known=lost.items())
    bad = {flaw.seq for flaw in flaws if not flaw.is_mendable}
    whole = []
    for entry in entries:
        if entry.seq in lost:
            continue
        if entry.seq not in bad:
            reference = journal.blob_digest(entry.payload)
            if reference is not None:
                content = read_blob(reference)
                if content is None or not journal.is_blob_intact(entry.payload, content):
                    flaws.append(Flaw(run_id, entry.seq, "its blob is missing or damaged", False))
                    continue
                entry = entry._replace(payload=content)
        whole.append(entry)
    return Journal(run_id, whole, tuple(sorted(flaws, key=lambda flaw: flaw.seq)))


def missing_tail(run_id: str, entries: Sequence[Entry], anchor: int) -> list[Flaw]:
    """Rows that the run's row (`head_seq` at its last state change) says there were."""
    last = entries[-1].seq if entries else 0
    what = "row missing at the end: the run's row knows of it"
    return [Flaw(run_id, seq, what, False) for seq in range(last + 1, min(anchor, last + 100) + 1)]


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

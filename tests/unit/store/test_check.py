"""Rows, anchor and repairs vouch for each other."""

from __future__ import annotations

from typing import Any

from llm_orchestrator.model import Draft, Entry, Flaw, Journal, Kind
from llm_orchestrator.store.check import Anchor, check_journal, entry_of, within_reach
from llm_orchestrator.store.journal import GAP_MAX, GENESIS, blob_reference, encode, link

RUN = "r"


def rows(*drafts: Draft) -> list[Entry]:
    entries: list[Entry] = []
    digest = GENESIS
    for seq, draft in enumerate(drafts, 1):
        columns = (seq, 1, *draft)
        digest = link(digest, RUN, columns)
        entries.append(Entry(RUN, *columns, digest, 0))
    return entries


def step(name: str = "s") -> Draft:
    return Draft(Kind.STEP_FINISHED, name, 1, encode({"result": name}))


def check(entries: list[Entry], **more: Any) -> Journal:
    return check_journal(RUN, entries, lambda digest: None, **more)


def seqs(journal: Journal) -> tuple[list[int], list[int]]:
    return [entry.seq for entry in journal.entries], [flaw.seq for flaw in journal.flaws]


def test_a_missing_tail_is_found_by_the_anchor() -> None:
    entries = rows(step(), step(), step(), step())
    anchor = Anchor(4, entries[3].digest)
    assert seqs(check(entries, anchor=anchor)) == ([1, 2, 3, 4], [])
    assert seqs(check(entries[:2], anchor=anchor)) == ([1, 2], [3, 4])


def test_a_head_that_the_row_names_wrongly_is_the_rows_flaw() -> None:
    entries = rows(step(), step(), step())
    for anchor in (
        Anchor(2, entries[2].digest),
        Anchor(3, bytes(32)),
        Anchor(1 << 50, entries[2].digest),
        Anchor(1 << 50, bytes(32)),
    ):
        assert seqs(check(entries, anchor=anchor)) == ([1, 2, 3], [0]), anchor


def test_the_anchor_saves_a_flipped_last_digest() -> None:
    entries = rows(step(), step())
    anchor = Anchor(2, entries[1].digest)
    entries[1] = entries[1]._replace(digest=bytes(32))
    journal = check(entries, anchor=anchor)
    assert [(flaw.seq, flaw.is_mendable) for flaw in journal.flaws] == [(2, True)]
    assert seqs(journal)[0] == [1, 2]


def repair(*lost: tuple[int, bytes]) -> Draft:
    data = {"is_repair": True, "lost": [[seq, digest.hex()] for seq, digest in lost]}
    return Draft(Kind.REWOUND, "", 0, encode(data))


def test_what_a_repair_gave_up_is_left_out() -> None:
    entries = rows(
        step("a"), step("b"), step("c"), repair((2, rows(step("a"), step("b"))[1].digest))
    )
    entries[1] = entries[1]._replace(payload=b"damaged")
    assert seqs(check(entries)) == ([1, 3, 4], [])


def test_entries_at_the_numbers_of_a_lost_tail_count() -> None:
    """The tail (3, 4) was lost; the repair and what came after it took its numbers."""
    entries = rows(step("a"), step("b"), repair((3, b""), (4, b"")), step("c"))
    assert seqs(check(entries)) == ([1, 2, 3, 4], [])


def test_a_blob_that_is_missing_or_wrong_is_its_entrys_flaw() -> None:
    content = encode({"result": "big"})
    entries = rows(step(), Draft(Kind.STEP_FINISHED, "big", 1, blob_reference(content)))
    assert seqs(check(entries)) == ([1], [2])
    wrong = check_journal(RUN, entries, lambda digest: b"other")
    assert seqs(wrong) == ([1], [2])
    right = check_journal(RUN, entries, lambda digest: content)
    assert seqs(right) == ([1, 2], [])
    assert right.entries[1].payload == content


def test_rows_behind_an_absurd_number_are_out_of_reach() -> None:
    entries = rows(step(), step(), step())
    entries[2] = entries[2]._replace(seq=GAP_MAX * 5)
    assert within_reach(entries) == entries[:2]
    assert seqs(check(entries, anchor=Anchor(3, entries[2].digest))) == ([1, 2], [3])


def test_flaws_that_reading_found_are_kept_unless_given_up() -> None:
    broken = [Flaw(RUN, 2, "page unreadable", is_mendable=False)]
    entries = rows(step("a"), step("b"), step("c"))
    del entries[1]
    assert seqs(check(entries, broken=broken)) == ([1], [2, 2, 3])


def test_a_row_of_any_types_becomes_an_entry_or_none() -> None:
    right = (RUN, 1, 1, "kind", "step", 0, b"{}", bytes(32), 5)
    assert entry_of(right) == Entry(*right)
    assert entry_of((RUN, "1", *right[2:])) is None
    assert entry_of((None, *right[1:])) is None
    strange = entry_of((RUN, 1, "e", 5, None, b"", 3.5, "digest", "now"))
    assert strange == Entry(RUN, 1, 0, "", "?", 0, b"", b"", 0)

"""Payload bytes and chains: whatever goes in comes out again, whatever changes shows."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import enum
import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_orchestrator.errors import StoreDamaged, TooLarge
from llm_orchestrator.model import Entry, Kind
from llm_orchestrator.store import journal
from llm_orchestrator.store.journal import (
    COMPRESS_BYTES_MIN,
    GENESIS,
    blob_digest,
    blob_reference,
    canonical,
    decode,
    encode,
    encode_clean,
    is_blob_intact,
    link,
    round_trip,
    verify,
)
from llm_orchestrator.telemetry import redact

RUN = "00000000-0000-7000-8000-000000000001"


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: float
    label: Any


class Hostile:
    """Raises whatever it is asked."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __getattr__(self, name: str) -> Any:
        raise KeyError(name)


class HostileModel:
    def model_dump(self, mode: str) -> Any:
        raise ZeroDivisionError(mode)


class HostileKey:
    def __str__(self) -> str:
        raise RuntimeError("no str")


class HostileMapping(dict[str, Any]):
    def items(self) -> Any:
        raise OSError("no items")


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
FOREIGN: list[Any] = [
    10**5_000,
    -(10**700),
    "\0",
    "\ud800",
    {1: "a", "1": "b"},
    {(1, 2): 3, None: 4, 1.5: 5, True: 6},
    {"$float": "nan"},
    {"$object": {"$bytes": "x"}},
    {1, "mixed"},
    frozenset({3, 1}),
    Colour.RED,
    Point(1.0, b"x"),
    Hostile(),
    HostileModel(),
    HostileMapping(a=1),
    {HostileKey(): 1},
    datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    datetime.date(2026, 1, 2),
    memoryview(b"x"),
    object,
    Point,
    1j,
]
STRANGE = st.recursive(
    PLAIN
    | st.floats()
    | st.binary(max_size=8)
    | st.text(st.characters(codec=None), max_size=4)
    | st.integers(0, len(FOREIGN) - 1).map(lambda number: FOREIGN[number]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 3), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(left: Any, right: Any) -> bool:
    """Equal, and NaN is NaN."""
    return encode({"v": left}) == encode({"v": right})


@given(st.dictionaries(st.text(), PLAIN, max_size=5))
def test_json_comes_back_as_it_went_in(data: dict[str, Any]) -> None:
    assert decode(encode(data)) == data
    payload, recorded = round_trip(data)
    assert (payload, recorded) == (encode(data), data)


@settings(max_examples=300)
@given(STRANGE)
def test_anything_at_all_is_stored_and_reads_the_same_from_then_on(value: Any) -> None:
    payload, recorded = round_trip({"result": value})
    assert same(decode(payload), recorded)
    again = decode(encode(recorded))
    assert same(again, recorded)
    assert encode(again) == encode(recorded)


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (float("inf"), float("inf")),
        ("a\0b", "a\0b"),
        ("\ud800", "\ud800"),
        (10**5_000, 10**5_000),
        (b"abc", "YWJj"),
        ({"$float": "nan"}, {"$float": "nan"}),
        ([{"$float": "nan"}, b""], [{"$float": "nan"}, ""]),
        ({1: "a", "1": "b"}, {"1": "a", "1'": "b"}),
        ((1, (2,)), [1, [2]]),
        (Point(1.0, Colour.RED), {"x": 1.0, "label": "red"}),
        (HostileMapping(a=1), "{'a': 1}"),
        (Hostile(), "<Hostile>"),
    ],
    ids=list("abcdefghijkl"),
)
def test_what_json_lacks_is_kept_as_well_as_it_can_be(value: Any, kept: Any) -> None:
    assert decode(encode({"v": value}))["v"] == kept


def test_not_a_number_stays_not_a_number() -> None:
    assert math.isnan(decode(encode({"v": float("nan")}))["v"])


@pytest.mark.parametrize("depth", [100, 250, 700, 900, 5_000, 50_000])
def test_deep_nesting_is_stored_and_read_even_where_the_stack_is_high(depth: int) -> None:
    value: Any = "core"
    for _ in range(depth):
        value = [value]
    payload = encode({"v": value})

    def high(frames: int) -> Any:
        return decode(payload) if frames == 0 else high(frames - 1)

    assert "v" in decode(payload)
    assert "v" in high(300)


def test_a_circle_is_stored() -> None:
    circle: list[Any] = []
    circle.append(circle)
    assert "v" in decode(encode({"v": circle}))


@given(st.dictionaries(st.text(max_size=3), st.integers(), min_size=2, max_size=6), st.randoms())
def test_the_same_data_gives_the_same_bytes(data: dict[str, int], chance: random.Random) -> None:
    items = list(data.items())
    chance.shuffle(items)
    assert encode(dict(items)) == encode(data)
    assert canonical(dict(items)) == canonical(data)


@pytest.mark.parametrize("value", [float("nan"), b"x", {1, "a"}, object()])
def test_canonical_refuses_what_is_no_json(value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        canonical(value)


def test_long_payloads_are_compressed_and_longer_ones_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = {"v": "word " * 50_000}
    assert len(encode(data)) < 5_000
    assert decode(encode(data)) == data
    monkeypatch.setattr(journal, "PAYLOAD_BYTES_MAX", 100_000)
    with pytest.raises(TooLarge, match="a result of"):
        encode(data)
    with pytest.raises(TooLarge):
        round_trip({"v": ["\ud800"] * 100_000})


@given(st.binary(max_size=40))
def test_bytes_that_nobody_encoded_are_damage_and_nothing_else(payload: bytes) -> None:
    with contextlib.suppress(StoreDamaged):
        assert isinstance(decode(payload), dict)


@given(st.dictionaries(st.text(max_size=3), STRANGE, max_size=2), st.data())
def test_a_flipped_payload_decodes_or_is_damage(data: dict[str, Any], draw: st.DataObject) -> None:
    payload = bytearray(encode(data))
    place = draw.draw(st.integers(0, len(payload) - 1))
    payload[place] ^= draw.draw(st.integers(1, 255))
    with contextlib.suppress(StoreDamaged):
        decode(bytes(payload))


def test_a_blob_is_known_by_its_digest() -> None:
    reference = blob_reference(b"content")
    assert blob_digest(reference) == reference[1:]
    assert blob_digest(b"{}") is None
    assert is_blob_intact(reference, b"content")
    assert not is_blob_intact(reference, b"Content")


# -- chains ------------------------------------------------------------------------------------

COLUMNS = st.tuples(
    st.integers(1, 1 << 40),
    st.integers(0, (1 << 63) - 1),
    st.text(max_size=4),
    st.text(max_size=4),
    st.integers(0, 9),
    st.binary(max_size=6),
)


@given(COLUMNS, COLUMNS, st.text(max_size=4), st.text(max_size=4))
def test_two_different_entries_never_look_alike(
    one: Any, other: Any, run: str, other_run: str
) -> None:
    is_same = (one, run) == (other, other_run)
    assert (link(GENESIS, run, one) == link(GENESIS, other_run, other)) is is_same


@given(st.text(min_size=1, max_size=6), st.integers(0, 6), st.integers(0, 6), st.integers(0, 6))
def test_moving_a_letter_to_the_next_column_shows(text: str, a: int, b: int, c: int) -> None:
    def cut(first: int, second: int) -> bytes:
        first, second = sorted((first, second))
        columns = (1, 1, text[first:second], text[second:], 0, b"")
        return link(GENESIS, text[:first], columns)

    texts = {(text[: min(x, y)], text[min(x, y) : max(x, y)]) for x, y in ((a, b), (b, c))}
    assert (cut(a, b) == cut(b, c)) is (len(texts) == 1)


def a_chain(length: int = 6) -> list[Entry]:
    entries: list[Entry] = []
    digest = GENESIS
    for seq in range(1, length + 1):
        columns = (seq, 7, Kind.STEP_FINISHED.value, f"s{seq}", 1, encode({"result": seq}))
        digest = link(digest, RUN, columns)
        entries.append(Entry(RUN, *columns, digest, 99))
    return entries


def flaws(entries: list[Entry], **known: Any) -> list[tuple[int, bool]]:
    return [(flaw.seq, flaw.is_mendable) for flaw in verify(RUN, entries, **known)]


def test_a_whole_chain_has_no_flaw() -> None:
    assert flaws(a_chain()) == []
    assert flaws([]) == []


@pytest.mark.parametrize(
    "change",
    [
        {"run_id": RUN.replace("1", "2")},
        {"epoch": 6},
        {"kind": "step_skipped"},
        {"step": "S3"},
        {"attempt": 2},
        {"payload": encode({"result": 33})},
        {"payload": b""},
        {"epoch": -1},
        {"attempt": "1"},
        {"payload": None},
        {"step": "\udcff"},
    ],
    ids=str,
)
def test_a_change_in_any_column_is_found_where_it_is(change: dict[str, Any]) -> None:
    entries = a_chain()
    entries[2] = entries[2]._replace(**change)
    assert flaws(entries) == [(3, False)]


@given(st.integers(0, 5), st.integers(0, 40), st.integers(0, 7))
def test_a_flipped_bit_of_a_payload_is_found(row: int, place: int, bit: int) -> None:
    entries = a_chain()
    payload = bytearray(entries[row].payload)
    payload[place % len(payload)] ^= 1 << bit
    entries[row] = entries[row]._replace(payload=bytes(payload))
    assert flaws(entries) == [(row + 1, False)]


def test_a_flipped_digest_is_mendable_where_the_next_entry_vouches_for_it() -> None:
    entries = a_chain()
    entries[2] = entries[2]._replace(digest=bytes(32))
    assert flaws(entries) == [(3, True)]


def test_the_last_digest_is_mendable_where_a_copy_vouches_for_it() -> None:
    entries = a_chain()
    anchor = entries[-1].digest
    entries[-1] = entries[-1]._replace(digest=bytes(32))
    assert flaws(entries) == [(6, False)]
    assert flaws(entries, anchor=anchor) == [(6, True)]
    assert flaws(entries, anchor=bytes(32)) == [(6, False)]


def test_swapped_rows_are_found() -> None:
    entries = a_chain()
    entries[2], entries[3] = entries[3]._replace(seq=3), entries[2]._replace(seq=4)
    assert {seq for seq, _ in flaws(entries)} >= {3, 4}


def test_a_missing_row_takes_its_follower_with_it_and_nobody_else() -> None:
    entries = a_chain()
    del entries[2]
    assert flaws(entries) == [(3, False), (4, False)]


def test_a_missing_first_row_is_found() -> None:
    assert flaws(a_chain()[1:]) == [(1, False), (2, False)]


def test_a_row_that_is_there_twice_is_found() -> None:
    entries = a_chain()
    entries.insert(3, entries[2])
    assert flaws(entries) == [(3, False)]


def test_an_absurd_number_costs_no_memory() -> None:
    entries = a_chain()
    entries[5] = entries[5]._replace(seq=1 << 60)
    assert len(flaws(entries)) <= journal.GAP_MAX + 1


def test_rows_that_a_repair_gave_up_are_not_looked_at_again() -> None:
    entries = a_chain()
    lost = entries[2]
    entries[2] = lost._replace(payload=b"damaged")
    assert flaws(entries, known=[(3, lost.digest)]) == []
    assert flaws(entries, known=[(3, bytes(32))]) == [(3, False)]
    del entries[2]
    assert flaws(entries, known=[(3, b""), (4, entries[2].digest)]) == []


PLANTED = 'pl4nted "in\\ the/journäl'
HOLDERS: list[Any] = [
    PLANTED,
    f"x{PLANTED}y",
    {PLANTED: 1, "b": [PLANTED]},
    [PLANTED, math.nan, b"bytes", 10**1000],
    {"foreign": object, "lone": "\ud800", "text": PLANTED},
    {"bytes": f"in bytes {PLANTED}".encode()},
    "filler " * COMPRESS_BYTES_MIN + PLANTED,
    ["filler " * COMPRESS_BYTES_MIN, PLANTED, math.inf],
]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> redact.Registry:
    """Stands for what the process knows."""
    made = redact.Registry()
    monkeypatch.setattr(journal, "is_in_data", made.is_in)
    monkeypatch.setattr(journal, "redact_data", made.redact_json)
    return made


@pytest.mark.parametrize("value", HOLDERS, ids=range(len(HOLDERS)))
def test_what_a_run_brings_forth_is_recorded_and_goes_on_without_secrets(
    value: Any, registry: redact.Registry
) -> None:
    before, _ = round_trip({"result": value})
    registry.remember(PLANTED)
    payload, recorded = round_trip({"result": value})
    assert repr(decode(payload)) == repr(recorded), "a replay sees what went on"
    assert encode_clean({"result": value}) == payload
    assert "***" in repr(recorded)
    assert registry.redact(repr(recorded)) == repr(recorded)
    assert encode({"result": value}) == before, "what is compared depends on no knowledge"


def test_a_secret_at_any_depth_that_json_bears_is_found(registry: redact.Registry) -> None:
    registry.remember(PLANTED)
    value: Any = PLANTED
    for _ in range(400):
        value = [value]
    payload, recorded = round_trip({"result": value})
    assert "***" in repr(recorded)
    assert repr(decode(payload)) == repr(recorded)


def test_a_secret_of_digits_leaves_numbers_alone(registry: redact.Registry) -> None:
    registry.remember("4711004711")
    payload, recorded = round_trip({"result": [4711004711, "4711004711"]})
    assert recorded == decode(payload) == {"result": [4711004711, "***"]}

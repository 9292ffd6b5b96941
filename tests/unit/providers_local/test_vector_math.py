"""The arithmetic under every vector store, against references written the slow and obvious way."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_orchestrator import vector_math
from llm_orchestrator.errors import InputError
from llm_orchestrator.vector_math import check_filter, matches, pack, top_k, unpack

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(floats))
def test_what_is_packed_comes_back(vector: list[float]) -> None:
    assert unpack(pack(vector)) == vector
    assert len(pack(vector)) == 4 * len(vector)


@pytest.mark.parametrize("bad", [[math.nan], [math.inf], [1e300], ["a"], [None]])
def test_a_vector_that_is_not_finite_numbers_is_refused(bad: list[Any]) -> None:
    with pytest.raises(InputError):
        pack(bad)


def test_half_a_number_is_refused() -> None:
    with pytest.raises(InputError):
        unpack(b"\0\0\0")


def reference(query: Sequence[float], vectors: Sequence[Sequence[float]], k: int) -> list[int]:
    def cosine(vector: Sequence[float]) -> float:
        dot = math.fsum(a * b for a, b in zip(query, vector, strict=True))
        lengths = math.hypot(*query) * math.hypot(*vector)
        return round(dot / lengths, 9) if lengths else 0.0

    return sorted(range(len(vectors)), key=lambda index: -cosine(vectors[index]))[:k]


moderate = st.floats(width=32, min_value=-1000, max_value=1000).map(
    lambda value: value if abs(value) > 1e-3 else 0.0
)


@st.composite
def searches(draw: st.DrawFn) -> tuple[list[float], list[list[float]], int]:
    size = draw(st.integers(1, 5))
    vector = st.lists(moderate, min_size=size, max_size=size)
    vectors = draw(st.lists(vector, max_size=12))
    # Repeated vectors make ties, which must not depend on the path taken.
    vectors += draw(st.lists(st.sampled_from(vectors), max_size=4)) if vectors else []
    return draw(vector), vectors, draw(st.integers(0, 15))


@given(searches())
def test_both_paths_give_the_order_of_the_reference(
    search: tuple[list[float], list[list[float]], int],
) -> None:
    query, vectors, k = search
    blobs = [pack(vector) for vector in vectors]
    with_numpy = top_k(query, blobs, k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "numpy", None)
        plain = top_k(query, blobs, k)
    assert [index for index, _ in with_numpy] == [index for index, _ in plain]
    assert [score for _, score in with_numpy] == pytest.approx([score for _, score in plain])
    assert [index for index, _ in plain] == reference(query, vectors, k)


@pytest.mark.parametrize("has_numpy", [True, False])
def test_vectors_of_one_direction_are_a_tie_whatever_their_length(
    has_numpy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_numpy:
        monkeypatch.setitem(sys.modules, "numpy", None)
    blobs = [pack([1.0 * times, 2.0 * times, 7.0 * times]) for times in range(1, 200)]
    found = top_k([3.0, 6.0, 21.0], blobs, 199)
    assert found == [(index, 1.0) for index in range(199)]


def test_numpy_is_really_used_when_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numpy")

    def refuse(*args: object) -> list[float]:
        raise AssertionError(f"the slow path was taken for {args}")

    monkeypatch.setattr(vector_math, "_cosines_plain", refuse)
    assert top_k([1.0, 0.0], [pack([0.0, 1.0]), pack([2.0, 0.0])], 1) == [(1, 1.0)]


def test_more_vectors_than_one_block_are_all_searched() -> None:
    blobs = [pack([1.0, 0.1])] * 10_000
    blobs[9_000] = pack([1.0, 2.0])
    blobs[9_999] = pack([1.0, 3.0])
    assert [index for index, _ in top_k([0.0, 1.0], blobs, 4)] == [9_999, 9_000, 0, 1]


def test_another_dimension_is_refused_with_a_hint() -> None:
    with pytest.raises(InputError, match="query has 2 dimensions, a stored vector 3") as caught:
        top_k([1.0, 2.0], [pack([1.0, 2.0, 3.0])], 1)
    assert "embedding model" in str(caught.value.hint)


BOOK = {"lang": "en", "year": 2020, "tags": ["sea", "whale"], "in_print": True, "by": {"name": "H"}}


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [
        (None, True),
        ({}, True),
        ({"lang": "en"}, True),
        ({"lang": "de"}, False),
        ({"lang": "en", "year": 2021}, False),
        ({"year": 2020.0}, True),
        ({"in_print": True}, True),
        ({"in_print": 1}, False),
        ({"tags": "whale"}, True),
        ({"tags": ["sea", "whale"]}, True),
        ({"tags": "ship"}, False),
        ({"by.name": "H"}, True),
        ({"by": {"$exists": True}}, True),
        ({"price": {"$exists": False}}, True),
        ({"price": None}, False),
        ({"price": {"$ne": 3}}, True),
        ({"price": {"$nin": [3]}}, True),
        ({"price": {"$lt": 3}}, False),
        ({"year": {"$gte": 2020, "$lt": 2021}}, True),
        ({"year": {"$gt": 2020}}, False),
        ({"year": {"$lte": 2020}}, True),
        ({"year": {"$gt": "2019"}}, False),
        ({"in_print": {"$gt": 0}}, False),
        ({"lang": {"$in": ["de", "en"]}}, True),
        ({"lang": {"$in": []}}, False),
        ({"lang": {"$nin": ["de"]}}, True),
        ({"lang": {"$eq": "en"}}, True),
        ({"lang": {"$ne": "en"}}, False),
        ({"$or": [{"lang": "de"}, {"year": {"$gt": 2000}}]}, True),
        ({"$and": [{"lang": "en"}, {"$or": [{"year": 1}, {"year": 2}]}]}, False),
    ],
)
def test_a_filter_means_what_it_says(wanted: Any, fits: bool) -> None:
    assert matches(wanted, BOOK) is fits


@pytest.mark.parametrize(
    "wrong",
    [
        {"lang": {"$like": "e%"}},
        {"lang": {}},
        {"lang": {"nested": 1}},
        {"$not": [{"a": 1}]},
        {"$and": {}},
        {"$or": []},
        {"$or": ["a"]},
        {"year": {"$in": 2020}},
        ["lang"],
    ],
)
def test_a_filter_of_the_wrong_shape_is_refused_even_where_nothing_is_kept(wrong: Any) -> None:
    with pytest.raises(InputError):
        check_filter(wrong)
    with pytest.raises(InputError):
        matches(wrong, {})


scalars = st.one_of(st.integers(-3, 3), st.sampled_from(["a", "b"]), st.booleans(), st.none())


@given(st.dictionaries(st.sampled_from("xy"), scalars), st.sampled_from("xy"), scalars)
def test_each_operator_and_its_opposite_share_everything(
    metadata: dict[str, Any], key: str, value: Any
) -> None:
    assert matches({key: {"$eq": value}}, metadata) is not matches({key: {"$ne": value}}, metadata)
    assert matches({key: {"$in": [value]}}, metadata) is matches({key: value}, metadata)
    assert matches({key: {"$nin": [value]}}, metadata) is matches({key: {"$ne": value}}, metadata)
    either = matches({"$or": [{key: {"$lt": value}}, {key: {"$gte": value}}]}, metadata)
    if not isinstance(value, bool | None) and type(metadata.get(key)) is type(value):
        assert either

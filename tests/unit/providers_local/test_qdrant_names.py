"""What a point in Qdrant is called."""

from __future__ import annotations

import uuid

from hypothesis import given
from hypothesis import strategies as st

from llm_orchestrator.providers.vectors_qdrant import point_id

names = st.text(max_size=8)


@given(names, names)
def test_a_point_is_named_by_a_uuid_that_never_changes(namespace: str, item: str) -> None:
    assert str(uuid.UUID(point_id(namespace, item))) == point_id(namespace, item)


@given(names, names, names, names)
def test_two_items_never_share_a_point(a: str, b: str, c: str, d: str) -> None:
    assert ((a, b) == (c, d)) is (point_id(a, b) == point_id(c, d))

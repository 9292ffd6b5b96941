from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_orchestrator.providers.sse import Event, SseParser


def parse(*chunks: bytes) -> list[Event]:
    parser = SseParser()
    return [event for chunk in chunks for event in parser.feed(chunk)]


def test_data_lines_of_one_event_are_joined_by_newlines() -> None:
    (event,) = parse(b"event: add\nid: 7\ndata: one\ndata:two\n\n")
    assert event[:3] == ("one\ntwo", "add", "7")


def test_comments_and_unknown_fields_are_ignored_and_empty_events_are_none() -> None:
    assert [e.data for e in parse(b": ping\n\nfoo: bar\n\nretry: 1\ndata: x\n\n\n\n")] == ["x"]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_all_three_line_ends_are_understood(end: bytes) -> None:
    text = end.join([b"data: a", b"data: b", b"", b"data: c", b"", b""])
    assert [e.data for e in parse(text + b"\n")] == ["a\nb", "c"]


def test_an_event_that_was_not_finished_is_dropped() -> None:
    assert [e.data for e in parse(b"data: whole\n\ndata: half\n")] == ["whole"]


def test_a_byte_order_mark_at_the_start_is_skipped() -> None:
    assert [e.data for e in parse(b"\xef\xbb\xbfdata: x\n\n")] == ["x"]


def test_the_name_of_one_event_does_not_stick_to_the_next() -> None:
    assert [e.name for e in parse(b"event: a\ndata: 1\n\ndata: 2\n\n")] == ["a", ""]


def test_end_is_where_the_stream_can_be_asked_to_go_on() -> None:
    text = b"data: \xc3\xa9\r\n\r\ndata: 2\r\n\r\n"
    first, second = parse(text[:9], text[9:])
    assert text[first.end :] == b"data: 2\r\n\r\n"
    assert second.end == len(text)


TEXTS = st.lists(
    st.text(st.characters(exclude_characters="\r\n\0", exclude_categories=["Cs"]), min_size=1),
    min_size=1,
    max_size=8,
)


@given(TEXTS, st.sampled_from(["\n", "\r\n", "\r"]), st.data())
def test_events_do_not_depend_on_how_the_bytes_were_cut(
    texts: list[str], end: str, data: st.DataObject
) -> None:
    text = "".join(f"id: {n}{end}data: {t}{end}{end}" for n, t in enumerate(texts)) + ":\n"
    raw = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=12)))
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    assert parse(*pieces) == parse(raw)
    assert [event.data for event in parse(*pieces)] == texts

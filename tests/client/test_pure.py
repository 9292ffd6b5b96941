"""What the client decides without a network: whom to ask, how long, what events add up to."""

import importlib.util
from pathlib import Path

import pytest

from llm_orchestrator.client.endpoints import PAUSE_S_MAX, Endpoints, Patience
from llm_orchestrator.client.events import Event, Held, Parser

ROOT = Path(__file__).resolve().parents[2]


def test_one_that_failed_is_asked_last_and_one_that_answers_stays_first() -> None:
    endpoints = Endpoints(["http://a/", "http://b", "http://c"])
    assert endpoints.current == "http://a"
    endpoints.failed("http://a", "refused")
    assert endpoints.current == "http://b"
    endpoints.worked("http://b")
    assert endpoints.current == "http://b"
    endpoints.failed("http://b", "HTTP 503")
    endpoints.failed("http://c", "HTTP 503")
    assert endpoints.current == "http://a"
    assert list(endpoints.troubles) == ["http://a", "http://b", "http://c"]


def test_patience_grows_is_bounded_and_ends() -> None:
    patience, now, pauses = Patience(10.0, 100.0), 100.0, []
    while (pause_s := patience.pause_s(now)) is not None:
        pauses.append(pause_s)
        now += pause_s
    assert pauses[:3] == [0.1, 0.2, 0.4]
    assert max(pauses) == PAUSE_S_MAX
    assert now == pytest.approx(110.0)


def test_the_servers_word_is_heeded_but_never_for_long() -> None:
    assert Patience(60.0, 0.0).pause_s(0.0, 1.0) == 1.0
    assert Patience(60.0, 0.0).pause_s(0.0, 600.0) == PAUSE_S_MAX


def events_of(text: str) -> list[Event]:
    parser = Parser()
    return [event for line in text.split("\n") for event in parser.feed(line)]


def test_events_are_parsed_as_the_standard_says() -> None:
    text = (
        ': hello\nid: 3\nevent: chunk\ndata: {"a":\ndata: 1}\n\nretry: 5\n\ndata: plain\n\nid: 4\n'
    )
    assert events_of(text) == [Event("3", "chunk", {"a": 1}), Event("3", "message", "plain")]


def test_resets_void_what_came_before_them() -> None:
    held = Held()
    for kind, offset, text in (
        ("chunk", 0, "one "),
        ("chunk", 4, "two "),
        ("reset", 4, ""),
        ("chunk", 4, "2"),
        ("end", 0, "x"),
    ):
        held.apply(Event("1", kind, {"step": "s", "attempt": 1, "offset": offset, "text": text}))
    assert held.text == {"s": "one 2"}


def test_the_blocking_client_is_written_from_the_other_one() -> None:
    spec = importlib.util.spec_from_file_location("unasync", ROOT / "scripts" / "unasync.py")
    assert spec is not None
    assert spec.loader is not None
    unasync = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unasync)
    source = (unasync.PLACE / "asynchronous.py").read_text()
    assert (unasync.PLACE / "sync.py").read_text() == unasync.sync_source(source), "make docs"

"""Log lines: JSON that says where in the work it was written, and text for people."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_orchestrator import Context, Orchestrator, step, workflow
from llm_orchestrator.cli.main import Flags
from llm_orchestrator.cli.session import Session
from llm_orchestrator.config import Config
from llm_orchestrator.telemetry import here, logs

CLIENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
log = logging.getLogger("author")


class Log:
    """A JSON log in memory."""

    def __init__(self, **how: Any) -> None:
        self.stream = io.StringIO()
        self.handler = logging.StreamHandler(self.stream)
        self.handler.setFormatter(logs.json_formatter(**how))

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]

    @property
    def last(self) -> dict[str, Any]:
        return self.lines[-1]


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """The process's logging, and where this task is, are left as they were."""
    root, own = logging.getLogger(), logging.getLogger("llm_orchestrator")
    kept = root.handlers[:], root.level, own.level, logging.getLogger("asyncio").level
    here.bound.set(None)
    yield
    root.handlers[:], root.level, own.level, _ = kept
    logging.getLogger("asyncio").setLevel(kept[3])
    logging.captureWarnings(capture=False)
    here.bound.set(None)


def record(message: str, *args: Any, name: str = "author", **more: Any) -> logging.LogRecord:
    fields = {"level": logging.INFO, "fn": "f", "lno": 1, "exc_info": None, **more}
    return log.makeRecord(name, msg=message, args=args, **fields)


def rendered(made: logging.LogRecord, **how: Any) -> dict[str, Any]:
    """One line, parsed; fails when it is more than one."""
    text = logs.json_formatter(**how).format(made)
    assert "\n" not in text
    found: dict[str, Any] = json.loads(text)
    return found


def test_a_line_says_when_in_utc_with_microseconds_and_what() -> None:
    made = record("%s of %d", "one\ntwo", 3)
    made.created = 1_800_000_000.000123
    assert rendered(made) == {
        "ts": "2027-01-15T08:00:00.000123Z",
        "level": "info",
        "event": "one\ntwo of 3",
        "logger": "author",
    }


def test_a_line_of_an_attempt_says_which() -> None:
    here.enter_run(here.Stay("run-1", 7, "node-1", CLIENT))
    here.enter_step("map/3/ask", 2)
    line = rendered(record("x"))
    assert {key: line[key] for key in line if key not in ("ts", "level", "event", "logger")} == {
        "run_id": "run-1",
        "step": "map/3/ask",
        "attempt": 2,
        "node": "node-1",
        "epoch": 7,
        "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
    }


def test_the_trace_of_a_run_that_came_without_one_follows_from_its_id() -> None:
    ids = {here.trace_id_of(here.Stay(run_id, epoch)) for run_id in "ab" for epoch in (1, 2)}
    assert len(ids) == 2
    assert {len(each) for each in ids} == {32}


def test_the_stores_lines_are_no_runs() -> None:
    here.enter_run(here.Stay("run-1", 7, "node-1"))
    assert "run_id" not in rendered(record("x", name="llm_orchestrator.store.writer"))
    assert "run_id" in rendered(record("x", name="llm_orchestrator.engine.driver"))


def test_what_a_server_is_called_stands_in_each_line_from_when_it_is_known() -> None:
    known: dict[str, str] = {}
    formatter = logs.json_formatter(known)
    assert "node" not in json.loads(formatter.format(record("x")))
    known["node"] = "node-1"
    assert json.loads(formatter.format(record("x")))["node"] == "node-1"


def test_an_exception_is_a_field_with_its_causes_and_no_values_of_variables() -> None:
    def breaks(password: str) -> None:
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise ValueError("outer") from error

    try:
        breaks("hunter2")
    except ValueError:
        line = rendered(record("it broke", exc_info=sys.exc_info()))
    outer, inner = line["exception"]
    assert (outer["exc_type"], outer["exc_value"]) == ("ValueError", "outer")
    assert outer["frames"][-1]["name"] == "breaks"
    assert (inner["exc_type"], inner["is_cause"]) == ("KeyError", True)
    assert "hunter2" not in json.dumps(line)
    assert line["event"] == "it broke"


def test_what_a_caller_adds_stands_beside_our_fields_and_takes_no_place() -> None:
    here.enter_run(here.Stay("run-1"))
    line = rendered(record("x", extra={"whale": 3, "thing": object(), "run_id": "mine"}))
    assert (line["whale"], line["run_id"]) == (3, "run-1")
    assert line["thing"].startswith("<object")


def test_secrets_are_taken_out_of_every_part_of_a_line() -> None:
    try:
        raise ValueError('the key is "hush"')
    except ValueError:
        made = record(
            "%s",
            'say "hush"',
            exc_info=sys.exc_info(),
            extra={"deep": {"hush": ["hush", 1, None]}, "odd": Path("/hush")},
        )
    line = rendered(made, redact=lambda text: text.replace('"hush"', "***").replace("hush", "***"))
    assert "hush" not in json.dumps(line)
    assert line["event"] == "say ***"
    assert line["deep"] == {"***": ["***", 1, None]}


def test_every_field_of_ours_is_documented() -> None:
    class Recorded:
        trace_id, span_id, traceparent = "1", "2", "3"

        def asked(self, *_: Any, **__: Any) -> None: ...

    here.enter_run(here.Stay("run-1", 7, "node-1"))
    here.enter_step("a", 1, Recorded())
    line = rendered(record("x", exc_info=(ValueError, ValueError("x"), None)))
    assert set(line) == set(logs.FIELDS)


# -- in the engine -----------------------------------------------------------------------------


@step
async def speaks(number: int) -> int:
    log.warning("step %d", number)
    return number


@step
def in_a_thread(number: int) -> int:
    log.warning("thread %d", number)
    return number


@workflow
async def talks(ctx: Context, number: int) -> None:
    log.warning("flow %d", number)
    await ctx.gather(ctx.step(speaks, number), ctx.step(in_a_thread, number))
    log.warning("flow %d", number)


async def test_each_runs_lines_carry_its_own_place(tmp_path: Path) -> None:
    heard = Log()
    log.addHandler(heard.handler)
    try:
        async with Orchestrator(f"sqlite:///{tmp_path}/a.db") as engine:
            ids = [await engine.start(talks, {"number": number}) for number in range(20)]
            await asyncio.gather(*(engine.result(run_id) for run_id in ids))
            node = engine.node.node_id
    finally:
        log.removeHandler(heard.handler)
    assert len(heard.lines) == 80
    for line in heard.lines:
        kind, number = line["event"].split()
        assert line["run_id"] == ids[int(number)]
        assert line["node"] == node
        assert line["epoch"] & 0xFFFFFFFF == 1
        assert line.get("step") == {"step": "speaks", "thread": "in_a_thread"}.get(kind)
    assert here.current() is None


# -- how a command sets it up ------------------------------------------------------------------


class Terminal(io.StringIO):
    """A stderr that is one, or not."""

    def __init__(self, *, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


def said(
    monkeypatch: pytest.MonkeyPatch,
    flags: Flags,
    *,
    serving: Config | None = None,
    is_terminal: bool = False,
) -> str:
    """What stands on stderr when a verb notes, warns and logs."""
    terminal = Terminal(is_terminal=is_terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    session = Session(flags)

    async def verb() -> None:
        session.note("a note")
        session.warn("a doubt")
        logging.getLogger("llm_orchestrator.x").info("our info")
        logging.getLogger("author").info("their info")
        logging.getLogger("author").warning("their warning")

    session.run(verb(), serving=serving)
    return terminal.getvalue()


TEXT = "a note\nwarning: a doubt\nwarning: their warning\n"


def events(text: str) -> list[str]:
    return [json.loads(line)["event"] for line in text.splitlines()]


def test_a_server_logs_json_when_nobody_reads_along(monkeypatch: pytest.MonkeyPatch) -> None:
    text = said(monkeypatch, Flags(), serving=Config())
    assert events(text) == ["a note", "a doubt", "our info", "their warning"]
    assert said(monkeypatch, Flags(), serving=Config(), is_terminal=True) == TEXT


@pytest.mark.parametrize("is_terminal", [False, True])
def test_the_setting_overrides(monkeypatch: pytest.MonkeyPatch, *, is_terminal: bool) -> None:
    config = Config(log_format="text")
    assert said(monkeypatch, Flags(), serving=config, is_terminal=is_terminal) == TEXT
    config = Config(log_format="json")
    assert events(said(monkeypatch, Flags(), serving=config, is_terminal=is_terminal))


def test_other_verbs_speak_to_people(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(monkeypatch, Flags()) == TEXT


@pytest.mark.parametrize(
    ("level", "heard"),
    [
        ("debug", ["a note", "a doubt", "our info", "their info", "their warning"]),
        ("info", ["a note", "a doubt", "our info", "their info", "their warning"]),
        ("warning", ["a doubt", "their warning"]),
        ("error", []),
    ],
)
def test_the_level_is_the_configured_one(
    monkeypatch: pytest.MonkeyPatch, level: str, heard: list[str]
) -> None:
    assert events(said(monkeypatch, Flags(), serving=Config(log_level=level))) == heard


def test_quiet_and_debug_have_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet, debug = Flags(is_quiet=True), Flags(is_debug=True)
    assert said(monkeypatch, quiet, serving=Config(log_level="info")) == ""
    assert "their info" in said(monkeypatch, debug, serving=Config(log_level="error"))


def test_a_thread_of_its_own_is_nowhere() -> None:
    here.enter_run(here.Stay("run-1"))
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(logs.where("author")))
    thread.start()
    thread.join()
    assert found == [{}]

"""What goes to stdout can be read by its reader: people, or programs."""

from __future__ import annotations

import json

import pytest
from ruamel.yaml import YAML

from llm_orchestrator.cli.output import (
    dollars,
    duration,
    emit,
    print_rows,
    to_json,
    to_yaml,
)
from llm_orchestrator.cli.report import printable, report
from llm_orchestrator.cli.runs_look import LIST_COLUMNS
from llm_orchestrator.errors import (
    DefinitionError,
    NotFound,
    OrchestratorError,
    Problem,
    RunFailed,
    StoreLocked,
)
from llm_orchestrator.model import stamp

ID = "01920000-0000-7000-8000-000000000001"
ROWS = [{"run_id": ID, "workflow": "w" * 200, "state": "running", "labels": {"team": "a"}}]


@pytest.mark.parametrize("kind", ["table", "json", "jsonl", "yaml", "ids"])
def test_an_id_is_never_cut(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(ROWS, kind, columns=LIST_COLUMNS)
    assert ID in capsys.readouterr().out


def test_a_long_note_is_cut_but_not_the_id_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"note": "x" * 200}, {"note": f"{'child of a long-winded parent ' * 3}{ID}"}]
    print_rows(rows, "table", columns=("note",), key="note")
    out = capsys.readouterr().out
    assert "x" * 100 not in out
    assert ID in out


def test_ids_are_one_a_line_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(ROWS * 2, "ids", columns=LIST_COLUMNS)
    assert capsys.readouterr().out == f"{ID}\n{ID}\n"


def test_each_json_line_is_one_thing(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(ROWS * 2, "jsonl", columns=LIST_COLUMNS)
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["run_id"] for line in lines] == [ID, ID]


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, None, True, "ü"], "z": {}, "b": []},
        float("nan"),
        [float("inf"), -float("inf")],
        "half a pair \ud83d",
        {"": "empty key"},
        "line\nbreak\ttab \x00 null",
    ],
)
def test_json_and_yaml_can_be_read_back(value: object) -> None:
    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is no JSON")

    read = json.loads(to_json(value), parse_constant=refuse)
    if "\ud83d" not in str(value):
        assert YAML(typ="safe", pure=True).load(to_yaml(value)) == read


def test_what_the_terminal_cannot_say_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    emit("half \ud83d")
    assert capsys.readouterr().out == "half \\ud83d\n"


def test_a_model_answer_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows([{"run_id": ID, "state": "\x1b[2Jgone\r"}], "table", columns=("run_id", "state"))
    assert "\x1b" not in capsys.readouterr().out
    assert "\x1b" not in printable("\x1b]0;title\x07")


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [(None, "-"), (0, "0 ms"), (999, "999 ms"), (1500, "1.5 s"), (61_000, "1m01s"),
     (3_661_000, "1h01m01s")],
)  # fmt: skip
def test_times_are_for_people(milliseconds: float | None, text: str) -> None:
    assert duration(milliseconds) == text


def test_a_fraction_of_a_cent_is_not_nothing() -> None:
    assert dollars(0) == "-"
    assert dollars(0.00000123) == "$1.2e-06"
    assert dollars(1.5) == "$1.5000"


def test_a_moment_beyond_the_calendar_is_none() -> None:
    assert stamp(1 << 62) is None
    assert stamp(None) is None
    assert stamp(1_000_000) == "1970-01-01T00:00:01.000Z"


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (NotFound("no run x", hint="llmo runs list"), 4,
         ["error: no run x", "hint: llmo runs list"]),
        (StoreLocked("taken"), 11, ["error: taken"]),
        (DefinitionError([Problem("a.yaml", 3, 5, "bad"), Problem("a.yaml", 4, 1, "worse")]), 2,
         ["a.yaml:3:5: bad", "a.yaml:4:1: worse"]),
        (RunFailed("run ended", state="failed", error={"hint": "export K=..."}, hint="explain"), 9,
         ["error: run ended", "hint: export K=...", "hint: explain"]),
        (ZeroDivisionError("oh"), 1, ["error: internal error: ZeroDivisionError: oh",
         "hint: run it again with --debug, and report what it prints"]),
        (OrchestratorError("plain"), 1, ["error: plain"]),
        (PermissionError(13, "Permission denied", "f"), 1, ["error: Permission denied: f"]),
    ],
)  # fmt: skip
def test_an_error_says_what_and_what_next_and_has_its_code(
    error: Exception, code: int, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(error) == code
    captured = capsys.readouterr()
    assert captured.err.splitlines() == lines
    assert captured.out == ""


def test_a_traceback_comes_only_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ValueError("deep")
    except ValueError as error:
        report(error)
        assert "Traceback" not in capsys.readouterr().err
        report(error, is_debug=True)
    assert "Traceback" in capsys.readouterr().err

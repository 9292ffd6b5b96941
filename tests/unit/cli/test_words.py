"""The words before, after and around a verb."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from llm_orchestrator.cli.completions import bash, fish, words_of_all
from llm_orchestrator.cli.given import guess, merge_inputs, read_ids, read_json, read_pairs
from llm_orchestrator.cli.main import VERBS, BadUsage, Flags, command_of, main, take_flags
from llm_orchestrator.cli.target import is_file, is_python, load_module, of_python
from llm_orchestrator.errors import DefinitionError, InputError, NotFound


@pytest.mark.parametrize(
    "words",
    [
        ["--store", "s", "--debug", "runs", "list", "-o", "ids"],
        ["runs", "--store=s", "list", "--debug", "-o", "ids"],
        ["runs", "list", "-o", "ids", "--debug", "--store", "s"],
    ],
)
def test_global_flags_stand_before_or_after_the_verb(words: list[str]) -> None:
    assert take_flags(words) == (Flags(store="s", is_debug=True), ["runs", "list", "-o", "ids"])


def test_after_two_dashes_nothing_is_a_flag() -> None:
    assert take_flags(["run", "--", "--debug"]) == (Flags(), ["run", "--", "--debug"])


@pytest.mark.parametrize("words", [["--store"], ["--data="], ["runs", "--store", ""]])
def test_a_flag_without_its_value_is_refused(words: list[str]) -> None:
    with pytest.raises(BadUsage, match="needs a value"):
        take_flags(words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rnu"], "did you mean run?"),
        (["--vresion"], "did you mean --version?"),
        (["runs", "shwo", "x"], "show"),
        (["runs", "list", "--stat", "x"], "--state"),
        (["runs", "list", "--state", "runing"], "running"),
        (["validate"], "FILE"),
        (["run", "x.yaml", "--wait", "--detach"], "contradict"),
        (["runs", "resume", "x", "--as", "retry"], "belong together"),
        (["runs", "rewind", "x"], "RUN:SEQ"),
        (["journal", "verify"], "--all"),
    ],
)
def test_a_mistyped_word_is_a_usage_error_that_names_the_right_one(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.startswith("error: ")
    assert "hint: llmo" in captured.err
    assert captured.out == ""


def test_help_names_every_verb_and_every_verb_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for verb in VERBS:
        assert f"\n  {verb} " in shown
        assert main([verb, "--help"]) == 0
        assert "Usage: llmo " + verb in capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_and_command_says_what_it_does(verb: str) -> None:
    command = command_of(verb)
    for name, child in {verb: command, **getattr(command, "commands", {})}.items():
        assert child.help, name
        for item in child.params:
            assert getattr(item, "help", "x"), f"{verb} {name} {item.name}"


def test_inputs_merge_and_the_workflow_decides_what_a_text_is() -> None:
    kinds = {"version": "string", "count": "integer"}
    pairs = ["version=1.0", "count=3", "free=[1]", "text=a=b"]
    assert merge_inputs('{"count": 1, "x": null}', pairs, kinds) == {
        "count": 3, "x": None, "version": "1.0", "free": [1], "text": "a=b",
    }  # fmt: skip


def test_json_comes_from_the_option_a_file_or_stdin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "in.json"
    file.write_text('{"a": 1}')
    monkeypatch.setattr("sys.stdin", io.StringIO("[2]"))
    assert read_json('"x"', "-i") == "x"
    assert read_json(f"@{file}", "-i") == {"a": 1}
    assert read_json("-", "-i") == [2]


@pytest.mark.parametrize("text", ["{x", "@/nowhere/at/all", "[" * 100_000])
def test_bad_json_is_an_input_error(text: str) -> None:
    with pytest.raises(InputError):
        read_json(text, "-i")


def test_inputs_must_be_an_object() -> None:
    with pytest.raises(InputError, match="not a list"):
        merge_inputs("[1]", [])
    with pytest.raises(InputError, match="name=value"):
        read_pairs(["x"], "--input")


def test_a_guess_is_json_or_the_text_itself() -> None:
    assert guess("true") is True
    assert guess("yes") == "yes"
    assert guess("1", "string") == "1"


def test_ids_come_from_words_and_stdin_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("b c\na\n"))
    assert read_ids(["a", "-", "d", "a"]) == ["a", "b", "c", "d"]


def test_a_target_is_told_apart_by_its_form() -> None:
    assert is_file("x/y.yaml")
    assert is_file("Y.JSON")
    assert is_python("a.b:c")
    assert is_python("a.py")
    assert is_python("x/a.py:c")
    assert not is_python("name")
    assert not is_python("name@1.0")


def test_a_mistake_in_python_code_is_shown_with_its_place(tmp_path: Path) -> None:
    bad = tmp_path / "bad_syntax_of_a_test.py"
    bad.write_text("x = 1\ndef f(:\n")
    with pytest.raises(DefinitionError, match=r"bad_syntax_of_a_test\.py:2:\d+: "):
        load_module(str(bad))
    raising = tmp_path / "raising_in_a_test.py"
    raising.write_text("x = 1\n\nraise ValueError('no')\n")
    with pytest.raises(DefinitionError, match=r"raising_in_a_test\.py:3:1: ValueError: no"):
        load_module(str(raising))
    with pytest.raises(NotFound):
        load_module("no_such_module_at_all")
    with pytest.raises(NotFound):
        of_python(str(tmp_path / "none.py"))


def test_completions_know_every_verb_and_option() -> None:
    words = words_of_all()
    assert set(VERBS) <= set(words)
    assert "--state" in words["runs list"][0]
    assert words["runs show"][1]
    assert not words["runs list"][1]
    for script in (bash(words), fish(words)):
        assert "--idempotency-key" in script or "idempotency-key" in script
        assert "runs list -o ids" in script

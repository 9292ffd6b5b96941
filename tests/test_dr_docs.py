"""The pages that somebody reads at 03:00: their numbers, commands, links and length."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from llm_orchestrator.cli.main import VERBS, command_of
from llm_orchestrator.drill.report import read
from llm_orchestrator.drill.scenario import load_all

ROOT = Path(__file__).parents[1]
PLACE = ROOT / "docs" / "disaster_recovery"
PAGES = ("README.md", "DR_RUNBOOK.md", "DR_PROCEDURES.md")
_SPEC = importlib.util.spec_from_file_location("rd", ROOT / "scripts" / "recovery_docs.py")
assert _SPEC is not None
assert _SPEC.loader is not None
recovery_docs = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(recovery_docs)


@pytest.mark.parametrize("name", PAGES)
def test_no_number_differs_from_the_stored_drills(name: str) -> None:
    text = (PLACE / name).read_text()
    assert "<!-- generated: " in text
    assert recovery_docs.filled(text, read(PLACE / "results", "").results) == text, "make docs"


def test_the_runbook_is_short() -> None:
    assert len((PLACE / "DR_RUNBOOK.md").read_text().splitlines()) <= 240


def test_every_scenario_has_a_row_with_its_procedure() -> None:
    page = (PLACE / "DR_PROCEDURES.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*)$", page, flags=re.MULTILINE))
    assert set(load_all()) <= set(rows)
    headless = [name for name in load_all() if rows[name].split(" | ")[1] == "-"]
    assert not headless, "no section's `Drills:` names them"


def test_every_drill_that_a_section_names_exists_or_is_said_to_be_missing() -> None:
    page = (PLACE / "DR_PROCEDURES.md").read_text()
    lists = " ".join(re.findall(r"Drills?: (.*?)\.\n", page, re.DOTALL))
    named = set(re.findall(r"`(\w+)`", lists))
    missing = set(
        re.findall(r"^- `(\w+)`$", page.partition("## Not drilled yet")[2], flags=re.MULTILINE)
    )
    assert named - set(load_all()) == missing


def commands() -> list[tuple[str, str]]:
    found = []
    for name in PAGES:
        for block in re.findall(
            r"```(?:ba)?sh[^\n]*\n(.*?)```", (PLACE / name).read_text(), re.DOTALL
        ):
            for line in block.splitlines():
                words = line.split("#")[0].strip()
                if words.startswith("llmo "):
                    found.append((name, words))
    return found


@pytest.mark.parametrize(("page", "line"), commands())
def test_every_command_is_one_that_there_is(page: str, line: str) -> None:
    verb, *words = shlex.split(line)[1:]
    assert verb in VERBS, f"{page}: {line}"
    command = command_of(verb)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        name = words.pop(0)
        assert name in command.commands, f"{page}: {line}: there is no {name}"
        command = command.commands[name]
    options = {flag for each in command.params for flag in (*each.opts, *each.secondary_opts)}
    wrong = [word for word in words if word.startswith("--") and word.split("=")[0] not in options]
    assert not wrong, f"{page}: {line}"

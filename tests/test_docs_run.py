"""What README, runbook and procedures tell an operator to type is typed, on a node that serves.

Blocks marked `run` are one script for each page. A command that stands inside a sentence is run by
itself, and has to end as it should; one that is not run has its reason in `NOT_HERE`. What the
pages leave to the reader (`$RUN`, `NODE`) is filled in here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_docs import ROOT, WITH_A_NODE, blocks_of, run_bash

RUNBOOK, RECOVERY, README = WITH_A_NODE
PROCEDURES = "docs/disaster_recovery/DR_PROCEDURES.md"
LIMIT_S = 280
pytestmark = pytest.mark.timeout(LIMIT_S + 60)

PARKED = """\
name: parked
version: "VERSION"
steps:
  - {id: say, type: llm, provider: echo, model: echo, prompt: "VERSION"}
  - {id: go, type: wait, signal: go, depends_on: say}
"""
FAILING = """\
name: failing
steps: [{id: never, type: transform, expression: "1 / 0"}]
"""
_TIDY = "trap 'kill $(jobs -p) 2> /dev/null && wait || true' EXIT\n"
_SERVE = """\
llmo serve --port 0 2> serve.log &
until grep -q 'is served by' serve.log; do :; done
URL=$(grep -om1 'http://[0-9.:]*' serve.log)
NODE=$(llmo nodes list -o ids)
"""
_PARK = """\
RUN=$(llmo run parked1.yaml --detach)
until llmo runs show $RUN | grep -q 'state: *waiting'; do :; done
"""
_MOMENT = """\
llmo backup create --prove
WHEN=$(date -u +%FT%T.%6NZ)
LATER=$(llmo run parked1.yaml --detach)
"""
_BEGIN = {
    README: "",
    RECOVERY: _SERVE + _PARK,
    RUNBOOK: 'echo "archive_place = \\"$PWD/archive\\"" > llm-orchestrator.toml\n'
    + _SERVE
    + _PARK
    + _MOMENT,
}
_END = {
    README: 'test "$(llmo runs list -o ids | wc -l)" = 1\n',
    RECOVERY: "llmo runs show $RUN\n",
    RUNBOOK: "llmo runs show $RUN\nllmo runs show $LATER\n",
}


def script_of(page: str) -> str:
    """The blocks of a page that are marked `run`, one after the other."""
    return as_promised("".join(block.text for block in blocks_of(ROOT / page) if block.is_run))


def as_promised(text: str) -> str:
    """A command whose remark says `# exit N` fails unless it ends so."""
    ending = r"^(llmo [^#\n]*?)\s+#\s*exit (\d+)\b.*$"
    return re.sub(ending, r"ended=0; \1 || ended=$?; test $ended = \2", text, flags=re.MULTILINE)


def run_script(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A script of bash that stops at the first failure; nothing that it started stays behind."""
    python = os.pathsep.join(filter(None, sys.path))
    return run_bash(_TIDY + script, folder, limit_s=LIMIT_S, flags="-xeuo", PYTHONPATH=python)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the commands are typed: the README's first workflow, one that waits, one that fails."""
    first = next(block for block in blocks_of(ROOT / README) if block.language == "yaml")
    (tmp_path / "hello.yaml").write_text(first.text)
    (tmp_path / "failing.yaml").write_text(FAILING)
    for version in "12":
        (tmp_path / f"parked{version}.yaml").write_text(PARKED.replace("VERSION", version))
    return tmp_path


@pytest.mark.parametrize("page", WITH_A_NODE)
def test_what_the_blocks_of_a_page_say_works(page: str, folder: Path) -> None:
    script = script_of(page)
    assert script.count("llmo ") >= 3
    done = run_script(_BEGIN[page] + script + _END[page], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert page != RUNBOOK or re.search(r"^200$", done.stdout, re.MULTILINE)


def test_a_remark_about_the_exit_code_is_held_against_the_command(folder: Path) -> None:
    wrong = as_promised("llmo validate hello.yaml    # exit 6: never\n")
    right = as_promised("llmo runs show nothing    # exit 10: no store yet\n")
    assert run_script(wrong, folder).returncode != 0
    assert run_script(right, folder).returncode == 0


# -- commands inside a sentence -------------------------------------------------------------------

NOT_HERE = {
    "llmo serve": "the node that all others are run against is one; it would not end",
    "llmo backup schedule install": "it changes the machine's timers; tests/test_backup_scripts.py",
    "llmo region": "needs PostgreSQL: tests/drill/test_region_lab.py, tests/acceptance/cluster",
    "llmo runs rewind": "the verb's name, no whole command",
}
"""How commands begin that are not run, and who does it instead."""
_FRESH = "RUN=$(llmo run parked1.yaml --detach)\n"
_BEFORE = {
    "llmo runs cancel": _FRESH,
    "llmo runs fork": _FRESH,
    "llmo runs resume": _FRESH + "llmo runs pause $RUN\n",
    "llmo nodes drain NODE --undo": "llmo nodes drain $NODE\n",
    "llmo backup prove FILE": "FILE=$(llmo backup latest)\n",
}
_AFTER = {
    "llmo maintenance enable": "llmo maintenance disable\n",
    "llmo nodes drain": "llmo nodes drain $NODE --undo\n",
}
ENDS_WITH = {
    "llmo backup schedule": 4,  # none is installed
    "llmo dr status": 6,  # no objective was measured here
    "llmo archive status": 2,  # there is no archive here
    "llmo breakers reset NAME": 4,  # it was never open
}
"""Commands that end with another code than 0 here, as they should."""
EITHER = {"llmo backup check": {0, 1}}
"""It depends on whether the backup of the sentence before is proved yet."""
_FILLED = {
    r"--state failed --workflow NAME": "--state failed --workflow failing",
    r"^(llmo workflows diff) NAME@1 NAME@2": r"\1 parked@1 parked@2",
    r"^(llmo breakers reset) NAME": r"\1 echo",
    r"^(llmo backup prove) FILE": r"\1 $ARCHIVE",
    r"\bFILE\b": "hello.yaml",
    r"\bARCHIVE\b": "FILE",
    r"\bNAME\b": "parked",
    r"\bRUN\b": "$RUN",
    r"\bNODE\b": "$NODE",
    r"\bSTEP\b": "say",
    r"\bQUEUE\b": "default",
}


def sentence_commands() -> list[str]:
    """Every command inside a sentence of the three pages, once, as it is written."""
    found: dict[str, None] = {}
    for page in (PROCEDURES, RUNBOOK, RECOVERY):
        whole = (ROOT / page).read_text()
        text = re.sub(r"^```.*?^```$", "", whole, flags=re.MULTILINE | re.DOTALL)
        for each in re.findall(r"`(llmo\s[^`]+)`", text):
            found[" ".join(each.split())] = None
    return list(found)


def filled(command: str) -> str:
    """The command with what a reader would put in the place of its capitals."""
    for pattern, value in _FILLED.items():
        command = re.sub(pattern, value, command)
    return command


def of(table: dict[str, str], command: str) -> str:
    """What a table has for commands that begin so, or nothing."""
    return next((value for start, value in table.items() if command.startswith(start)), "")


def endings(commands: list[str], folder: Path) -> tuple[dict[str, int], str]:
    """With which code each command ends, and all that was printed."""
    lines = [
        "llmo workflows register parked1.yaml parked2.yaml failing.yaml hello.yaml\n" + _SERVE,
        "llmo run failing.yaml || test $? = 9\n" + _PARK + "set +ex\n",
    ]
    for number, each in enumerate(commands):
        asked = f'echo "@ {number}" >&2\n( {filled(each)} )\necho "@ {number} $?"\n'
        lines.append(of(_BEFORE, each) + asked + of(_AFTER, each))
    done = run_script("".join(lines), folder)
    codes = re.findall(r"^@ (\d+) (\d+)$", done.stdout, re.MULTILINE)
    return {commands[int(number)]: int(code) for number, code in codes}, done.stdout + done.stderr


def test_every_command_in_a_sentence_ends_as_it_should(folder: Path) -> None:
    commands = [each for each in sentence_commands() if not of(NOT_HERE, each)]
    assert len(commands) > 40
    ended, printed = endings(commands, folder)
    assert set(ended) == set(commands), printed
    wrong = {
        name: code
        for name, code in ended.items()
        if code not in EITHER.get(name, {ENDS_WITH.get(name, 0)})
    }
    assert wrong == {}, printed


def test_a_command_in_a_sentence_that_fails_is_noticed(folder: Path) -> None:
    ended, _ = endings(["llmo runs show nothing", "llmo nodes list"], folder)
    assert ended == {"llmo runs show nothing": 4, "llmo nodes list": 0}

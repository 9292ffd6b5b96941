"""What README, runbook and procedures tell an operator to type is typed: on one node, and in a lab.

Blocks marked `run on one node` get a node on SQLite with a stream archive; blocks marked `run` a lab
of two regions. Commands that stand inside a sentence are run in the lab as well, each on a run of
its own. What the pages leave to the reader (`$RUN`, `NODE`) is filled in here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from llm_orchestrator.drill.lab import Lab, LabSpec, down, up
from tests.drill.test_lab_cluster import needs_root
from tests.test_docs import ROOT, blocks_of

RUNBOOK = "docs/disaster_recovery/DR_RUNBOOK.md"
RECOVERY = "docs/disaster_recovery/README.md"
PROCEDURES = "docs/disaster_recovery/DR_PROCEDURES.md"
ONE_NODE, LAB = "run on one node", "run"
LIMIT_S = 280
_HEAD = "trap 'kill $(jobs -p) 2> /dev/null && wait || true' EXIT\n"
_SERVE = """\
llmo serve --port 0 2> serve.log &
until llmo nodes list -o ids | grep -q .; do :; done
"""
_BEGIN = {
    "README.md": "",
    RECOVERY: _SERVE + "llmo run hello.yaml\n",
    RUNBOOK: 'echo "archive_place = \\"$PWD/archive\\"" > llm-orchestrator.toml\n'
    + _SERVE
    + """\
llmo run hello.yaml
RUN=$(llmo runs list -o ids --limit 1)
llmo backup create --prove
WHEN=$(date -u +%FT%T.%6NZ)
llmo run hello.yaml
""",
}
_END = {
    "README.md": 'test "$(llmo runs list -o ids | wc -l)" = 1\n',
    RECOVERY: "",
    RUNBOOK: "llmo runs result $RUN\n",
}
pytestmark = [pytest.mark.serial, pytest.mark.timeout(LIMIT_S + 60)]


def script_of(page: str, mark: str) -> str:
    """The blocks of a page with this mark; a command whose remark says `exit N` has to end so."""
    text = "".join(block.text for block in blocks_of(ROOT / page) if block.mark == mark)
    return as_promised(text)


def as_promised(text: str) -> str:
    """Lines with the remark `# exit N` fail unless they do."""
    ending = r"^(llmo [^#\n]*?)\s+#\s*exit (\d+)\b.*$"
    return re.sub(ending, r"ended=0; \1 || ended=$?; test $ended = \2", text, flags=re.MULTILINE)


def run_script(
    script: str, folder: Path, *, environment: dict[str, str], prefix: list[str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A script of bash that stops at the first failure; nothing that it started stays behind."""
    kept = {name: os.environ[name] for name in ("HOME", "TMPDIR", "LANG") if name in os.environ}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    python = os.pathsep.join(filter(None, sys.path))
    process = subprocess.Popen(
        [*(prefix or []), "bash", "-xeuo", "pipefail", "-c", _HEAD + script],
        cwd=folder,
        env={**kept, "PATH": path, "PYTHONPATH": python, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(script, process.returncode, out, err)


def write_hello(folder: Path) -> None:
    """The README's first workflow."""
    first = next(block for block in blocks_of(ROOT / "README.md") if block.language == "yaml")
    (folder / "hello.yaml").write_text(first.text)


@pytest.mark.parametrize("page", sorted(_BEGIN))
def test_what_a_page_tells_to_type_on_one_node_works(page: str, tmp_path: Path) -> None:
    write_hello(tmp_path)
    script = script_of(page, ONE_NODE)
    assert script.count("llmo ") >= 3
    done = run_script(
        _BEGIN[page] + script + _END[page],
        tmp_path,
        environment={"LLM_ORCHESTRATOR_DATA": str(tmp_path / "data")},
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_remark_about_the_exit_code_is_held_against_the_command(tmp_path: Path) -> None:
    wrong = as_promised("llmo runs list    # exit 6: never\n")
    right = as_promised("llmo runs show nothing    # exit 10: no store yet\n")
    environment = {"LLM_ORCHESTRATOR_DATA": str(tmp_path / "data")}
    assert run_script(wrong, tmp_path, environment=environment).returncode != 0
    assert run_script(right, tmp_path, environment=environment).returncode == 0


# -- in the lab -----------------------------------------------------------------------------------

PARKED = """\
name: parked
version: "VERSION"
steps:
  - {id: say, type: llm, provider: openai, model: fake, max_tokens: 4, stream: false, prompt: "Hi"}
  - {id: go, type: wait, signal: go, depends_on: say}
"""
FAILING = """\
name: failing
steps: [{id: never, type: transform, expression: "1 / 0"}]
"""
_LAB_BEGIN = """\
llmo workflows register parked1.yaml
llmo workflows register parked2.yaml
RUN=$(llmo run parked1.yaml --detach)
FAILED=$(llmo run failing.yaml --detach)
until llmo runs show $RUN | grep -q 'state: *waiting'; do :; done
until llmo runs show $FAILED | grep -q 'state: *failed'; do :; done
NODE=$(llmo nodes list -o ids | head -n 1)
until llmo region plan --to b; do :; done
"""
FRESH = "RUN=$(llmo run parked1.yaml --detach)\n"
BEFORE = {
    "llmo runs cancel": FRESH,
    "llmo runs fork": FRESH,
    "llmo runs resume": FRESH + "llmo runs pause $RUN\n",
    "llmo backup prove FILE": "FILE=$(llmo backup latest)\n",
}
"""What a command needs, by how it begins."""
AFTER = {
    "llmo maintenance enable": "llmo maintenance disable\n",
    "llmo nodes drain": "llmo nodes drain $NODE --undo\n",
}
NOT_HERE = {
    "llmo serve": "the lab's own nodes are that; it would not end",
    "llmo backup schedule install": "it changes the machine's timers",
    "llmo region failover": "a block of the runbook does it, and tests/drill/test_region_lab.py",
    "llmo region failback": "a block of the runbook does it",
    "llmo runs rewind": "the verb's name, no whole command",
}
ENDS_WITH: dict[str, int] = {}
"""Commands that end with another code than 0 here, as they should."""
FILLED = {
    r"^(llmo workflows diff) NAME@1 NAME@2": r"\1 parked@1 parked@2",
    r"^(llmo breakers reset) NAME": r"\1 openai",
    r"^(llmo region \w+) NAME": r"\1 b",
    r"^(llmo backup prove) FILE": r"\1 $FILE",
    r"\bFILE\b(?!=)": "hello.yaml",
    r"\bNAME\b": "parked",
    r"\bRUN\b": "$RUN",
    r"\bNODE\b": "$NODE",
    r"\bSTEP\b": "say",
    r"\bQUEUE\b": "default",
    r"\bREGION\b": "b",
}


def sentence_commands() -> list[str]:
    """Every command inside a sentence of the three pages, once, as it is written."""
    found: dict[str, None] = {}
    for page in (PROCEDURES, RUNBOOK, RECOVERY):
        text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.M | re.S)
        found |= dict.fromkeys(" ".join(each.split()) for each in re.findall(r"`(llmo\s[^`]+)`", text))
    return [each for each in found if not each.startswith(tuple(NOT_HERE))]


def filled(command: str) -> str:
    """The command with what a reader would put in the place of its capitals."""
    for pattern, value in FILLED.items():
        if "$FILE" in command and "FILE" in pattern:
            continue
        command = re.sub(pattern, value, command)
    return command


def of(table: dict[str, str], command: str) -> str:
    return next((value for start, value in table.items() if command.startswith(start)), "")


@dataclass
class Desk:
    """An operator at the client's host of a lab."""

    lab: Lab
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def type(self, script: str) -> subprocess.CompletedProcess[str]:
        return run_script(
            script, self.folder, environment=self.environment, prefix=self.lab.command()
        )


@pytest.fixture(scope="module")
def desk() -> Iterator[Desk]:
    """Two regions and a third site; a parked run, a failed one, and a plan that can be carried out."""
    with tempfile.TemporaryDirectory(prefix="lab-", ignore_cleanup_errors=True) as base:
        Path(base).chmod(0o711)
        folder, place = Path(base).resolve() / "lab", Path(base).resolve() / "desk"
        lab = up(LabSpec(regions=2, has_network=True), folder, tell=lambda _: None)
        try:
            yield at(lab, place)
        finally:
            down(folder)


def at(lab: Lab, place: Path) -> Desk:
    """A desk with the files and variables that the pages take for granted."""
    place.mkdir()
    write_hello(place)
    (place / "parked1.yaml").write_text(PARKED.replace("VERSION", "1"))
    (place / "parked2.yaml").write_text(PARKED.replace("VERSION", "2"))
    (place / "failing.yaml").write_text(FAILING)
    urls = [lab.plan.url(where, "patroni") for where in lab.plan.running("patroni")]
    (place / "llm-orchestrator.toml").write_text(f"patroni_urls = {json.dumps(urls)}\n")
    made = Desk(lab, place)
    made.environment = {
        "LLM_ORCHESTRATOR_URL": lab.store_url,
        "LLM_ORCHESTRATOR_DATA": str(place / "data"),
        "URL": lab.endpoints[0],
        "REGION": "b",
    }
    policy = "llmo region policy active-passive --home a --sync strict\n"
    told = made.type(policy + _LAB_BEGIN + 'echo "made $RUN $NODE"\n')
    assert told.returncode == 0, told.stdout + told.stderr
    names = re.search(r"^made (\S+) (\S+)$", told.stdout, re.MULTILINE)
    assert names, told.stdout
    made.environment |= {"RUN": names[1], "NODE": names[2]}
    return made


@needs_root
def test_every_command_in_a_sentence_does_what_it_is_named_for(desk: Desk) -> None:
    commands = sentence_commands()
    assert len(commands) > 40
    lines = ["set +ex"]
    for number, each in enumerate(commands):
        before, after = of(BEFORE, each), of(AFTER, each)
        lines.append(f"{before}( {filled(each)} )\necho \"@ {number} $?\"\n{after}")
    done = desk.type("\n".join(lines))
    parts = re.split(r"^@ (\d+) (\d+)$", done.stdout, flags=re.MULTILINE)
    ended = {commands[int(at)]: int(code) for at, code in zip(parts[1::3], parts[2::3], strict=True)}
    wrong = {name: code for name, code in ended.items() if code != ENDS_WITH.get(name, 0)}
    assert set(ended) == set(commands), done.stderr
    assert wrong == {}, done.stdout + done.stderr


@needs_root
def test_the_runbooks_commands_work_in_a_cluster(desk: Desk) -> None:
    done = desk.type(script_of(RUNBOOK, LAB))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^200$", done.stdout, re.MULTILINE)

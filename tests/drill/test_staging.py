"""A drill against a system that is not its own: a node under a small supervisor, a fake LLM.

The hooks are commands that a user would write: they know a pid file and nothing of the drill.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_orchestrator.drill.lab_process import state, wait
from llm_orchestrator.drill.scenario import load_one
from llm_orchestrator.drill.single import FLOWS, free_ports
from llm_orchestrator.drill.staging_file import Hooks, read
from llm_orchestrator.errors import ConfigError

pytestmark = pytest.mark.timeout(300)
TOKEN = "a-token-of-staging-4711"
SMALL = (
    "load.in_flight=24",
    "load.ask_ms=1000",
    "load.words=10",
    "load.word_ms=300",
    "baseline.seconds=1",
    "baseline.cpu_percent_max=1000",
)
SUPERVISOR = """\
import pathlib, subprocess, sys, time
while True:
    node = subprocess.Popen(sys.argv[1:])
    pathlib.Path("node.pid").write_text(str(node.pid))
    node.wait()
    time.sleep(0.1)
"""
HOOKS = """\
case "$1" in
kill) cp node.pid killed.pid && kill -9 "$(cat killed.pid)" ;;
killed) ! kill -0 "$(cat killed.pid)" ;;
freeze) kill -STOP "$(cat node.pid)" ;;
frozen) grep -q '^State:.T' "/proc/$(cat node.pid)/status" ;;
home) sleep 1 ;;
nowhere) exit 3 ;;
thaw) kill -CONT "$(cat node.pid)" && echo "$2" >> undone ;;
esac
"""
KILL = {"inject": ["{sh}", "kill"], "confirm": ["{sh}", "killed"], "undo": ["true"]}
FREEZE = {
    "inject": ["{sh}", "freeze"],
    "confirm": ["{sh}", "frozen"],
    "undo": ["{sh}", "thaw", "{on}"],
}


class System:
    """The staging system, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.llm, self.api = (f"http://127.0.0.1:{port}" for port in free_ports(2))
        self._processes: list[subprocess.Popen[bytes]] = []
        (folder / "hooks.sh").write_text(HOOKS)
        (folder / "run-hook").write_text(f"#!/bin/sh\ncd {folder} && . ./hooks.sh\n")
        (folder / "run-hook").chmod(0o755)
        (folder / "supervisor.py").write_text(SUPERVISOR)
        (folder / "llm-orchestrator.toml").write_text('outgoing_allow = ["127.0.0.1"]\n')

    def start(self) -> None:
        python = sys.executable
        llm_port, api_port = (url.rpartition(":")[2] for url in (self.llm, self.api))
        self._spawn(
            python,
            *("-m", "llm_orchestrator.drill.fake_llm", "--port", llm_port),
            *("--ledger", str(self.folder / "llm.jsonl")),
        )
        node = ("-m", "llm_orchestrator", "serve", "--port", api_port, "--import", str(FLOWS))
        self._spawn(python, "supervisor.py", python, *node)
        assert wait(self.is_ready, 60.0)

    def _spawn(self, *words: str) -> None:
        told = {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "LLM_ORCHESTRATOR_URL": self.store_url,
            "LLM_ORCHESTRATOR_DATA": str(self.folder / "data"),
            "LLM_ORCHESTRATOR_TOKEN": TOKEN,
            "OPENAI_API_KEY": "drill",
            "OPENAI_BASE_URL": f"{self.llm}/v1",
        }
        with (self.folder / "processes.log").open("ab") as log:
            self._processes.append(
                subprocess.Popen(
                    words, cwd=self.folder, env=os.environ | told, stdout=log, stderr=log
                )
            )

    @property
    def store_url(self) -> str:
        return f"sqlite:///{self.folder / 'runs.db'}"

    @property
    def pid(self) -> int:
        return int((self.folder / "node.pid").read_text())

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.api}/health/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.kill()
            process.wait()
        os.kill(self.pid, signal.SIGKILL)

    def file(self, name: str, **more: Any) -> Path:
        """A file that describes it; `more` replaces or adds, None leaves away."""
        told: dict[str, Any] = {
            "name": "mine",
            "may_be_broken": True,
            "endpoints": [self.api],
            "token": "env:STAGING_TOKEN",
            "store_url": self.store_url,
            "llm_ledger": self.llm,
            "faults": {"process_kill": KILL, "process_freeze": FREEZE},
        } | more
        path = self.folder / name
        text = _toml({key: value for key, value in told.items() if value is not None})
        path.write_text(text.replace("{sh}", str(self.folder / "run-hook")))
        return path


def _toml(told: dict[str, Any], under: str = "") -> str:
    """JSON's values are TOML's, but for tables."""
    plain = [f"{k} = {json.dumps(v)}\n" for k, v in told.items() if not isinstance(v, dict)]
    tables = [
        f"[{under}{k}]\n{_toml(v, f'{under}{k}.')}" for k, v in told.items() if isinstance(v, dict)
    ]
    return "".join(plain + tables)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    found = System(tmp_path_factory.mktemp("staging"))
    found.start()
    yield found
    found.stop()


def words_of(file: Path, scenario: str, data: Path, *more: str) -> list[str]:
    sets = [word for value in (*SMALL, *more) for word in ("--set", value)]
    llmo = [sys.executable, "-m", "llm_orchestrator", "--data", str(data)]
    return [*llmo, "drill", "run", scenario, "--repeat=1", f"--against={file}", *sets]


def environment() -> dict[str, str]:
    told = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "STAGING_TOKEN": TOKEN}
    return dict(os.environ) | told


def carry_out(file: Path, scenario: str, data: Path, *more: str) -> tuple[int, dict[str, Any]]:
    """The exit code, and the only run of the result."""
    done = subprocess.run(
        words_of(file, scenario, data, *more),
        check=False,
        capture_output=True,
        text=True,
        timeout=250,
        env=environment(),
    )
    print(done.stderr)
    path = data / "drills" / "results-mine" / f"{scenario}.json"
    (run,) = json.loads(path.read_text())["runs"]
    return done.returncode, dict(run)


def test_a_node_of_staging_is_killed_and_nothing_is_lost(system: System, tmp_path: Path) -> None:
    file = system.file("good.toml", redundant={"command": ["{sh}", "killed"]})
    code, run = carry_out(file, "application_single_node_restart", tmp_path)
    assert code in (0, 6), run["reasons"]
    assert all(reason.startswith("recovery took") for reason in run["reasons"])
    assert run["affected_runs"] > 0
    assert run["counts"]["entries_final"] > run["counts"]["runs_accepted"] > 0
    assert run["counts"]["llm_calls"] > 0
    assert run["counts"]["effects"] > 0
    assert run["marks"]["t5"] >= run["marks"]["t0"] == 0
    assert run["marks"]["t7"] > 0
    assert run["not_judged"] == ["whether nodes died 1 times"]
    (evidence,) = tmp_path.glob("drills/2*/application_single_node_restart/1")
    assert "run-hook kill: exit code 0" in (evidence / "hooks.log").read_text()
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and TOKEN in p.read_text("latin-1")]
    judged = subprocess.run(
        [sys.executable, "-m", "llm_orchestrator", "drill", "judge", str(evidence)],
        check=False,
        env=environment(),
    )
    assert judged.returncode == 0


@pytest.mark.parametrize("verb", ["home", "nowhere"])
def test_a_failback_is_timed_and_one_that_fails_is_said(
    system: System, tmp_path: Path, verb: str
) -> None:
    file = system.file(
        "home.toml",
        redundant={"command": ["{sh}", "killed"]},
        failback={"command": ["{sh}", verb]},
    )
    code, run = carry_out(file, "application_single_node_restart", tmp_path, "failback=true")
    assert code in (0, 6), run["reasons"]
    said = [reason for reason in run["reasons"] if reason.startswith("it is not failed back")]
    if verb == "nowhere":
        assert code == 6
        assert "nowhere ended with 3" in said[0]
        assert "t8" not in run["marks"]
    else:
        assert not said
        assert run["marks"]["t8"] > run["marks"]["t7"]
        assert run["parts"]["fail back"] > 0
        assert any(text.startswith("failback in") for text in run["evidence"])


def test_what_nobody_can_see_is_said_and_not_passed(system: System, tmp_path: Path) -> None:
    file = system.file("blind.toml", store_url=None, llm_ledger=None)
    code, run = carry_out(file, "application_single_node_restart", tmp_path)
    assert code in (0, 6), run["reasons"]
    assert run["recovery_time_s"] is not None
    assert any("no store_url" in text for text in run["not_judged"])
    assert any("no llm_ledger" in text for text in run["not_judged"])
    assert any("no [redundant]" in text for text in run["not_judged"])
    assert run["respent"] == {}


def test_a_ledger_of_another_server_is_no_witness(system: System, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.touch()
    pid = system.pid
    file = system.file("other.toml", llm_ledger=str(other))
    code, run = carry_out(file, "application_single_node_restart", tmp_path)
    assert code == 7
    assert "the LLM server's ledger shows nothing" in run["reasons"][0]
    assert system.pid == pid


def test_a_fault_that_is_not_confirmed_is_undone(system: System, tmp_path: Path) -> None:
    undone = system.folder / "undone"
    undone.unlink(missing_ok=True)
    never = FREEZE | {"confirm": ["false"], "limit_s": 1}
    file = system.file("never.toml", faults={"process_freeze": never})
    code, run = carry_out(file, "application_frozen_single", tmp_path)
    assert code == 7
    assert "not confirmed within 1 s" in run["reasons"][0]
    assert undone.read_text() == "node\n"
    assert state(system.pid) != "T"
    assert run["recovery_time_s"] is None


def test_an_undo_that_fails_is_said_aloud(system: System, tmp_path: Path) -> None:
    bad = {"inject": ["true"], "confirm": ["true"], "undo": ["false"]}
    file = system.file("stuck.toml", faults={"process_freeze": bad})
    code, run = carry_out(file, "application_frozen_single", tmp_path, "heal.after_s=0.5")
    assert code == 6
    assert any(reason.startswith("IT IS STILL BROKEN") for reason in run["reasons"])


def test_a_missing_hook_is_named_and_nothing_is_touched(system: System, tmp_path: Path) -> None:
    pid = system.pid
    half = {name: words for name, words in KILL.items() if name != "confirm"}
    file = system.file("half.toml", faults={"process_kill": half})
    code, run = carry_out(file, "application_single_node_restart", tmp_path)
    assert code == 7
    assert run["reasons"] == ["the file of mine lacks faults.process_kill.confirm"]
    assert system.pid == pid


def test_a_drill_that_is_killed_takes_its_fault_away(system: System, tmp_path: Path) -> None:
    undone = system.folder / "undone"
    undone.unlink(missing_ok=True)
    words = words_of(
        system.file("good.toml"), "application_frozen_single", tmp_path, "heal.after_s=600"
    )
    board = tmp_path / "drill.prom"
    words.append(f"--metrics={board}")
    with subprocess.Popen(words, env=environment()) as drill:
        pid = system.pid
        assert wait(lambda: state(pid) == "T", 120.0)
        assert wait(lambda: 'application_frozen_single",phase="fault"' in board.read_text(), 10.0)
        assert not undone.exists()
        drill.kill()
        drill.wait()
    assert wait(undone.exists, 30.0)
    assert state(pid) not in "TXZ"
    assert wait(system.is_ready, 30.0)


# --- the file ---

SOUND = """\
name = "mine"
may_be_broken = true
endpoints = ["http://127.0.0.1:1"]
[faults.process_kill]
inject = ["kill", "{on}"]
confirm = ["true"]
undo = ["true"]
"""


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (SOUND.replace("may_be_broken = true", "may_be_broken = false"), "may_be_broken = true"),
        (SOUND.replace("may_be_broken = true\n", ""), "may_be_broken = true"),
        (SOUND.replace("confirm", "confrim"), "confrim"),
        (SOUND.replace("process_kill", "proces_kill"), "there is no fault proces_kill"),
        (SOUND.replace("process_kill", "store_lost"), "there is no fault store_lost"),
        (SOUND.replace('"mine"', '"lab"'), "lab is the name"),
        (SOUND.replace("endpoints", "endpoint"), "endpoint"),
        ('token = "abc"\n' + SOUND, "token"),
        ('store_url = "postgresql://u:secret@h/d"\n' + SOUND, "store_password"),
        (SOUND.replace("{on}", "{onn}"), "no scenario says {onn}"),
        ("name = \n", "Invalid value"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "staging.toml").write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        read(tmp_path / "staging.toml")


def test_a_hook_must_use_what_the_scenario_says(tmp_path: Path) -> None:
    (tmp_path / "staging.toml").write_text(SOUND)
    staging = read(tmp_path / "staging.toml")
    assert staging.missing(load_one("application_single_node_restart")) == []
    assert staging.undo_commands(load_one("application_single_node_restart")) == [["true"]]
    literal = Hooks(inject=["{on} {held}!", "{{on}}"], limit_s=1)
    fault = load_one("application_sigkill_second_node").faults[0]
    assert literal.filled("inject", fault) == ["node True!", "{on}"]
    assert literal.filled("inject", fault.model_copy(update={"options": {}}))[0] == "node !"
    (tmp_path / "deaf.toml").write_text(SOUND.replace(', "{on}"', ""))
    deaf = read(tmp_path / "deaf.toml")
    assert deaf.missing(load_one("application_single_node_restart")) == []
    (lack,) = deaf.missing(load_one("application_all_nodes"))
    assert lack.startswith("{on} in faults.process_kill.inject")
    assert "faults.host_lost.inject" in staging.missing(load_one("database_primary_failover"))
    assert "failback" in staging.missing(load_one("region_active_active_primary_lost"))
    (lack,) = staging.missing(load_one("backup_restore_full"))
    assert "only to a system that the drill makes itself" in lack


def test_the_example_of_the_documents_can_do_what_it_says(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "how-to" / "drill.md"
    (tmp_path / "staging.toml").write_text(page.read_text().split("```toml\n")[1].split("```")[0])
    staging = read(tmp_path / "staging.toml")
    for name in ("application_sigkill_second_node", "region_active_active_primary_lost"):
        assert staging.missing(load_one(name)) == []


def test_the_list_says_what_a_file_lacks(tmp_path: Path) -> None:
    file = tmp_path / "staging.toml"
    file.write_text(SOUND)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "llm_orchestrator"),
            *("drill", "list", f"--against={file}", "--output=json"),
        ],
        check=True,
        capture_output=True,
        text=True,
        env=environment(),
    )
    lacks = {row["scenario"]: row["lacks"] for row in json.loads(done.stdout)}
    assert lacks["application_single_node_restart"] == ""
    assert "faults.process_freeze.inject" in lacks["application_frozen_single"]

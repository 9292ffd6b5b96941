"""Many runs of many scenarios: repeats, what is done already, evidence, results on disk.

A campaign is known by what was asked for (names, repeats, seed, target, overrides) and by the
digest of the code. Asked for again before it has finished, it goes on where it stopped. Each run
leaves a folder of evidence; each scenario whose repeats are all done leaves one result file.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import llm_orchestrator
from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill.deadman import DeadMan
from llm_orchestrator.drill.metrics import Board
from llm_orchestrator.drill.outcome import EXIT_CODES, INCONCLUSIVE
from llm_orchestrator.drill.run import Drill
from llm_orchestrator.drill.scenario import Scenario, load_one
from llm_orchestrator.drill.target import Target

Json = Any
SCHEMA = "llm-orchestrator-drill/1"
_PACKAGE = Path(llm_orchestrator.__file__).parent
_SUFFIXES = frozenset({".py", ".sql", ".yaml", ".toml", ".json"})
_PHASE_S_MAX = 1.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for."""

    names: Sequence[str]
    repeat: int = 0
    """0: as often as each scenario's file says."""
    seed: int = 0
    against: str = ""
    """"": each scenario against the first target that it names."""
    overrides: Sequence[str] = ()
    staging: str = ""
    """The digest of the file of a staging system."""

    def key(self, digest: str) -> dict[str, Json]:
        """What tells one campaign from another."""
        found: dict[str, Json] = json.loads(json.dumps({**asdict(self), "digest": digest}))
        return found


def source_digest() -> str:
    """blake2b of every source file of the package: what a result was measured with."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(_PACKAGE.rglob("*")):
        if path.suffix in _SUFFIXES:
            digest.update(f"{path.relative_to(_PACKAGE).as_posix()}\0".encode())
            digest.update(hashlib.blake2b(path.read_bytes(), digest_size=16).digest())
    return digest.hexdigest()


def digest_of(text: str) -> str:
    """blake2b of a text: what tells one file's content from another."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def source_commit() -> str:
    """The commit of the sources, `+` behind it when they were changed since; "" without git."""
    git = ["git", "-C", str(_PACKAGE)]
    try:
        found = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=20
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", "."],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip() + ("+" if changed.stdout.strip() else "")


def host_facts() -> dict[str, Json]:
    """What the machine is, without its name."""
    memory = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        memory = int(Path("/proc/meminfo").read_text().split()[1]) // 1024
    return {
        "system": platform.system(),
        "kernel": ".".join(platform.release().split(".")[:2]),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "memory_mb": memory,
    }


class Campaign:
    """Carries out a plan in `folder`; results go to `results`."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        results: Path,
        *,
        make_target: Callable[[Path, Scenario], Target],
        tell: Callable[[str], None],
        metrics: Path | None = None,
    ) -> None:
        self._plan = plan
        self._folder = folder
        self._results = results
        self._make_target = make_target
        self._tell = tell
        self._clock = RealClock()
        self._board = Board(metrics, self._clock)
        self._digest = source_digest()
        self._commit = source_commit()

    @property
    def _state_file(self) -> Path:
        return self._folder / "campaign.json"

    def _state(self, *, is_fresh: bool) -> dict[str, Json]:
        key = self._plan.key(self._digest)
        if not is_fresh and self._state_file.exists():
            found: dict[str, Json] = json.loads(self._state_file.read_text())
            if found["plan"] == key:
                self._tell(f"going on: {len(found['done'])} runs are done")
                return found
        return {"plan": key, "done": {}, "place": self._stamp()}

    def _repeats(self, scenario: Scenario) -> int:
        return self._plan.repeat or scenario.repeat

    def _stamp(self) -> str:
        now = datetime.datetime.fromtimestamp(self._clock.now_us() / 1e6, datetime.UTC)
        return now.strftime("%Y%m%d_%H%M%S")

    async def run(self, *, is_fresh: bool = False) -> int:
        """Everything that is not done yet; the exit code, the worst of all."""
        scenarios = [load_one(name, self._plan.overrides) for name in self._plan.names]
        state = self._state(is_fresh=is_fresh)
        self._folder.mkdir(parents=True, exist_ok=True)
        total = sum(self._repeats(each) for each in scenarios)
        expected_s = sum(self._repeats(each) * expected(each) for each in scenarios)
        self._tell(f"{total} runs, about {expected_s / 60:.0f} min")
        self._board.begin(_results_in(self._results), total)
        number, code = 0, 0
        for scenario in scenarios:
            runs = []
            for repeat in range(1, self._repeats(scenario) + 1):
                number += 1
                key = f"{scenario.id}/{repeat}"
                if key not in state["done"]:
                    self._tell(f"[{number}/{total}] {scenario.id}, run {repeat}")
                    state["done"][key] = await self._one(scenario, repeat, state["place"])
                    write_json(self._state_file, state)
                runs.append(state["done"][key])
                self._tell(
                    f"  {runs[-1]['status']}" + "".join(f"; {r}" for r in runs[-1]["reasons"])
                )
            self._keep(scenario, runs)
            self._show(partial(self._board.stand, _results_in(self._results), total - number))
            code = max(code, *(EXIT_CODES[run["status"]] for run in runs))
        self._state_file.unlink(missing_ok=True)
        return code

    async def _one(self, scenario: Scenario, repeat: int, place: str) -> dict[str, Json]:
        folder = self._folder / place / scenario.id / str(repeat)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        seed = f"{self._plan.seed}/{scenario.id}/{repeat}"
        digest = hashlib.blake2b(seed.encode(), digest_size=4).digest()
        phase_s = int.from_bytes(digest, "big") / 2**32 * _PHASE_S_MAX
        target = self._make_target(folder / "target", scenario)
        timer = DeadMan(target.undo_commands(), expected(scenario) * 10)
        live = self._folder / "live" / f"{os.getpid()}.json"
        write_json(live, {"pid": os.getpid(), "commands": target.undo_commands()})
        timer.arm()
        try:
            name = f"{digest.hex()}{self._clock.now_us():x}"  # a shared store knows earlier ones
            drill = Drill(
                scenario,
                target,
                folder,
                name=name,
                tell=self._say,
                on_phase=lambda word: self._show(partial(self._board.phase, scenario.id, word)),
                phase_s=phase_s,
            )
            outcome = (await drill.run()).plain()
        finally:
            timer.disarm()
            live.unlink(missing_ok=True)
        outcome |= {"repeat": repeat, "seed": self._plan.seed, "phase_s": round(phase_s, 3)}
        self._bundle(scenario, target, folder, outcome=outcome)
        return outcome

    def _show(self, write: Callable[[], None]) -> None:
        """A display that fails stops no drill."""
        try:
            write()
        except OSError as error:
            self._tell(f"metrics: {error}")

    def _say(self, text: str) -> None:
        self._tell(f"  {text}")

    def _bundle(
        self, scenario: Scenario, target: Target, folder: Path, *, outcome: dict[str, Json]
    ) -> None:
        """The evidence of one run: ledgers, logs, what was asked, versions, host, checksums."""
        for path in (*target.logs(), *target.llm_ledgers):
            if path.exists():
                shutil.copy(path, folder / path.name)
        shutil.rmtree(folder / "target", ignore_errors=True)
        write_json(folder / "scenario.json", scenario.plain())
        write_json(folder / "outcome.json", outcome)
        write_json(
            folder / "versions.json",
            {"commit": self._commit, "digest": self._digest, "host": host_facts()}
            | {"plan": self._plan.key(self._digest)},
        )
        sums = [
            f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
            for path in sorted(folder.iterdir())
            if path.is_file() and path.name != "SHA256SUMS"
        ]
        (folder / "SHA256SUMS").write_text("".join(sums))

    def _keep(self, scenario: Scenario, runs: Sequence[dict[str, Json]]) -> None:
        """The result file (what is inconclusive, or a trial, replaces none), and the history."""
        result: dict[str, Json] = {
            "schema": SCHEMA,
            "scenario": scenario.plain(),
            "target": self._plan.against or scenario.needs[0],
            "commit": self._commit,
            "digest": self._digest,
            "finished_at": datetime.datetime.fromtimestamp(
                self._clock.now_us() / 1e6, datetime.UTC
            ).isoformat(timespec="seconds"),
            "overrides": list(self._plan.overrides),
            "host": host_facts(),
            "runs": list(runs),
            "summary": summary(runs),
        }
        path = self._results / f"{scenario.id}.json"
        is_measured = any(run["status"] != INCONCLUSIVE for run in runs)
        is_trial = bool(self._plan.overrides) and _has_measurement(path)
        if (is_measured and not is_trial) or not path.exists():
            write_json(path, result)
        self._folder.mkdir(parents=True, exist_ok=True)
        line: dict[str, Json] = {
            key: result[key] for key in ("finished_at", "target", "commit", "digest")
        }
        line |= {"scenario": scenario.id, "overrides": result["overrides"], **result["summary"]}
        with (self._folder / "history.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def _results_in(folder: Path) -> dict[str, dict[str, Json]]:
    found = (json.loads(path.read_text()) for path in sorted(folder.glob("*.json")))
    return {each["scenario"]["id"]: each for each in found if each.get("schema") == SCHEMA}


def _has_measurement(path: Path) -> bool:
    """Whether a result is there that is no trial: a trial must not replace it."""
    return path.exists() and not json.loads(path.read_text())["overrides"]


def summary(runs: Sequence[dict[str, Json]]) -> dict[str, Json]:
    """n, the worst status, and the spread of the recovery times, seconds."""
    statuses = [run["status"] for run in runs]
    times = sorted(t for run in runs if (t := run["recovery_time_s"]) is not None)
    points = [run["recovery_point_s"] for run in runs if run["recovery_point_s"] is not None]
    return {
        "status": max(statuses, key=EXIT_CODES.__getitem__),
        "n": len(runs),
        "passed": statuses.count("passed"),
        "recovery_time_s": {
            "median": times[(len(times) - 1) // 2],
            "p95": times[min(len(times) - 1, int(len(times) * 0.95))],
            "max": times[-1],
        }
        if times
        else None,
        "recovery_point_s_max": max(points, default=None),
    }


def expected(scenario: Scenario) -> float:
    """About how long one run takes, seconds: start, ramp, baseline, fault, backlog, verdict."""
    load = scenario.load.run_s
    heal = scenario.heal.after_s if scenario.heal else 0.0
    faults = sum(fault.after_s for fault in scenario.faults)
    start = 40 if "lab" in scenario.needs else 12
    back = 30 if scenario.failback else 0
    return start + back + load * 2.5 + scenario.baseline.seconds + heal + faults


def write_json(path: Path, value: Json) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    draft.replace(path)

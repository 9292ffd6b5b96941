"""`make demo` keeps its promise, and would say so if it did not."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.local_lab import pulled_model

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).resolve().parents[2]


def verdict() -> Any:
    """The module scripts/demo_verdict.py."""
    place = ROOT / "scripts" / "demo_verdict.py"
    spec = importlib.util.spec_from_file_location("demo_verdict", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entry(kind: str, step: str = "", text: str = "") -> dict[str, Any]:
    payload = {"result": {"text": text}, "usage": {"output_tokens": 3}} if text else {}
    return {"kind": kind, "step": step, "payload": payload}


BEFORE = [
    entry("accepted"),
    entry("claimed"),
    entry("intent", "facts"),
    entry("step_finished", "facts", "two facts"),
    entry("intent", "story"),
]
AFTER = [
    *BEFORE,
    entry("claimed"),
    entry("intent", "story"),
    entry("step_finished", "story", "a story"),
    entry("state"),
]
RESULT = {"facts": "two facts", "story": "a story"}


def test_the_demo_is_killed_half_way_and_pays_nothing_twice() -> None:
    pulled_model()
    done = subprocess.run(["scripts/demo"], cwd=ROOT, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "kill -9" in said
    assert "facts   asked once" in said
    assert "The promise was kept" in said
    made = re.search(r"tokens  (\d+) made by the model's server, (\d+) booked", said)
    assert made is None or made[1] == made[2], said
    assert not list((ROOT / ".tools").glob("demo.*")), "it cleans up"


def test_the_verdict_is_good_only_for_a_run_that_went_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verdict().problems(BEFORE, AFTER, RESULT) == []
    for name, lines in (("before", BEFORE), ("after", AFTER)):
        text = "\n".join(json.dumps(line) for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    assert verdict().main(tmp_path, "6") == 0
    assert "6 made by the model's server, 6 booked: 0 made twice" in capsys.readouterr().out
    (tmp_path / "result.json").write_text("{}")
    assert verdict().main(tmp_path, "6") == 1
    assert "THE PROMISE WAS NOT KEPT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("complaint", "before", "after", "result"),
    [
        ("facts was asked again", BEFORE, [*AFTER, BEFORE[2]], RESULT),
        ("facts has 2 results", BEFORE, [*AFTER, BEFORE[3]], RESULT),
        ("story has 0 results", BEFORE, AFTER[:7], RESULT),
        ("wrong moment", BEFORE[:3], AFTER, RESULT),
        ("wrong moment", AFTER[:8], AFTER, RESULT),
        ("not two processes", BEFORE, [*BEFORE, *AFTER[6:]], RESULT),
        ("has changed", [*BEFORE[:4], BEFORE[2]], AFTER, RESULT),
        ("does not hold what was recorded of facts", BEFORE, AFTER, {**RESULT, "facts": "x"}),
    ],
)
def test_the_verdict_names_each_broken_promise(
    complaint: str, before: list[Any], after: list[Any], result: dict[str, str]
) -> None:
    found = verdict().problems(copy.deepcopy(before), copy.deepcopy(after), result)
    assert any(complaint in problem for problem in found), found

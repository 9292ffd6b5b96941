"""Seeds of the simulation, in processes of their own: the order of sets hangs on the hash seed.

Each plays production nodes through trouble, heals them, and checks every invariant of oracle.py.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SEEDS = 500
CHUNK = 50
ENGINE_SEAMS = {
    # What the simulation replaces: where connections come from, and the making of tables.
    "asyncpg.connect",
    "llm_orchestrator.store.postgres.prepare",
    "llm_orchestrator.store.postgres.prepare_vectors",
}


def simulate(*arguments: str, module: str = "tests.simulation") -> str:
    """What the command prints; fails with it."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_every_seed_keeps_every_promise(first: int) -> None:
    told = simulate("--seeds", str(CHUNK), "--from", str(first), "--processes", "1")
    assert f"{CHUNK} seeds from {first}: 0 failed" in told


def test_a_seed_is_the_same_each_time() -> None:
    arguments = ("--seeds", "4", "--from", "1000", "--digests", "--processes", "1")
    first = simulate(*arguments)
    assert len({line.split()[1] for line in first.splitlines()[:4]}) == 4
    assert simulate(*arguments) == first


def test_nothing_of_the_engine_or_of_the_writer_is_replaced() -> None:
    """Every class of engine/ and of store/writer.py is the one that its file defines."""
    simulate(module="tests.simulation.untouched")


def test_only_the_plants_patch_anything_else() -> None:
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.name.startswith(("plants", "test_")):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "patch":
                target = node.args[0]
                assert isinstance(target, ast.Constant)
                assert target.value in ENGINE_SEAMS, f"{path.name}: {target.value!r}"

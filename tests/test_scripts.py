"""The scripts that set up and judge: what they refuse, and what they say then."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULT = """<testsuites><testsuite>
  <testcase classname="tests.test_a" name="test_ran"/>
  <testcase classname="tests.test_a" name="test_known">
    <skipped type="pytest.xfail" message="known"/></testcase>
  {}
</testsuite></testsuites>"""
SKIPPED = """<testcase classname="tests.test_a" name="test_slept">
  <skipped type="pytest.skip" message="no server"/></testcase>"""


def could_not_run(folder: Path, case: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "result.xml").write_text(RESULT.format(case))
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts/could_not_run.py"), "result.xml"],
        cwd=folder,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_skipped_test_fails_ci_and_only_ci(tmp_path: Path) -> None:
    on_ci = could_not_run(tmp_path, SKIPPED, CI="true")
    assert on_ci.returncode == 1
    assert "tests.test_a::test_slept: no server" in on_ci.stdout
    assert "test_known" not in on_ci.stdout
    assert could_not_run(tmp_path, SKIPPED).returncode == 0


def test_missing_tool_fails_ci(tmp_path: Path) -> None:
    (tmp_path / ".tools").mkdir()
    (tmp_path / ".tools/missing.txt").write_text("libx: without it nothing sings\n")
    on_ci = could_not_run(tmp_path, "", CI="true")
    assert on_ci.returncode == 1
    assert "nothing sings" in on_ci.stdout


def test_nothing_skipped_passes_ci(tmp_path: Path) -> None:
    assert could_not_run(tmp_path, "", CI="true").returncode == 0


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of what setup reads, in a folder with a space in its name."""
    folder = tmp_path / "a clone"
    for name in ("scripts", "requirements"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def setup(clone: Path, pythons: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run scripts/setup on a machine whose only Pythons are these shell scripts."""
    tools = clone / "bin"
    tools.mkdir()
    for tool in (
        "bash",
        "cat",
        "cut",
        "dirname",
        "env",
        "flock",
        "mkdir",
        "rm",
        "sed",
        "sha256sum",
        "sh",
    ):
        (tools / tool).symlink_to(shutil.which(tool) or tool)
    for name, script in pythons.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    return subprocess.run(
        [str(clone / "scripts/setup")],
        env={"PATH": str(tools), "HOME": str(clone / "home")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_setup_without_a_new_python_says_so(clone: Path) -> None:
    old = setup(clone, {"python3": "exit 1"})
    assert old.returncode == 1
    assert "error: no Python 3.11 or later" in old.stderr
    assert "hint: apt-get install" in old.stderr


def test_setup_without_ensurepip_names_the_package(clone: Path) -> None:
    lacking = setup(clone, {"python3": 'case "$2" in *ensurepip*) exit 1;; esac'})
    assert lacking.returncode == 1
    assert "hint: apt-get install python3-venv" in lacking.stderr
    assert not (clone / ".venv").exists()

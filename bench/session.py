"""One measurement: a process of its own, a fresh folder, one line of JSON back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.contestants import ROOT, Contestant

TIMEOUT_S = 300
_IMPORT = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"


class Failed(Exception):
    """A contestant that gave no result."""


def measure(one: Contestant, work: str, data: Path) -> dict[str, float]:
    """The fields of one result. Raises Failed."""
    folder = Path(tempfile.mkdtemp(dir=data))
    try:
        if work == "W5":
            return {"s": _crash(one, folder)}
        if work == "W7":
            return {"import_s": _import_s(one), "hello_s": _until(one, "W7", folder, "HELLO")}
        return _run(one, work, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(one: Contestant, work: str, folder: Path) -> dict[str, float]:
    with _process(one, work, folder) as process:
        for line in _lines(process):
            if line.startswith("{"):
                fields: dict[str, float] = json.loads(line)
                return fields
    raise Failed(f"{one.name} {work} ended without a result")


def _crash(one: Contestant, folder: Path) -> float:
    """W5: kill -9 with every run inside step 5; seconds from the next start until all moved on."""
    with _process(one, "W5-before", folder) as process:
        _wait_for(process, "READY")
        process.send_signal(signal.SIGKILL)
        process.wait()
    return _until(one, "W5-after", folder, "ADVANCED")


def _until(one: Contestant, work: str, folder: Path, word: str) -> float:
    """Seconds from the start of a process until it says `word`."""
    start = time.perf_counter()
    with _process(one, work, folder) as process:
        _wait_for(process, word)
        return round(time.perf_counter() - start, 4)


def _import_s(one: Contestant) -> float:
    done = subprocess.run(
        [one.python, "-c", _IMPORT.format(one.imports)],
        capture_output=True,
        text=True,
        env=_environment(),
        cwd=ROOT,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise Failed(done.stderr[-500:])
    return round(float(done.stdout), 4)


def _wait_for(process: subprocess.Popen[str], word: str) -> None:
    for line in _lines(process):
        if line == word:
            return
    raise Failed(f"it ended before it said {word}")


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout is not None
    for line in process.stdout:
        yield line.strip()


@contextmanager
def _process(one: Contestant, work: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The contestant at work; whatever happens, it is gone afterwards."""
    command = [one.python, "-m", one.module, work, "--folder", str(folder)]
    if work in one.runs:
        command += ["--runs", str(one.runs[work])]
    with (folder / "stderr").open("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=_environment(), cwd=ROOT
        )
        watchdog = _kill_after(process, TIMEOUT_S)
        try:
            yield process
        except Failed as error:
            errors.seek(0)
            raise Failed(f"{error}: {errors.read()[-1000:]}") from error
        finally:
            watchdog.cancel()
            process.kill()
            process.wait()


def _kill_after(process: subprocess.Popen[str], seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    return timer


def _environment() -> dict[str, str]:
    """This tree, whatever is installed; bytecode may be written: an import takes half as long."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "src")))}

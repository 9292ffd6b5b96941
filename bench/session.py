"""One measurement: processes of their own, a fresh store, one line of JSON back.

A contestant that is about to measure itself says START and waits, so that the session can look at
the database before and after.
"""

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
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple

from bench.contestants import ROOT, Contestant
from bench.database import Database, Probe
from bench.measure import SESSION

TIMEOUT_S = 100
SLOW_S = 300
_IMPORT = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"


class Failed(Exception):
    """A contestant that gave no result."""


class Place(NamedTuple):
    """Where one measurement happens: a folder, and a database or "" for a file in the folder."""

    folder: Path
    url: str = ""
    database: Database | None = None


def measure(
    one: Contestant, work: str, data: Path, database: Database | None = None
) -> dict[str, float]:
    """The fields of one result. Raises Failed."""
    folder = Path(tempfile.mkdtemp(dir=data))
    if one.has_own_store:
        database = None
    fresh = database.fresh() if database is not None else nullcontext("")
    try:
        with fresh as url:
            return _measure(one, work, Place(folder, url, database))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _measure(one: Contestant, work: str, place: Place) -> dict[str, float]:
    if one.has_own_store:
        return _run(one, work, place)
    match work.partition("."):
        case ("W5", _, "second"):
            return {"s": _crash_beside(one, place)}
        case ("W5", _, _):
            return {"s": _crash(one, place)}
        case ("W7", _, _):
            return {"import_s": _import_s(one), "hello_s": _until(one, "W7", place, "HELLO")}
        case ("W8", _, how):
            assert place.database is not None
            has_standby = how.endswith("s")
            with place.database.standby() if has_standby else nullcontext():
                return _many(one, int(how.rstrip("s")), place)
        case ("W9", _, _):
            return _ask(one, place)
    return _run(one, work, place)


def _run(one: Contestant, work: str, place: Place) -> dict[str, float]:
    with _process(one, work, place) as process:
        probe: Probe | None = None
        for line in _lines(process):
            if line == "START":
                probe = place.database.probe() if place.database is not None else None
                _tell(process)
            elif line.startswith("{"):
                fields: dict[str, float] = json.loads(line)
                return {**fields, **(probe.per_step(fields["steps"]) if probe else {})}
        raise Failed(f"{one.name} {work} ended without a result")


def _many(one: Contestant, nodes: int, place: Place) -> dict[str, float]:
    """W8: as many processes on one database, each with runs of its own, from one moment on."""
    assert place.database is not None
    with ExitStack() as stack:
        started = [stack.enter_context(_process(one, "W8", place)) for _ in range(nodes)]
        for process in started:
            _wait_for(process, "START")
        probe = place.database.probe()
        start = time.perf_counter()
        for process in started:
            _tell(process)
        done = [json.loads(_wait_for(process, "{")) for process in started]
        wall_s = time.perf_counter() - start
        steps = sum(fields["steps"] for fields in done)
        cpu_ms = sum(fields["cpu_ms_step"] * fields["steps"] for fields in done)
        own = {"steps_s": round(steps / wall_s, 1), "cpu_ms_step": round(cpu_ms / steps, 4)}
        return {**own, **probe.per_step(steps)}


def _ask(one: Contestant, place: Place) -> dict[str, float]:
    """W9: milliseconds from what the client knows to the first step's beginning on the node."""
    with _process(one, "W9-node", place) as node:
        _wait_for(node, "UP")
        with _process(one, "W9-client", place) as client:
            asked = json.loads(_wait_for(client, "{"))
        begun = json.loads(_wait_for(node, "{"))["begun"]
    fields: dict[str, float] = {}
    for name in ("acked", "sent"):
        delays = [(b - a) / 1e6 for a, b in zip(asked[name], begun, strict=True)]
        cuts = quantiles(delays, n=100, method="inclusive")
        fields |= {f"{name}_p50_ms": round(cuts[49], 2), f"{name}_p99_ms": round(cuts[98], 2)}
    return fields


def _crash(one: Contestant, place: Place) -> float:
    """W5: kill -9 with every run inside step 5; seconds from the next start until all moved on."""
    _get_stuck_and_kill(one, place)
    return _until(one, "W5-after", place, "ADVANCED")


def _crash_beside(one: Contestant, place: Place) -> float:
    """W5.second: the same, but another node is up; seconds from the kill."""
    with _process(one, "W5-after", place) as other:
        _wait_for(other, "UP")
        start = _get_stuck_and_kill(one, place)
        _wait_for(other, "ADVANCED")
        return round(time.perf_counter() - start, 4)


def _get_stuck_and_kill(one: Contestant, place: Place) -> float:
    """The moment of the kill."""
    with _process(one, "W5-before", place) as process:
        _wait_for(process, "READY")
        start = time.perf_counter()
        process.send_signal(signal.SIGKILL)
        process.wait()
        return start


def _until(one: Contestant, work: str, place: Place, word: str) -> float:
    """Seconds from the start of a process until it says `word`."""
    start = time.perf_counter()
    with _process(one, work, place) as process:
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


def _wait_for(process: subprocess.Popen[str], word: str) -> str:
    """The next line that begins with `word`."""
    for line in _lines(process):
        if line.startswith(word):
            return line
    raise Failed(f"it ended before it said {word}")


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout is not None
    for line in process.stdout:
        yield line.strip()


def _tell(process: subprocess.Popen[str]) -> None:
    """Let it go on."""
    assert process.stdin is not None
    process.stdin.write("GO\n")
    process.stdin.flush()


@contextmanager
def _process(one: Contestant, work: str, place: Place) -> Iterator[subprocess.Popen[str]]:
    """The contestant at work; whatever happens, it is gone afterwards, and what it started."""
    command = [one.python, "-m", one.module, work, "--folder", str(place.folder)]
    if place.url:
        command += ["--store", place.url]
    if (family := work.partition(".")[0]) in one.runs:
        command += ["--runs", str(one.runs.get(work, one.runs[family]))]
    with tempfile.TemporaryFile("w+", dir=place.folder) as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=_environment(),
            cwd=ROOT,
            process_group=0,
        )
        watchdog = _kill_after(process, SLOW_S if work.startswith("W5") else TIMEOUT_S)
        try:
            yield process
        except Failed as error:
            errors.seek(0)
            raise Failed(f"{error}: {errors.read()[-1000:]}") from error
        finally:
            watchdog.cancel()
            _kill(process)
            process.wait()


def _kill(process: subprocess.Popen[str]) -> None:
    """Its whole group: a peer may have started a server. Not yet waited for, so it is still its."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _kill_after(process: subprocess.Popen[str], seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, _kill, (process,))
    timer.daemon = True
    timer.start()
    return timer


def _environment() -> dict[str, str]:
    """This tree, whatever is installed; bytecode may be written: an import takes half as long."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, SESSION: "1", "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "src")))}

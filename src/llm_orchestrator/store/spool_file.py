"""A file of the spool: records of paid results, appended and fsynced, read back by a later life.

A record is a line `<blake2b of the rest, hex> <JSON>` with a newline on both sides: a torn tail
ends with its line, and a flipped byte spoils the record that it is in, whichever byte it is. A line
may also say which records of the file are wanted no more; such a mark is not fsynced, so a power
cut may bring records back, nothing else does. Nothing here may run on the event loop.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from llm_orchestrator.model import Draft, Kind, Usage
from llm_orchestrator.store.journal import decode

logger = logging.getLogger(__name__)


class Offer(NamedTuple):
    """A finished paid step that no store is known to have."""

    run_id: str
    step: str
    attempt: int
    epoch: int
    """Under which its driver held the run."""
    store_id: str
    """The store's incarnation."""
    head_seq: int
    head_digest: bytes
    """The journal's last entry that was known to be durable when the result came. The attempt's
    intent is this entry or before it: a journal that does not pass here is another history, and a
    later intent is another attempt's."""
    made_at: int
    payload: bytes
    """As `journal.encode` made it: result, usage, place."""

    @property
    def draft(self) -> Draft:
        """The entry that an adopter appends."""
        return Draft(Kind.STEP_FINISHED, self.step, self.attempt, self.payload)

    @property
    def cost_usd(self) -> float:
        """What the attempt cost."""
        return Usage.from_json(decode(self.payload).get("usage", {})).cost_usd


class SpoolFile:
    """One file, of this life or an earlier one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        """Bytes, as of the last append; marks behind it are small."""
        self._file: int | None = None

    def read(self) -> dict[int, Offer]:
        """What is left in an earlier life's file, by number; damage is reported. Raises OSError."""
        offers, bad, is_torn = parse(self.path.read_bytes())
        if bad:
            logger.warning("%s: %d damaged records are left out", self.path, bad)
        if is_torn:
            logger.warning("%s: the last line was cut off and is left out", self.path)
        return offers

    def append(self, offers: Mapping[int, Offer]) -> None:
        """Make records durable. Raises OSError; the file must not be appended to then any more."""
        is_new = self._file is None
        if self._file is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
            self._file = os.open(self.path, flags, 0o600)
        start = os.fstat(self._file).st_size
        try:
            for number, offer in offers.items():
                _write(self._file, _record(number, offer))
            os.fsync(self._file)
            if is_new:
                _sync_folder(self.path.parent)
            self.size = os.fstat(self._file).st_size
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, start)
            raise

    def mark(self, numbers: Sequence[int]) -> None:
        """Note which records are wanted no more. Raises OSError."""
        line = _line({"gone": numbers})
        if self._file is not None:
            _write(self._file, line)
            return
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            _write(file, line)
        finally:
            os.close(file)

    def empty(self) -> None:
        """Nothing in it is wanted. Not fsynced: what a crash brings back is known to be done."""
        if self._file is not None:
            os.ftruncate(self._file, 0)
            self.size = 0

    def close(self) -> None:
        """Leave the file as it is."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def remove(self) -> None:
        """Take the file away."""
        self.close()
        self.path.unlink(missing_ok=True)


def parse(content: bytes) -> tuple[dict[int, Offer], int, bool]:
    """The records that are wanted, how many lines are damaged, whether the last was cut off."""
    *lines, tail = content.split(b"\n")
    offers: dict[int, Offer] = {}
    bad = sum(not _apply(line, offers) for line in lines if line)
    return offers, bad, bool(tail) and not _apply(tail, offers)


def _apply(line: bytes, offers: dict[int, Offer]) -> bool:
    """Take a line into account; False when it cannot be read."""
    digest, _, body = line.partition(b" ")
    if digest != _digest(body):
        return False
    try:
        data = json.loads(body)
        if "gone" in data:
            for number in data["gone"]:
                offers.pop(number, None)
            return True
        number = data.pop("number")
        data["head_digest"] = bytes.fromhex(data["head_digest"])
        data["payload"] = base64.b64decode(data["payload"])
        offers[number] = Offer(**data)
    except (KeyError, TypeError, ValueError):
        return False
    return True


def _record(number: int, offer: Offer) -> bytes:
    data = offer._asdict()
    data["head_digest"] = offer.head_digest.hex()
    data["payload"] = base64.b64encode(offer.payload).decode()
    return _line({"number": number, **data})


def _line(data: Mapping[str, Any]) -> bytes:
    body = json.dumps(data, separators=(",", ":")).encode("ascii")
    return b"\n" + _digest(body) + b" " + body + b"\n"


def _digest(body: bytes) -> bytes:
    return blake2b(body, digest_size=16).hexdigest().encode()


def _write(file: int, line: bytes) -> None:
    view = memoryview(line)
    while view:
        view = view[os.write(file, view) :]


def make_folder(folder: Path) -> None:
    """Make the folder, private to this user and durable like what will be in it."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in missing:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

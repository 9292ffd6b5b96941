"""An independent ledger of what steps did that reach no server: a file, fsynced line by line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Witness:
    """Where this process writes what it did. Without a path nothing is written (dry imports)."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.url = ""
        self.points: Any = None

    def did(self, key: str) -> None:
        """Put down that `key` was done, durably."""
        assert self.path is not None
        number = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(number, (json.dumps(key) + "\n").encode())
        os.fsync(number)
        os.close(number)

    def hit(self, name: str) -> None:
        """A point inside a Python step."""
        if self.points is not None:
            self.points.hit(name)


WITNESS = Witness()


def done(path: Path) -> list[str]:
    """Everything that was put down."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

"""Where backup files and segments are kept: a folder, or an object store (places_s3.py).

One promise: what `put` or `create` has returned from is durable, and is what was given (checked
against the place's own word where it has one). Half-written things have no name: `put` shows a file
only when it is whole. Names are relative, with `/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from llm_orchestrator.store.copying import Advance


class Kept(NamedTuple):
    """A thing in a place."""

    name: str
    size_bytes: int
    modified_at: float
    """Seconds since 1970, by the place's clock."""
    etag: str = ""


class Place(Protocol):
    """See the module's docstring. All raise StoreError; StoreUnavailable if asking again helps."""

    @property
    def shown(self) -> str:
        """`/folder` or `s3://bucket/prefix`; no secret in it."""
        ...

    async def put(self, file: Path, name: str, *, advance: Advance | None = None) -> Kept:
        """Copy a file there, replacing one of the same name. `advance` is told in any thread."""
        ...

    async def create(self, name: str, content: bytes) -> None:
        """Write a new thing; durable on return. Raises Overtaken when the name is taken already."""
        ...

    async def read(self, name: str) -> bytes:
        """All of a (small) thing. Raises NotFound."""
        ...

    async def peek(self, name: str, size: int) -> bytes:
        """Its first `size` bytes, or all that it has. Raises NotFound."""
        ...

    async def get(self, name: str, file: Path, *, advance: Advance | None = None) -> None:
        """Copy a thing into a local file. Raises NotFound; a failure leaves no file."""
        ...

    async def list(self, prefix: str = "") -> Sequence[Kept]:
        """Everything whose name begins with `prefix`, by name. Not what begins with a dot: ours."""
        ...

    async def remove(self, name: str) -> None:
        """Remove it; nothing happens when it is gone. Raises Denied where it is locked."""
        ...

    async def check(self, *, is_exclusive: bool = True) -> str:
        """Why this place must not be used, or "": a test of writing and reading.

        `is_exclusive`: and that nothing can be created twice. Segments need it, backups do not.
        """
        ...

"""A store as a whole: copied while it is used, put down beside it, exchanged for it.

Three rules. A copy is one consistent cut: everything that `Cut` says was true at one moment, the
dump's. What is put down stands *aside* first (another file, another database) and is a `copy`: it
claims nothing, fires nothing, calls nothing. Only `Aside.take_over` changes the live store, in one
transaction, and keeps what was there under another name; whatever fails before leaves the live one
as it was, and serving.

`sqlite_copy.py` and `postgres_copy.py` are the two that there are; `tables.py` moves rows from one
kind to the other.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple, Protocol

from llm_orchestrator.store.base import Database
from llm_orchestrator.store.tables import Tables


class Role(StrEnum):
    """What `store.role` says that a store may do."""

    PRIMARY = "primary"
    COPY = "copy"
    """Restored aside: opens to look, and as an engine only for whoever says that he knows."""


class RunHead(NamedTuple):
    """Where an unfinished run's journal ended."""

    run_id: str
    seq: int
    digest: str
    """Hex."""
    state: str


class ChainHead(NamedTuple):
    """Where a chain of the audit log ended."""

    chain_id: str
    number: int
    digest: str


class Cut(NamedTuple):
    """What was true of a store at the moment of its copy."""

    kind: str
    """`sqlite` or `postgresql`."""
    schema: int
    server: str
    """The library's or the server's version."""
    size_bytes: int
    incarnation: str
    generation: int
    epoch: int
    """The highest one of any run."""
    taken_at: int
    """Microseconds on the store's clock."""
    counts: Mapping[str, int]
    """Rows of every table but `nodes`."""
    heads: Sequence[RunHead]
    audit_heads: Sequence[ChainHead]


class Identity(NamedTuple):
    """The row of `store`."""

    incarnation: str
    generation: int
    role: str = Role.PRIMARY


Advance = Callable[[int, int], None]
"""Told now and then: bytes done, bytes in all (0 when not known)."""


class Aside(Protocol):
    """A store beside the live one: a scratch file, a scratch database."""

    @property
    def url(self) -> str:
        """Its address, with which it can be opened like any store. Holds a password, maybe."""
        ...

    @property
    def shown(self) -> str: ...

    def store(self) -> Database:
        """The store in it, not opened yet. Its role is `copy`."""
        ...

    def tables(self) -> Tables:
        """Its rows: to fill it from another kind of store, or to fill one."""
        ...

    async def take_over(
        self, identity: Identity, *, last: Callable[[Database], Awaitable[None]] | None = None
    ) -> str:
        """Become the live store, under `identity`, with all nodes dead; the old one's new name.

        Nobody can write to the live store any more when `last` is called with it (opened to look):
        what must be carried over to the very end is carried then, into this store. If anything
        fails, the live store is let in again and nothing has changed. Raises StoreError.
        """
        ...

    async def discard(self) -> None:
        """Remove it, and everything that it needed. Never fails for what is gone already."""
        ...


class Copier(Protocol):
    """Copies one live store, and puts copies beside it. All may raise StoreError."""

    @property
    def kind(self) -> str:
        """`sqlite` or `postgresql`: which dumps `load` takes."""
        ...

    @property
    def shown(self) -> str: ...

    async def size(self) -> int:
        """About how many bytes the live store has; 0 when there is none."""
        ...

    async def identity(self) -> Identity | None:
        """The live store's; None when there is none, or it cannot be read."""
        ...

    async def dump(
        self, folder: Path, *, bytes_per_s: int = 0, advance: Advance | None = None
    ) -> tuple[Path, Cut]:
        """Copy the live store into one new file of `folder`, while it is used.

        `bytes_per_s` bounds what is read (0: no bound). A failure leaves no file.
        """
        ...

    async def check_dump(self, dump: Path) -> str:
        """Why a dump cannot be read, or "". Restores nothing."""
        ...

    async def load(self, dump: Path, *, advance: Advance | None = None) -> Aside:
        """Put a dump of this kind beside the live store. A failure leaves nothing behind."""
        ...

    async def empty(self) -> Aside:
        """A store without runs beside the live one, to fill by `commit`, or with `tables.copy`."""
        ...

    async def kept(self) -> list[str]:
        """Names of the stores that restores have put out of the way, oldest first."""
        ...

    async def drop(self, name: str) -> None:
        """Remove one of `kept`. Raises NotFound."""
        ...

    async def leftovers(self) -> list[str]:
        """Asides whose maker died. The next `load` or `empty` removes them."""
        ...

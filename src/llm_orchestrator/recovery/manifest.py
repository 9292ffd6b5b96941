"""What a backup file says of itself: `metadata.json`, and how it is named.

A backup file is a tar, compressed (gzip or zstandard) and optionally sealed (age), with

    metadata.json       the manifest: readable by people and by later versions
    checksums.sha256    of every other member
    database.*          the dump of one consistent cut (store/copying.py)
    definitions/*.json  the workflows
    config.json         the configuration without secrets
    report.txt          the same for people

Blobs are in the dump. The name is `llm-orchestrator-backup-YYYYMMDD_HHMMSS` (UTC) and an ending:
`.tar.gz`, `.tar.zst`, and `.age` when it is sealed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from llm_orchestrator.errors import StoreDamaged
from llm_orchestrator.store.copying import ChainHead, Cut, RunHead

FORMAT = 1
"""Version of this layout. A newer one is refused."""
PREFIX = "llm-orchestrator-backup-"
ENDINGS = (".tar.gz", ".tar.zst", ".tar.gz.age", ".tar.zst.age")
METADATA = "metadata.json"
CHECKSUMS = "checksums.sha256"


class Manifest(BaseModel):
    """`metadata.json`. Times in ISO 8601 (UTC) for people, and microseconds for us."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: int = FORMAT
    backup_id: str
    """The file's name without its ending."""
    program: str
    """This program's version."""
    created_at: str
    host: str
    duration_s: float
    kind: str
    """`sqlite` or `postgresql`."""
    store: str
    """The store's address, without password."""
    schema_version: int
    server: str
    size_bytes: int
    """The live store's."""
    dump: str
    """The member that holds the dump."""
    dump_bytes: int
    incarnation: str
    generation: int
    epoch: int
    taken_at: int
    """The cut, microseconds on the store's clock."""
    counts: Mapping[str, int]
    heads: list[RunHead] = Field(default_factory=list)
    audit_heads: list[ChainHead] = Field(default_factory=list)
    encryption: str = "none"
    """`none`, or `age` and how many recipients can open it."""
    database: Mapping[str, Any] = Field(default_factory=dict)
    """host, port, name: the words of the earlier system's metadata."""

    @classmethod
    def of(cls, cut: Cut, **facts: Any) -> Manifest:
        """Of a cut; `facts` are everything else."""
        return cls(
            kind=cut.kind,
            schema_version=cut.schema,
            server=cut.server,
            size_bytes=cut.size_bytes,
            incarnation=cut.incarnation,
            generation=cut.generation,
            epoch=cut.epoch,
            taken_at=cut.taken_at,
            counts=dict(cut.counts),
            audit_heads=list(cut.audit_heads),
            **facts,
        )

    def cut(self) -> Cut:
        """The cut, as the copier gave it."""
        return Cut(
            self.kind,
            self.schema_version,
            self.server,
            self.size_bytes,
            self.incarnation,
            self.generation,
            self.epoch,
            self.taken_at,
            self.counts,
            self.heads,
            self.audit_heads,
        )


def read_manifest(content: bytes, name: str) -> Manifest:
    """Parse `metadata.json`. Raises StoreDamaged when it is none, or of a newer layout."""
    try:
        manifest = Manifest.model_validate_json(content)
    except ValueError as error:
        raise StoreDamaged(f"{name}: {METADATA} makes no sense: {error}") from error
    if manifest.format > FORMAT:
        raise StoreDamaged(
            f"{name} was made by a newer version ({manifest.program}, layout {manifest.format})",
            hint="pip install --upgrade llm-orchestrator",
        )
    return manifest


def backup_id_of(name: str) -> str | None:
    """The id in a file's name; None when the file is no backup."""
    base = name.rpartition("/")[2]
    for ending in sorted(ENDINGS, key=len, reverse=True):
        if base.startswith(PREFIX) and base.endswith(ending):
            return base.removesuffix(ending)
    return None

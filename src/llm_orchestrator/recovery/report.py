"""`report.txt`: what a backup file is, for whoever finds it in ten years without this program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llm_orchestrator.model import Json
from llm_orchestrator.recovery.manifest import CHECKSUMS, METADATA, Manifest


def report(manifest: Manifest, config: Mapping[str, Json], warnings: Sequence[str]) -> str:
    """The text, with a line feed at its end."""
    made = f"{manifest.created_at} on {manifest.host}, by llm-orchestrator {manifest.program}"
    server = f"{manifest.kind} {manifest.server}, schema {manifest.schema_version}"
    cut = f"{manifest.taken_at} microseconds after 1970 on the store's clock"
    identity = f"incarnation {manifest.incarnation}, generation {manifest.generation}"
    lines = [
        f"Backup {manifest.backup_id}",
        "",
        f"Made            {made}",
        f"Of              {manifest.store} ({server}), {manifest.size_bytes} bytes",
        f"Dump            {manifest.dump}, {manifest.dump_bytes} bytes: one consistent cut, {cut}",
        f"Encryption      {manifest.encryption}",
        f"Store           {identity}, highest epoch {manifest.epoch}",
        f"Unfinished runs {len(manifest.heads)} named in {METADATA}",
        f"Audit chains    {len(manifest.audit_heads)}",
        "",
        "Rows",
        *(f"  {table:<12} {count}" for table, count in sorted(manifest.counts.items())),
        "",
        *(f"Warning: {warning}" for warning in warnings),
        *([""] if warnings else []),
        f"{len(config)} settings are in config.json, without secrets.",
        "",
        "Check it by hand:        tar xf FILE && sha256sum -c " + CHECKSUMS,
        "Check it:                llmo backup verify FILE",
        "Prove it:                llmo backup prove FILE",
        "Restore it:              llmo restore --backup FILE",
        *_by_hand(manifest),
    ]
    return "\n".join(lines) + "\n"


def _by_hand(manifest: Manifest) -> list[str]:
    if manifest.kind == "sqlite":
        return [f"Without this program:    sqlite3 {manifest.dump} '.tables'"]
    return [f"Without this program:    pg_restore --list {manifest.dump}"]

"""Streams that broke off: the store has what they lack, so a new backup must hold it.

A process that archived `async` and was killed, or one that ended while the place was away, has
committed batches that never came into the archive. Nothing in the archive itself shows that. But
each such process has said in the store, before its first commit of that kind, how it fares (records
of kind `archive`, see stream_store.py). Living nodes look for the records of dead ones, mark the
archive (a rebuild now needs a backup made since), and their keeper makes that backup at once.
"""

from __future__ import annotations

import logging
from typing import Any

from llm_orchestrator.model import MICROSECONDS, Json
from llm_orchestrator.recovery.compact import need_base
from llm_orchestrator.recovery.places import Place
from llm_orchestrator.recovery.unarchived import BEGIN, KIND
from llm_orchestrator.store.base import Batch, Change, Database, PutRecord, lives

logger = logging.getLogger(__name__)
PERIOD_S = 30.0
PATIENCE_S = 30.0
"""A command is no node; it says how it fares at least so often."""


async def heal(place: Place, store: Database, *, is_shared: bool) -> bool:
    """True when a stream was found that lacks something. Raises StoreError.

    `is_shared`: other processes may write; else everybody but this one is dead.
    """
    begun, version = await store.shelf.record(KIND, BEGIN)
    if not isinstance(begun, dict) or begun.get("incarnation") != store.incarnation:
        return False
    records = await store.shelf.records(KIND)
    handled = dict(begun.get("handled") or {})
    alive = await _alive(store, is_shared=is_shared)
    now_us = store.clock.now_us()
    broken: dict[str, dict[str, Any]] = {}
    for stream, value in records.items():
        if stream == BEGIN or not isinstance(value, dict) or "mode" not in value:
            continue
        is_new = value.get("has_hole") and stream not in handled
        if is_new or (
            not _is_alive(stream, value, alive=alive, now_us=now_us) and _is_cut_off(value)
        ):
            broken[stream] = value
    if not broken:
        return False
    await need_base(place, store.incarnation, now_us)
    handled.update(dict.fromkeys(broken, now_us))
    begun = {**begun, "base_from": now_us, "handled": handled}
    changes: list[Change] = [PutRecord(KIND, BEGIN, begun, version)]
    for stream, value in broken.items():
        if not _is_alive(stream, value, alive=alive, now_us=now_us):
            done: Json = {"number": value["number"], "at": value["at"]}
            _, at = await store.shelf.record(KIND, stream)
            changes.append(PutRecord(KIND, stream, done, at))
    receipt = await store.commit(Batch(changes=changes))
    if not receipt.is_refused:  # else another node was at it, and the next look tells
        names = ", ".join(sorted(broken))
        logger.error("the stream archive lacks the end of %s: a new backup is needed", names)
    return True


def base_from(begun: Json) -> int:
    """Since when a backup must be, by the record `begin`; 0: none is needed."""
    if not isinstance(begun, dict):
        return 0
    began_at = 0 if begun.get("is_whole") else int(begun.get("at") or 0)
    return max(began_at, int(begun.get("base_from") or 0))


async def _alive(store: Database, *, is_shared: bool) -> set[str]:
    names = {store.node_id}
    if is_shared:
        names |= {node.node_id for node in await store.shelf.nodes() if lives(node)}
    return names


def _is_alive(stream: str, value: dict[str, Any], *, alive: set[str], now_us: int) -> bool:
    is_node = any(stream == name or stream.startswith(f"{name}.") for name in alive)
    is_fresh = len(alive) > 1 and now_us - int(value.get("at") or 0) < PATIENCE_S * MICROSECONDS
    return is_node or is_fresh


def _is_cut_off(value: dict[str, Any]) -> bool:
    if value.get("is_ended"):
        return bool(value.get("has_hole"))
    return bool(value.get("is_degraded") or value.get("has_hole")) or value["mode"] == "async"

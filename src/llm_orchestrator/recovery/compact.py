"""Letting go of segments that backups hold: after each proof of a backup, and after pruning.

What is needed is what goes on from the oldest backup that is kept, so every kept backup plus the
archive still reaches every moment since. A segment may go when it was last written MARGIN_S before
that backup was made; the margin is more than any two clocks here may differ, and more than any
commit takes. Of a stream that may still be written the last segment stays.

Before the first one goes a mark says so (`archives/INCARNATION.from-MOMENT`): from then on segments
alone are not enough, and a rebuild without a backup is refused instead of being incomplete. Streams
that broke off leave the same mark (stream_heal.py).
"""

from __future__ import annotations

import logging
from typing import NamedTuple

from llm_orchestrator.errors import Overtaken, StoreError
from llm_orchestrator.model import MICROSECONDS
from llm_orchestrator.recovery.places import Kept, Place
from llm_orchestrator.recovery.segments import FOLDER, stream_of
from llm_orchestrator.recovery.unarchived import KIND
from llm_orchestrator.store.base import Batch, Database, PutRecord, lives

logger = logging.getLogger(__name__)
MARKS = "archives/"
_FROM = ".from-"
MARGIN_S = 3_600.0
ENDED_S = 24 * 3_600.0
"""A stream whose process does not live and that has not grown for so long has ended."""


class Compacted(NamedTuple):
    """What went."""

    segments: int = 0
    size_bytes: int = 0
    streams: int = 0
    """That are gone as a whole."""


async def floor_of(place: Place, incarnation: str) -> int:
    """Since when a backup must be with which a rebuild begins, microseconds; 0: none is needed."""
    prefix = f"{MARKS}{incarnation}{_FROM}"
    found = [kept.name.removeprefix(prefix) for kept in await place.list(prefix)]
    return max((int(each) for each in found if each.isdecimal()), default=0)


async def compact(
    place: Place, store: Database, oldest_us: int, *, is_dry: bool = False
) -> Compacted:
    """Let go of what the oldest kept backup (made at `oldest_us`, Unix time) holds.

    Raises StoreError; what is locked stays, and is not counted.
    """
    streams: dict[str, list[Kept]] = {}
    for kept in await place.list(FOLDER):
        known = stream_of(kept.name)
        if known is not None:
            streams.setdefault(known[0], []).append(kept)
    living = {node.node_id for node in await store.shelf.nodes() if lives(node)}
    living.add(store.node_id)
    oldest_s = oldest_us / MICROSECONDS
    doomed: list[Kept] = []
    ended: list[str] = []
    for stream, segments in streams.items():
        segments.sort(key=lambda kept: kept.name)
        is_living = stream.partition(".")[0] in {name.partition(".")[0] for name in living}
        some = [each for each in segments[:-1] if each.modified_at < oldest_s - MARGIN_S]
        if not is_living and segments[-1].modified_at < oldest_s - ENDED_S:
            some = segments
            ended.append(stream)
        doomed += some
    if not doomed or is_dry:
        return _sum(doomed, ended)
    await need_base(place, store.incarnation, oldest_us - int(MARGIN_S * MICROSECONDS))
    gone = [kept for kept in doomed if await _removed(place, kept)]
    for stream in ended:
        _, version = await store.shelf.record(KIND, stream)
        if version:
            await store.commit(Batch(changes=(PutRecord(KIND, stream, None, version),)))
    return _sum(gone, ended)


def _sum(segments: list[Kept], ended: list[str]) -> Compacted:
    return Compacted(len(segments), sum(each.size_bytes for each in segments), len(ended))


async def need_base(place: Place, incarnation: str, moment_us: int) -> None:
    """From now on a rebuild begins with a backup made since that moment. Raises StoreError."""
    try:
        await place.create(f"{MARKS}{incarnation}{_FROM}{moment_us}", b"a backup is needed\n")
    except Overtaken:
        return


async def _removed(place: Place, kept: Kept) -> bool:
    try:
        await place.remove(kept.name)
    except StoreError as error:
        logger.warning("segment %s stays: %s", kept.name, error.message)
        return False
    return True

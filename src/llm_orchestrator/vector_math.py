"""Vectors as bytes, cosine order, and metadata filters: pure functions for every vector store.

No I/O, no state. Must never give two orders for the same data, with numpy or without it: scores are
computed in float64, rounded to 9 places, and ties go to the lower index. numpy is used when it is
installed and imported on first use; the fallback is plain Python, good for thousands of vectors.
"""

from __future__ import annotations

import heapq
import importlib
import math
import operator
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llm_orchestrator.errors import InputError
from llm_orchestrator.model import Json

_FLOAT_BYTES = 4
_BLOCK_ROWS = 4096
_PLACES = 9


def pack(vector: Sequence[float]) -> bytes:
    """Little-endian float32, 4 bytes a number. Raises InputError for what is no finite number."""
    try:
        blob = struct.pack(f"<{len(vector)}f", *vector)
    except (struct.error, OverflowError, TypeError) as error:
        raise InputError(f"a vector holds something that is no float32: {error}") from error
    if not all(math.isfinite(value) for value in vector):
        raise InputError("a vector holds a number that is not finite")
    return blob


def unpack(blob: bytes) -> list[float]:
    """The inverse of `pack`, to float32's precision."""
    if len(blob) % _FLOAT_BYTES:
        raise InputError(f"{len(blob)} bytes are no float32 vector")
    return list(struct.unpack(f"<{len(blob) // _FLOAT_BYTES}f", blob))


def top_k(query: Sequence[float], blobs: Sequence[bytes], k: int) -> list[tuple[int, float]]:
    """The `k` nearest of `blobs` by cosine: (index, score in -1 to 1), best first.

    A vector of zeros scores 0. Raises InputError when a blob's dimension is not the query's.
    """
    expected = len(query) * _FLOAT_BYTES
    for blob in blobs:
        if len(blob) != expected:
            raise InputError(
                f"the query has {len(query)} dimensions, a stored vector {len(blob) // 4}",
                hint="search with the embedding model that filled this index",
            )
    if k <= 0 or not blobs or not query:
        return []
    query = unpack(pack(query))  # compare float32 with float32, on both paths
    scores = _cosines_numpy(query, blobs) or _cosines_plain(query, blobs)
    best = heapq.nsmallest(k, range(len(scores)), key=lambda index: (-scores[index], index))
    return [(index, scores[index]) for index in best]


def _cosines_numpy(query: Sequence[float], blobs: Sequence[bytes]) -> list[float] | None:
    """None when numpy is not installed."""
    try:
        numpy: Any = importlib.import_module("numpy")
    except ImportError:
        return None
    wanted = numpy.asarray(query, dtype=numpy.float64)
    length = math.sqrt(float(wanted @ wanted))
    scores: list[float] = []
    for start in range(0, len(blobs), _BLOCK_ROWS):
        block = blobs[start : start + _BLOCK_ROWS]
        rows = numpy.frombuffer(b"".join(block), dtype="<f4").reshape(len(block), -1)
        rows = rows.astype(numpy.float64)
        both = numpy.sqrt(numpy.einsum("ij,ij->i", rows, rows)) * length
        cosines = numpy.divide(rows @ wanted, both, out=numpy.zeros_like(both), where=both > 0)
        scores += numpy.round(numpy.clip(cosines, -1.0, 1.0), _PLACES).tolist()
    return scores


def _cosines_plain(query: Sequence[float], blobs: Sequence[bytes]) -> list[float]:
    length = math.sqrt(math.fsum(value * value for value in query))
    scores = []
    for blob in blobs:
        vector = unpack(blob)
        dot = math.fsum(map(operator.mul, query, vector))
        both = length * math.sqrt(math.fsum(value * value for value in vector))
        scores.append(round(max(-1.0, min(1.0, dot / both)), _PLACES) if both else 0.0)
    return scores


def matches(filter: Mapping[str, Json] | None, metadata: Mapping[str, Json]) -> bool:  # noqa: A002
    """True when `metadata` fits `filter`.

    `{"lang": "en"}` asks for equality (or, of a list, that it holds the value); an object of
    operators asks for `$eq $ne $in $nin $gt $gte $lt $lte $exists`; `$and` and `$or` take lists of
    filters; `a.b` looks inside. A missing key fits only `$ne`, `$nin` and `{"$exists": false}`.
    Raises InputError for an unknown operator or a filter of the wrong shape, whatever the metadata.
    """
    check_filter(filter)
    return _fits(filter or {}, metadata)


def check_filter(filter: Json) -> None:  # noqa: A002
    """Raise InputError unless `filter` is None or a filter that `matches` understands."""
    if filter is None:
        return
    if not isinstance(filter, Mapping):
        raise InputError(f"a filter is an object, not {type(filter).__name__}")
    for key, wanted in filter.items():
        if key in {"$and", "$or"}:
            if not isinstance(wanted, list) or not wanted:
                raise InputError(f"{key} takes a list of filters")
            for part in wanted:
                check_filter(part)
        elif key.startswith("$"):
            raise InputError(f"unknown filter operator {key}; known: $and, $or at this place")
        elif isinstance(wanted, Mapping):
            _check_operators(key, wanted)


def _check_operators(key: str, wanted: Mapping[str, Json]) -> None:
    if not wanted:
        raise InputError(f"the filter of {key} is empty")
    for name, value in wanted.items():
        if name not in _OPERATORS:
            known = ", ".join(_OPERATORS)
            raise InputError(f"unknown filter operator {name} for {key}; known: {known}")
        if name in {"$in", "$nin"} and not isinstance(value, list):
            raise InputError(f"{name} of {key} takes a list")


def _fits(filter: Mapping[str, Json], metadata: Mapping[str, Json]) -> bool:  # noqa: A002
    for key, wanted in filter.items():
        if key == "$and":
            fits = all(_fits(part, metadata) for part in wanted)
        elif key == "$or":
            fits = any(_fits(part, metadata) for part in wanted)
        else:
            operators = wanted if isinstance(wanted, Mapping) else {"$eq": wanted}
            found = _look_up(key, metadata)
            fits = all(_OPERATORS[name](found, value) for name, value in operators.items())
        if not fits:
            return False
    return True


class _Missing:
    """What a key that is not there holds: equal to nothing."""


_MISSING = _Missing()


def _look_up(key: str, metadata: Mapping[str, Json]) -> Json:
    """A key as it stands wins over a path of the same spelling."""
    if key in metadata:
        return metadata[key]
    found: Json = metadata
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return _MISSING
        found = found[part]
    return found


def _same(found: Json, wanted: Json) -> bool:
    """JSON's equality: true is not 1, but 1 is 1.0."""
    if isinstance(found, bool) is not isinstance(wanted, bool):
        return False
    return bool(found == wanted)


def _equals(found: Json, wanted: Json) -> bool:
    if _same(found, wanted):
        return True
    return isinstance(found, list) and any(_same(one, wanted) for one in found)


def _ordered(compare: Callable[[Any, Any], bool]) -> Callable[[Json, Json], bool]:
    """Numbers compare with numbers and texts with texts; anything else does not fit."""

    def fits(found: Json, wanted: Json) -> bool:
        for kind in (str, int | float):
            if isinstance(found, kind) and isinstance(wanted, kind):
                return isinstance(found, bool) is isinstance(wanted, bool) and compare(
                    found, wanted
                )
        return False

    return fits


_OPERATORS: Mapping[str, Callable[[Json, Json], bool]] = {
    "$eq": _equals,
    "$ne": lambda found, wanted: not _equals(found, wanted),
    "$in": lambda found, wanted: any(_equals(found, one) for one in wanted),
    "$nin": lambda found, wanted: not any(_equals(found, one) for one in wanted),
    "$gt": _ordered(operator.gt),
    "$gte": _ordered(operator.ge),
    "$lt": _ordered(operator.lt),
    "$lte": _ordered(operator.le),
    "$exists": lambda found, wanted: (found is not _MISSING) is bool(wanted),
}

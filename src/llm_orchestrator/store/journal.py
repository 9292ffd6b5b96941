"""The journal: how an entry becomes bytes, how entries are chained, how a chain is checked.

Every entry's digest covers the digest before it and every column of its own that means anything, each
with its length (so no two different entries look alike), over the *stored* payload bytes:

    digest(n) = blake2b-256(lengths | digest(n-1) | run_id | seq | epoch | kind | step | attempt | payload)

So a flipped bit, an edited payload, a missing or moved row shows at once, and two histories that
share a digest share everything before it. What the chain cannot see is a missing tail; the head is
anchored in `runs` at each state change and in `commits`. `recorded_at` is for people: nothing
decides by it, and it is not covered.

A payload is a JSON object. Its first byte says how it is stored:
`{` canonical JSON as it is; 1 zlib; 2 JSON with escaped values (see `_escape`); 3 a reference to `blobs`.
Nothing that was paid for is thrown away because JSON cannot say it: NaN, bytes, lone surrogates and
foreign objects are stored escaped.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import enum
import json
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from json.encoder import c_make_encoder, encode_basestring  # type: ignore[attr-defined]
from typing import Any

from llm_orchestrator.errors import StoreDamaged, TooLarge
from llm_orchestrator.model import Entry, Flaw, Json

GENESIS = bytes(32)
"""The digest before entry 1."""

COMPRESS_BYTES_MIN = 64 << 10
BLOB_BYTES_MIN = 1 << 20
PAYLOAD_BYTES_MAX = 64 << 20

_ZLIB, _ESCAPED, _BLOB = b"\x01", b"\x02", b"\x03"
_HEADER = struct.Struct(">HHIQQII")
_DEPTH_MAX = 200
_NOT_JSON = (TypeError, ValueError, RecursionError)  # UnicodeEncodeError is a ValueError


def _default(value: object) -> object:
    """JSON for the ordinary Python values that have one obvious form."""
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    dump = getattr(value, "model_dump", None)  # a pydantic model, without importing pydantic
    if callable(dump):
        return dump(mode="json")
    raise TypeError(f"{type(value).__name__} is not JSON")


def _make_dumps() -> Callable[[Any], str]:
    """`json.JSONEncoder.encode` without building its C encoder anew for every call (4 us of 6)."""
    encoder = json.JSONEncoder(
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=False,
        allow_nan=False,
        check_circular=False,
        default=_default,
    )
    if c_make_encoder is None:
        return encoder.encode
    parts = c_make_encoder(
        None,
        _default,
        encode_basestring,
        None,
        ":",
        ",",
        True,
        False,
        False,
    )

    def dumps(value: Any) -> str:
        return "".join(parts(value, 0))

    return dumps


_dumps = _make_dumps()
_dumps_ascii = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
).encode
_scan = json.JSONDecoder().raw_decode


def canonical(value: Json) -> bytes:
    """Canonical JSON: sorted keys, no blanks, UTF-8. Raises ValueError or TypeError if not JSON."""
    return _dumps(value).encode()


def encode(data: Mapping[str, Json]) -> bytes:
    """Payload bytes for `data`. Never fails for its content; raises TooLarge for its size."""
    try:
        return _pack(_dumps(data).encode())
    except _NOT_JSON:
        return _pack(_ESCAPED + _dumps_ascii(_escape(data, 0)).encode("ascii"))


def round_trip(data: Mapping[str, Json]) -> tuple[bytes, dict[str, Json]]:
    """A payload and what a replay will read from it: what is live equals what is recorded."""
    try:
        text = _dumps(data)
        return _pack(text.encode()), _scan(text)[0]
    except _NOT_JSON:
        payload = encode(data)
        return payload, decode(payload)


def _pack(payload: bytes) -> bytes:
    if len(payload) < COMPRESS_BYTES_MIN:
        return payload
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise TooLarge(
            f"a result of {len(payload)} bytes; a step may record {PAYLOAD_BYTES_MAX} at most",
            hint="write it elsewhere and return its address",
        )
    packed = _ZLIB + zlib.compress(payload, 1)
    return packed if len(packed) < len(payload) else payload


def decode(payload: bytes) -> dict[str, Json]:
    """The inverse of `encode`. Raises StoreDamaged for bytes that no `encode` made."""
    try:
        if payload[:1] == _ZLIB:
            payload = zlib.decompress(payload[1:])
        if payload[:1] == _ESCAPED:
            value = _unescape(json.loads(payload[1:]))
        else:
            value = json.loads(payload.decode())
    except (ValueError, zlib.error, RecursionError) as error:
        raise StoreDamaged(f"a recorded payload does not decode: {error}") from error
    if not isinstance(value, dict):
        raise StoreDamaged("a recorded payload is no JSON object")
    return value


def blob_reference(payload: bytes) -> bytes:
    """What an entry stores instead of a payload that goes to `blobs`."""
    return _BLOB + blake2b(payload, digest_size=32).digest()


def blob_digest(payload: bytes) -> bytes | None:
    """The digest of the blob that a stored payload refers to, or None when it refers to none."""
    return payload[1:] if payload[:1] == _BLOB else None


def is_blob_intact(reference: bytes, blob: bytes) -> bool:
    """True when `blob` is what `reference` refers to."""
    return blob_reference(blob) == reference


def chain(previous: bytes, entry: Entry) -> bytes:
    """The digest of `entry` after the entry with digest `previous`."""
    return link(previous, entry.run_id, entry[1:7])


def link(previous: bytes, run_id: str, columns: tuple[int, int, str, str, int, bytes]) -> bytes:
    """Like `chain`, for `(seq, epoch, kind, step, attempt, payload)` that are no Entry yet."""
    seq, epoch, kind, step, attempt, payload = columns
    run, word, path = run_id.encode(), kind.encode(), step.encode("utf-8", "surrogatepass")
    header = _HEADER.pack(len(run) << 16 | len(word), len(path), seq, epoch, attempt, len(payload))
    return blake2b(b"".join((header, previous, run, word, path, payload)), digest_size=32).digest()


def verify(
    run_id: str, entries: Sequence[Entry], *, known: Iterable[tuple[int, bytes]] = ()
) -> list[Flaw]:
    """Check a whole chain, from entry 1. An empty list means that every byte fits.

    `known` holds (seq, digest) of rows that a repair has already given up: their content is not
    looked at, their digest (empty for a row that is gone) still links the chain.
    A row after a missing one cannot be checked (its predecessor's digest is gone) and counts as lost.
    """
    given_up = dict(known)
    flaws: list[Flaw] = []
    previous: bytes | None = GENESIS
    expected = 1
    for position, entry in enumerate(entries):
        if entry.seq != expected:
            missing = [seq for seq in range(expected, entry.seq) if given_up.get(seq) != b""]
            flaws.extend(Flaw(run_id, seq, "row missing", is_mendable=False) for seq in missing)
            previous = None
        expected = entry.seq + 1
        if given_up.get(entry.seq) == entry.digest:
            previous = entry.digest
            continue
        if previous is None:
            what = "cannot be checked: the row before it is missing"
            flaws.append(Flaw(run_id, entry.seq, what, is_mendable=False))
            previous = entry.digest
            continue
        digest = _chain_or_none(previous, entry)
        if digest == entry.digest:
            previous = digest
            continue
        follower = entries[position + 1] if position + 1 < len(entries) else None
        if digest and follower and _chain_or_none(digest, follower) == follower.digest:
            flaws.append(
                Flaw(run_id, entry.seq, "stored digest flipped; the entry itself is whole")
            )
            previous = digest
        else:
            flaws.append(
                Flaw(run_id, entry.seq, "entry does not fit its digest", is_mendable=False)
            )
            previous = entry.digest
    return flaws


def _chain_or_none(previous: bytes, entry: Entry) -> bytes | None:
    """Damage may put any type into any column; such a row fits nothing."""
    try:
        return chain(previous, entry)
    except (struct.error, AttributeError, TypeError, ValueError):
        return None


def _escape(value: object, depth: int) -> object:
    """Any Python value as JSON. What JSON lacks becomes a one-key object whose key starts with `$`."""
    if depth > _DEPTH_MAX:
        return {"$repr": repr(value)[:1000]}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, bytes | bytearray | memoryview):
        return {"$bytes": base64.b64encode(bytes(value)).decode()}
    if isinstance(value, Mapping):
        plain = {
            key if isinstance(key, str) else str(key): _escape(item, depth + 1)
            for key, item in value.items()
        }
        is_marker = len(plain) == 1 and next(iter(plain)).startswith("$")
        return {"$object": plain} if is_marker else plain
    if isinstance(value, list | tuple | set | frozenset):
        return [_escape(item, depth + 1) for item in value]
    try:
        return _escape(_default(value), depth + 1)
    except Exception:  # whatever a foreign object does when asked, its repr is kept
        return {"$repr": _safe_repr(value)}


def _safe_repr(value: object) -> str:
    try:
        return repr(value)[:10_000]
    except Exception:
        return f"<{type(value).__name__}>"


def _unescape(value: Json) -> Json:
    if isinstance(value, list):
        return [_unescape(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        [(key, item)] = value.items()
        if key == "$float":
            return float(item)
        if key in ("$bytes", "$repr"):
            return item  # a replay sees text: JSON has no bytes
        if key == "$object":
            return {name: _unescape(inner) for name, inner in item.items()}
    return {key: _unescape(item) for key, item in value.items()}

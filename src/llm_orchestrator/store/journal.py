"""The journal: how an entry becomes bytes, how entries are chained, how a chain is checked.

Every entry's digest covers the digest before it and every column of its own that means anything,
each with its length (so no two different entries look alike), over the *stored* payload bytes:

    digest(n) = blake2b-256(lengths | digest(n-1) | run_id | seq | epoch | kind | step | attempt |
    payload)

So a flipped bit, an edited payload, a missing or moved row shows at once, and two histories that
share a digest share everything before it. What the chain cannot see is a missing tail; the head is
anchored in `runs` at each state change and in `commits`. `recorded_at` is for people: nothing
decides by it, and it is not covered.

A payload is a JSON object. Its first byte says how it is stored: `{` canonical JSON as it is; 1
zlib; 2 JSON with escaped values (see escape.py); 3 a reference to `blobs`. Nothing that was paid
for is thrown away because JSON cannot say it: NaN, bytes, lone surrogates and foreign objects are
stored escaped. What runs bring forth passes `round_trip` or `encode_clean`, which leave secrets
out; `encode` is for what is compared or digested: it must not depend on what a process knows.
"""

from __future__ import annotations

import contextlib
import json
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from json.encoder import c_make_encoder, encode_basestring  # type: ignore[attr-defined]
from typing import Any

from llm_orchestrator.errors import StoreDamaged, TooLarge
from llm_orchestrator.model import Entry, Flaw, Json
from llm_orchestrator.store.escape import default, escape, unescape
from llm_orchestrator.telemetry.redact import is_in_data, redact_data

GENESIS = bytes(32)
"""The digest before entry 1."""

COMPRESS_BYTES_MIN = 64 << 10
BLOB_BYTES_MIN = 1 << 20
PAYLOAD_BYTES_MAX = 64 << 20

_ZLIB, _ESCAPED, _BLOB = b"\x01", b"\x02", b"\x03"
_HEADER = struct.Struct(">HHIQQII")
GAP_MAX = 1_000
"""Rows behind a gap longer than this are out of reach: a row's number was damaged."""


def _make_dumps() -> Callable[[Any], str]:
    """`json.JSONEncoder.encode` without building its C encoder anew for every call (4 us of 6)."""
    encoder = json.JSONEncoder(
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=False,
        allow_nan=False,
        check_circular=False,
        default=default,
    )
    if c_make_encoder is None:
        return encoder.encode
    parts = c_make_encoder(
        None,
        default,
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
        payload = _dumps(data).encode()
    except Exception:  # noqa: BLE001 - foreign objects raise what they like
        payload = _ESCAPED + _escaped(data).encode("ascii")
    return _pack(payload)


class Stored(bytes):
    """A JSON value that is encoded already: copies are written as they were, byte for byte."""


def encode_value(value: Json) -> bytes:
    """Payload bytes of a column that holds one value."""
    return bytes(value) if isinstance(value, Stored) else encode({"value": value})


def canonical_value(value: Json) -> bytes:
    """`canonical`, for what may be encoded already."""
    return bytes(value) if isinstance(value, Stored) else canonical(value)


def encode_clean(data: Mapping[str, Json]) -> bytes:
    """`encode` without the secrets that this process knows."""
    try:
        text = _dumps(data)
        payload = text.encode()
    except Exception:  # noqa: BLE001 - as above
        return _round_trip_escaped(data)[0]
    return _clean(_scan(text)[0])[0] if is_in_data(text) else _pack(payload)


def round_trip(data: Mapping[str, Json]) -> tuple[bytes, dict[str, Json]]:
    """A payload and what a replay will read from it: what is live equals what is recorded.

    Neither holds a secret that this process knows.
    """
    try:
        text = _dumps(data)
        payload, value = text.encode(), _scan(text)[0]
    except Exception:  # noqa: BLE001 - as above
        return _round_trip_escaped(data)
    return _clean(value) if is_in_data(text) else (_pack(payload), value)


def _round_trip_escaped(data: Mapping[str, Json]) -> tuple[bytes, dict[str, Json]]:
    text = _escaped(data)
    payload = _pack(_ESCAPED + text.encode("ascii"))
    value = decode(payload)
    return _clean(value) if is_in_data(text) else (payload, value)


def _clean(value: dict[str, Json]) -> tuple[bytes, dict[str, Json]]:
    payload = encode(redact_data(value))
    return payload, decode(payload)  # a key that changed stands elsewhere now


def _escaped(data: Mapping[str, Json]) -> str:
    return _dumps_ascii(escape(data))


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
        try:
            value = _parse(payload)
        except RecursionError:
            value = _parse_on_empty_stack(payload)
    except (
        ValueError,
        TypeError,
        AttributeError,
        ArithmeticError,
        zlib.error,
        RecursionError,
    ) as error:
        raise StoreDamaged(f"a recorded payload does not decode: {error}") from error
    if not isinstance(value, dict):
        raise StoreDamaged("a recorded payload is no JSON object")
    return value


def _parse(payload: bytes) -> Json:
    if payload[:1] == _ZLIB:
        payload = zlib.decompress(payload[1:])
    if payload[:1] == _ESCAPED:
        return unescape(json.loads(payload[1:]))
    return json.loads(payload.decode())


def _parse_on_empty_stack(payload: bytes) -> Json:
    """What could just be written where the stack was low must be readable where it is high."""
    found: list[Json] = []

    def parse() -> None:
        with contextlib.suppress(RecursionError):
            found.append(_parse(payload))

    thread = threading.Thread(target=parse)
    thread.start()
    thread.join()
    if not found:
        raise RecursionError("nested too deeply")
    return found[0]


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
    header = _HEADER.pack(len(run), len(word), len(path), seq, epoch, attempt, len(payload))
    return blake2b(b"".join((header, previous, run, word, path, payload)), digest_size=32).digest()


def verify(
    run_id: str,
    entries: Sequence[Entry],
    *,
    known: Iterable[tuple[int, bytes]] = (),
    anchor: bytes = b"",
) -> list[Flaw]:
    """Check a whole chain, from entry 1. An empty list means that every byte fits.

    `known` holds (seq, digest) of rows that a repair has already given up: their content is not
    looked at, their digest (empty for a row that is gone) still links the chain. `anchor` is the
    last entry's digest as it stands elsewhere: a second copy.
    A row after a missing one cannot be checked (its predecessor's digest is gone): it is lost too.
    """
    given_up = dict(known)
    flaws: list[Flaw] = []
    previous: bytes | None = GENESIS
    expected = 1

    def complain(seq: int, what: str, *, is_mendable: bool = False) -> None:
        flaws.append(Flaw(run_id, seq, what, is_mendable))

    for position, entry in enumerate(entries):
        if entry.seq < expected:
            complain(entry.seq, "row is there twice")
            continue
        if entry.seq > expected:
            for seq in range(expected, min(entry.seq, expected + GAP_MAX)):
                if given_up.get(seq) != b"":
                    complain(seq, "row missing")
            previous = None
        expected = entry.seq + 1
        if given_up.get(entry.seq) == entry.digest:
            previous = entry.digest
            continue
        if previous is None:
            complain(entry.seq, "cannot be checked: the row before it is missing")
            previous = entry.digest
            continue
        digest = chain_or_none(previous, entry)
        if digest == entry.digest:
            previous = digest
            continue
        follower = entries[position + 1] if position + 1 < len(entries) else None
        if digest and _is_right(digest, follower, anchor):
            complain(entry.seq, "stored digest flipped; the entry is whole", is_mendable=True)
            previous = digest
        else:
            complain(entry.seq, "entry does not fit its digest")
            previous = entry.digest
    return flaws


def _is_right(digest: bytes, follower: Entry | None, anchor: bytes) -> bool:
    """True when something else vouches for a computed digest: the next entry, or a copy of it."""
    if follower is None:
        return digest == anchor
    return chain_or_none(digest, follower) == follower.digest


def chain_or_none(previous: bytes, entry: Entry) -> bytes | None:
    """Like `chain`; damage may put anything into any column, and such a row fits nothing."""
    try:
        return chain(previous, entry)
    except (struct.error, AttributeError, TypeError, ValueError):
        return None

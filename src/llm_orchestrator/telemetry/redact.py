"""The secrets that this process has resolved, and texts without them.

Whoever resolves a secret calls `remember`; whoever lets a text out (a log line, an error for the
journal, an answer) calls `redact`. Found are whole values, as they are and as they look in JSON,
in Python's repr, percent-encoded and in base64, there also in the middle of something longer
(`Basic` holds name and password). Not found are pieces, hashes and ciphers of them.

It holds secrets in memory only, and it never logs.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from threading import Lock
from typing import Any
from urllib.parse import quote, quote_plus, unquote

MASK = "***"
CHARACTERS_MIN = 8
"""Shorter values are words that occur by themselves."""
VALUES_MAX = 256
"""Then the one that was not resolved for longest is forgotten."""
_ESCAPE = re.compile(r"%[0-9A-F]{2}")


class Registry:
    """Values and every form in which they may appear. Any thread may use it."""

    def __init__(self, values_max: int = VALUES_MAX) -> None:
        self._values_max = values_max
        self._known: OrderedDict[str, frozenset[str]] = OrderedDict()
        self._forms: tuple[str, ...] = ()
        """Longest first: a value may be a part of another."""
        self._lock = Lock()

    def remember(self, value: str) -> None:
        """Take `value` out of every text from now on; too short ones are let through."""
        value = value.strip()
        if len(value) < CHARACTERS_MIN:
            return
        with self._lock:
            if value in self._known:
                self._known.move_to_end(value)
                return
            self._known[value] = frozenset(_forms(value))
            if len(self._known) > self._values_max:
                self._known.popitem(last=False)
            every = frozenset().union(*self._known.values())
            self._forms = tuple(sorted(every, key=len, reverse=True))

    def redact(self, text: str) -> str:
        """`text` with `***` for each secret."""
        for form in self._forms:
            if form in text:
                text = text.replace(form, MASK)
        return text

    def redact_json(self, value: Any) -> Any:
        """The same for every text in a JSON value, keys too."""
        return self._clean(value) if self._forms else value

    def _clean(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.redact(value)
        if isinstance(value, Mapping):
            return {self._clean(key): self._clean(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self._clean(each) for each in value]
        return value


def _forms(value: str) -> Iterator[str]:
    """How `value` may be written; none is shorter than what base64 of the shortest leaves."""
    yield from (value, " ".join(value.split()), repr(value)[1:-1])
    yield from (json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1])
    raw = value.encode("utf-8", "surrogatepass")
    for escaped in (quote(raw, safe=""), quote(raw), quote_plus(raw)):
        yield escaped
        yield _ESCAPE.sub(lambda found: found[0].lower(), escaped)
    for form in _base64_forms(raw):
        yield form
        yield form.replace("+", "-").replace("/", "_")
        yield quote(form, safe="")


def _base64_forms(raw: bytes) -> Iterator[str]:
    """All of it, and what stays the same whatever stands before and after it."""
    whole = b64encode(raw).decode()
    yield whole
    yield whole.rstrip("=")
    for before in range(3):
        bits = 8 * before
        first, last = -(-bits // 6), (bits + 8 * len(raw)) // 6
        yield b64encode(b"\0" * before + raw).decode()[first:last]


def passwords_in(url: str) -> Iterator[str]:
    """What is secret in a URL, as it is written and as it is meant.

    That is the password, before the host or as an option. One that is the user's name, too, is no
    secret: it stands in every message about that user.
    """
    where, _, options = url.partition("://")[2].partition("?")
    user, colon, password = where.rpartition("@")[0].partition(":")
    found = [password] if colon else []
    for option in options.partition("#")[0].split("&"):
        name, _, value = option.partition("=")
        if name.lower() in ("password", "sslpassword"):
            found.append(value)
    for each in found:
        if each and unquote(each) != unquote(user):
            yield each
            yield unquote(each)


_own = Registry()
remember = _own.remember
redact = _own.redact
redact_json = _own.redact_json

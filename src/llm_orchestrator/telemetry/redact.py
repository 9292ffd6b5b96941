"""The secrets that this process has resolved, and texts without them.

Whoever resolves a secret calls `remember`; whoever lets a text out (a log line, an error, an
answer) calls `redact`. What runs bring forth is data: `store/journal.py` asks `is_in_data` of its
JSON before it is recorded and takes secrets out with `redact_data`; streamed answers go through a
`Veil`. Both leave out secrets that are plain words: no password may change what an answer says.

Found are whole values, as they are and as they look in JSON, in Python's repr, percent-encoded and
in base64, there also in the middle of something longer (`Basic` holds name and password). Not found
are pieces, hashes, ciphers and numbers.

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
WORD_CHARACTERS_MAX = 11
"""Only small letters and no more of them: a word, which may stand in data for what it says."""
VALUES_MAX = 256
"""Then the one that was not resolved for longest is forgotten."""
_BEGINNING = 8
_ESCAPE = re.compile(r"%[0-9A-F]{2}")


class Registry:
    """Values and every form in which they may appear. Any thread may use it."""

    def __init__(self, values_max: int = VALUES_MAX) -> None:
        self._values_max = values_max
        self._known: OrderedDict[str, tuple[frozenset[str], frozenset[str]]] = OrderedDict()
        """Each value's forms, and its probes."""
        self._forms: tuple[str, ...] = ()
        """Longest first: a value may be a part of another."""
        self._probes: tuple[str, ...] = ()
        """A JSON text without any of these holds none of the forms in any of its texts."""
        self._beginnings: frozenset[str] = frozenset()
        """The first characters of each form, up to `_BEGINNING` of them."""
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
            forms = frozenset(_forms(value))
            self._known[value] = forms, _probes(forms)
            if len(self._known) > self._values_max:
                self._known.popitem(last=False)
            every = frozenset().union(*(forms for forms, _ in self._known.values()))
            self._probes = tuple(frozenset().union(*(known for _, known in self._known.values())))
            self._forms = tuple(sorted(every, key=len, reverse=True))
            self._beginnings = frozenset(
                form[:end] for form in every for end in range(1, min(_BEGINNING, len(form)) + 1)
            )

    def redact(self, text: str) -> str:
        """`text` with `***` for each secret."""
        for form in self._forms:
            if form in text:
                text = text.replace(form, MASK)
        return text

    def redact_json(self, value: Any) -> Any:
        """The same for every text in a JSON value, keys too, however deep it is."""
        box = [value]
        todo: list[Any] = [box] if self._forms else []
        while todo:
            holder = todo.pop()
            for place, each in list(holder.items() if type(holder) is dict else enumerate(holder)):
                if isinstance(each, str):
                    holder[place] = self.redact(each)
                elif isinstance(each, Mapping):
                    holder[place] = {
                        self.redact(key) if isinstance(key, str) else key: item
                        for key, item in each.items()
                    }
                    todo.append(holder[place])
                elif isinstance(each, list | tuple):
                    holder[place] = list(each)
                    todo.append(holder[place])
        return box[0]

    def is_in(self, text: str) -> bool:
        """False when none of the texts in this JSON text holds a secret."""
        for probe in self._probes:  # noqa: SIM110 (a generator costs as much as what it asks)
            if probe in text:
                return True
        return False

    def closed(self, text: str) -> int:
        """How much of a text that goes on can be judged now: what follows may begin a secret."""
        forms = self._forms
        if not forms:
            return len(text)
        end = self._before_open(text, max(0, len(text) - len(forms[0]) + 1))
        while end < len(text):
            over = self._across(text, end)
            if over is None:
                break
            end = self._before_open(text, over)
        return end

    def _before_open(self, text: str, start: int) -> int:
        """The first place from `start` on behind which all may be the beginning of a form."""
        for place in range(start, len(text)):
            if text[place : place + _BEGINNING] in self._beginnings:
                tail = text[place:]
                if any(len(form) > len(tail) and form.startswith(tail) for form in self._forms):
                    return place
        return len(text)

    def _across(self, text: str, place: int) -> int | None:
        """Where the longest form ends that lies across `place`."""
        for form in self._forms:
            start = max(0, place - len(form) + 1)
            found = text.find(form, start, place + len(form) - 1)
            if found >= 0:
                return found + len(form)
        return None


class Veil:
    """One text that comes in pieces, without secrets, also without those that lie across pieces.

    The pieces that it gives are those of `redact(whole text)`. What may be the beginning of a
    secret is held back until the next piece tells.
    """

    __slots__ = ("_held", "_registry")

    def __init__(self, registry: Registry | None = None) -> None:
        self._registry = registry or _in_data
        self._held = ""

    def push(self, piece: str) -> str:
        """What may be shown now."""
        text = self._held + piece
        end = self._registry.closed(text)
        self._held = text[end:]
        return self._registry.redact(text[:end])

    def rest(self) -> str:
        """What was held back: the text is at its end."""
        held, self._held = self._held, ""
        return self._registry.redact(held)

    def drop(self) -> None:
        """Forget what was held back: the text goes on from what was shown, or not at all."""
        self._held = ""


def _is_word(value: str) -> bool:
    return len(value) <= WORD_CHARACTERS_MAX and value.isalpha() and value.islower()


def _probes(forms: frozenset[str]) -> frozenset[str]:
    """As they stand in canonical JSON; where one holds another, the shorter one is enough."""
    written = {json.dumps(form, ensure_ascii=False)[1:-1] for form in forms}
    written |= {json.dumps(form)[1:-1] for form in forms}
    return frozenset(
        each for each in written if not any(one in each for one in written if one != each)
    )


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
_in_data = Registry()


def remember(value: str) -> None:
    """Take `value` out of every text and of all data from now on. See `Registry.remember`."""
    _own.remember(value)
    if not _is_word(value.strip()):
        _in_data.remember(value)


redact = _own.redact
redact_json = _own.redact_json
is_in_data = _in_data.is_in
redact_data = _in_data.redact_json

"""What one reader holds of one step's text, and how it proves that later, to any node.

A position in a stream is `SEQ` (all entries up to it were read) or, after a piece of text,
`SEQ.ATTEMPT.OFFSET.PROOF`: besides, the reader holds OFFSET characters of one step. Two lives of a
step may give different texts, so a number alone says nothing to another node. The proof does: it
names the step and hashes the text, whole and up to an earlier mark. Whoever knows a text can tell
whether the reader holds its beginning; who cannot tell sends a reset.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import NamedTuple, Self

from llm_orchestrator.errors import InputError

MARK_CHARS = 512
"""A mark lies one to two of these behind the end: a crash costs a second's text, seldom more."""
_HASH_BYTES = 6
_PARTS = 4


class Position(NamedTuple):
    """Where a reader stands."""

    seq: int = 0
    attempt: int = 0
    offset: int = 0
    proof: str = ""
    is_end: bool = False
    """The reader has seen the run's end."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of an event's id. Raises InputError for anything else."""
        first, *rest = text.strip().split(".", _PARTS - 1)
        is_end = rest == ["end"]
        numbers = [first] if is_end else [first, *rest[:2]]
        if len(rest) == 1 and not is_end:
            raise _strange(text)
        if not all(part.isascii() and part.isdigit() and len(part) < 19 for part in numbers):
            raise _strange(text)
        proof = rest[2] if len(rest) > 2 else ""
        seq, attempt, offset = [*map(int, numbers), 0, 0][:3]
        return cls(seq, attempt, offset, proof, is_end)


def _strange(text: str) -> InputError:
    return InputError(
        f"{text[:80]!r} is no position in a stream",
        hint="give the id of an event as it was sent: SEQ, or SEQ.ATTEMPT.OFFSET.PROOF",
    )


class Held:
    """The text of one step as one reader holds it."""

    __slots__ = ("_hash", "_marks", "step", "text")

    def __init__(self, step: str, text: str = "") -> None:
        self.step = step
        self.text = ""
        self._hash = _fresh(step)
        self._marks: list[str] = []
        self.add(text)

    def __len__(self) -> int:
        return len(self.text)

    def add(self, piece: str) -> None:
        """The reader has got more."""
        start, end = len(self.text), len(self.text) + len(piece)
        self.text += piece
        while start < end:
            stop = min(end, (start // MARK_CHARS + 1) * MARK_CHARS)
            self._hash.update(_bytes(self.text[start:stop]))
            if stop % MARK_CHARS == 0:
                self._marks.append(self._hash.hexdigest())
            start = stop

    def cut(self, offset: int) -> None:
        """The reader has forgotten what is behind `offset`."""
        text = self.text[:offset]
        self.text, self._hash = "", _fresh(self.step)
        self._marks.clear()
        self.add(text)

    def proof(self) -> str:
        """See the module's docstring."""
        mark = mark_of(len(self.text))
        parts = [_tag(self.step), self._hash.hexdigest()]
        if mark:
            parts.append(self._marks[mark // MARK_CHARS - 1])
        return "-".join(parts)


def is_of(position: Position, step: str) -> bool:
    """Whether a position is one in this step's text."""
    return position.proof.partition("-")[0] == _tag(step)


def proved(position: Position, step: str, text: str) -> int:
    """How many characters of `text` a reader at `position` holds for sure; -1: none are proved."""
    if not is_of(position, step):
        return -1
    _, *hashes = position.proof.split("-")
    for offset, known in zip((position.offset, mark_of(position.offset)), hashes, strict=False):
        if offset <= len(text) and _digest(step, text[:offset]) == known:
            return offset
    return -1


def mark_of(offset: int) -> int:
    """Where the mark lies that goes with an offset; 0 when there is none yet."""
    return max(0, (offset // MARK_CHARS - 1) * MARK_CHARS)


def common(left: str, right: str) -> int:
    """How many characters two texts have in common at their beginnings."""
    low, high = 0, min(len(left), len(right))
    if left[:high] == right[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if left[:middle] == right[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _fresh(step: str) -> blake2b:
    return blake2b(_bytes(step) + b"\0", digest_size=_HASH_BYTES)


def _digest(step: str, text: str) -> str:
    made = _fresh(step)
    made.update(_bytes(text))
    return made.hexdigest()


def _tag(step: str) -> str:
    return blake2b(_bytes(step), digest_size=3).hexdigest()


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")

"""Bugs planted into the production statements while a trial runs.

An edit that finds nothing to change fails: a planted bug that changes nothing proves nothing.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from llm_orchestrator.store import queries

Plant = Callable[[], AbstractContextManager[None]]
nothing: Plant = contextlib.nullcontext


def edited(name: str, *edits: tuple[str, str]) -> Plant:
    """Statement `name` of PostgreSQL with each first text replaced by the second.

    Space may differ: the statement may be laid out anew, not said anew.
    """

    @contextlib.contextmanager
    def plant() -> Iterator[None]:
        bodies = queries._bodies("postgres")
        was = bodies[name]
        bodies[name] = edit(was, *edits)
        _forget()
        try:
            yield
        finally:
            bodies[name] = was
            _forget()

    return plant


def edit(text: str, *edits: tuple[str, str]) -> str:
    """`text` changed. Raises ValueError for an edit that changes nothing."""
    for old, new in edits:
        words = r"\s+".join(re.escape(word) for word in old.split())
        found = re.search(words, text)
        if found is None or old.split() == new.split():
            raise ValueError(f"the bug changes nothing: {old!r}")
        text = text[: found.start()] + new + text[found.end() :]
    return text


def together(*plants: Plant) -> Plant:
    """All of them."""

    @contextlib.contextmanager
    def plant() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for one in plants:
                stack.enter_context(one())
            yield

    return plant


def _forget() -> None:
    """Statements are put together once, and kept."""
    queries.load_queries.cache_clear()
    queries.compose.cache_clear()

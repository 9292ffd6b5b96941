"""What a commit means to whoever waits for something: told, never relied upon."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class News:
    """What a commit means to others, told to every node after it landed. Losing it costs time only.

    `freed` runs may be claimed again, `parked` ones when their time comes, `ended` ones have come
    to rest, `posted` ones have mail, `mended` ones can be read again. `is_due` says that there is
    something to claim or to fire.
    """

    is_due: bool = False
    posted: frozenset[str] = frozenset()
    freed: frozenset[str] = frozenset()
    ended: frozenset[str] = frozenset()
    parked: frozenset[str] = frozenset()
    mended: frozenset[str] = frozenset()
    is_gap: bool = False
    """Some news may have been missed: look everywhere."""
    is_order: bool = False
    """What operators want of the nodes (engine/maintenance.py), or a breaker has closed."""
    is_workflow: bool = False
    """Definitions have come or gone."""
    is_replaced: bool = False
    """A restore has put another store in its place (see Store.renew). Told in this process only."""

    def __bool__(self) -> bool:
        some = self.posted or self.freed or self.ended or self.parked or self.mended
        flags = self.is_due or self.is_gap or self.is_order or self.is_workflow
        return flags or self.is_replaced or bool(some)

    def __or__(self, other: News) -> News:
        return News(
            self.is_due or other.is_due,
            self.posted | other.posted,
            self.freed | other.freed,
            self.ended | other.ended,
            self.parked | other.parked,
            self.mended | other.mended,
            self.is_gap or other.is_gap,
            self.is_order or other.is_order,
            self.is_workflow or other.is_workflow,
            self.is_replaced or other.is_replaced,
        )


NO_NEWS = News()

"""Who lives: the right to drive runs, as the node itself and as the others judge it.

Pure: times are handed in, seconds on this machine's steady clock. Two questions, never mixed:

- May I begin an effect? Until my lease ends: counted from before the last answered beat was sent,
  minus a margin. What began earlier may end.
- Is another one dead? `Gone`: the server no longer has the session from which it beat, and it has
  not beaten for a moment since. `Silent`: its counter has not moved for a whole lease on my clock,
  while my own reads succeeded. After an outage of the store or of my own session (a proxy that is
  restarted cuts everybody's) nobody is judged until the others had time to come back.

A wrong guess is safe (the journal's key fences whoever is wrong), only not cheap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from llm_orchestrator.store.base import Member, Pulse, lives


@dataclass(frozen=True, slots=True)
class LeaseOptions:
    """Seconds. `gone_s`: how long a closed session must stay quiet to count as a death."""

    heartbeat_s: float = 0.5
    lease_s: float = 3.0
    margin_s: float = 0.5
    gone_s: float = 0.3
    rejoin_s: float = 2.0
    """After an outage: how long nobody is declared dead."""
    look_s: float = 0.2
    """How often to look whether the others' sessions are open; more often than it beats."""


class Verdict(NamedTuple):
    """What one answered beat says."""

    is_fenced: bool
    """Somebody has declared this node dead: its runs are not its own any more."""
    dead: tuple[tuple[str, int], ...]
    """Nodes to declare dead, each with the beat at which it was judged."""
    alive: frozenset[str]
    regions: frozenset[str] = frozenset()
    """Where the living ones are."""


class _Seen:
    """What is known of another node."""

    __slots__ = ("beat", "closed_since", "since")

    def __init__(self, beat: int, now: float) -> None:
        self.beat = beat
        self.since = now
        self.closed_since: float | None = None


class Lease:
    """One node's view. Every method takes `now` in seconds, which never goes back."""

    def __init__(self, node_id: str, options: LeaseOptions, now: float) -> None:
        self.node_id = node_id
        self._options = options
        self._sent_at = now
        self._answered_at = now
        self._source: tuple[str, int] | None = None
        """The server that answers, and our session there."""
        self._trust_from = now
        """Before this moment nobody is judged."""
        self._seen: dict[str, _Seen] = {}
        self._is_fenced = False

    def holds(self, now: float) -> bool:
        """True while this node may begin something outside the store."""
        options = self._options
        return not self._is_fenced and now < self._sent_at + options.lease_s - options.margin_s

    def answered(self, sent_at: float | None, now: float, pulse: Pulse) -> Verdict:
        """Take in the answer to the beat that was sent at `sent_at`; None: it was only a look."""
        options = self._options
        is_blind = now - self._answered_at > options.lease_s / 2
        source = (pulse.server, pulse.session)
        if source != self._source or is_blind:
            is_first = self._source is None
            self._source = source
            self._seen.clear()
            self._trust_from = now if is_first else now + options.rejoin_s
        self._answered_at = now
        own = [member for member in pulse.members if member.node_id == self.node_id]
        if not own or not lives(own[0]):
            self._is_fenced = True
        elif sent_at is not None:
            self._sent_at = max(self._sent_at, sent_at)
        others = [m for m in pulse.members if m.node_id != self.node_id and lives(m)]
        self._seen = {member.node_id: self._update(member, now) for member in others}
        dead = tuple(
            (member.node_id, member.beat)
            for member in others
            if now >= self._trust_from and self._is_dead(self._seen[member.node_id], now)
        )
        living = [member for member in (*others, *own) if lives(member)]
        return Verdict(
            is_fenced=self._is_fenced,
            dead=dead,
            alive=frozenset(member.node_id for member in living),
            regions=frozenset(member.region for member in living),
        )

    def pause_s(self) -> float:
        """Until the next look: soon while somebody's session is closed and it may yet come back."""
        is_suspecting = any(seen.closed_since is not None for seen in self._seen.values())
        return min(self._options.gone_s / 6, self._look_s) if is_suspecting else self._look_s

    def is_due(self, now: float, sent_at: float) -> bool:
        """True when the next sign of life is to be given; `sent_at` is when the last one was."""
        return now - sent_at >= self._options.heartbeat_s - self._look_s / 2

    @property
    def _look_s(self) -> float:
        return min(self._options.look_s, self._options.heartbeat_s * 0.4)

    def _update(self, member: Member, now: float) -> _Seen:
        seen = self._seen.get(member.node_id)
        if seen is None or seen.beat != member.beat:
            seen = _Seen(member.beat, now)
        if member.is_connected:
            seen.closed_since = None
        elif seen.closed_since is None:
            seen.closed_since = now
        return seen

    def _is_dead(self, seen: _Seen, now: float) -> bool:
        options = self._options
        is_gone = seen.closed_since is not None and now - seen.closed_since >= options.gone_s
        return is_gone or now - seen.since >= options.lease_s
